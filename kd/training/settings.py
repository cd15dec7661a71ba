"""What a recipe asks of torch and transformers: dtype, device, TrainingArguments, steps."""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kd.config.stage_recipe import StageRecipe
from kd.config.training_arguments import default_steps
from kd.data.mixing import Mixture
from kd.errors import UserError
from kd.losses.divergence_recipe import DivergenceRecipe
from kd.models.roles import LoadSettings
from kd.runs.settings import DEFAULT_BATCH_SIZE

# How long processes wait for each other: the others for the first one, while it writes and proves a large result.
PATIENCE = dt.timedelta(hours=3)


def processes() -> PartialState:
    """This process among those that a launcher (torchrun, accelerate) started; alone without one."""
    cpu = not torch.cuda.is_available()
    if "RANK" not in os.environ:
        return PartialState(cpu=cpu)
    have_met = torch.distributed.is_initialized()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if not have_met:
        # They connect through a store that the first process may hold: if it ended before the others have connected,
        # as with a refused key, they would end with an internal error.
        state.wait_for_everyone()
    return state


def load_settings(recipe: StageRecipe) -> LoadSettings:
    """dtype and device: `auto` is bfloat16 on an accelerator that has it, else float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.dtype == "auto":
        dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    else:
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    if device == "cuda":
        device = f"cuda:{processes().local_process_index}"
    return LoadSettings(
        dtype,
        recipe.attn_implementation,
        recipe.trust_remote_code,
        device,
        quantization=recipe.quantization,
        offload_teachers=recipe.offload_teachers if isinstance(recipe, DivergenceRecipe) else None,
    )


def student_dtype(recipe: StageRecipe) -> torch.dtype:
    """Of a student whose weights all train: float32 (bf16 autocast on an accelerator), unless dtype is bfloat16."""
    return torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32


def default_rate(*, lora: bool) -> float:
    """The learning rate of a recipe that names none."""
    return 2e-4 if lora else 2e-5


def training_arguments(recipe: StageRecipe, settings: LoadSettings) -> TrainingArguments:
    """The recipe's `train` over our defaults; what the toolkit owns is set last (and refused in a recipe).

    Raises UserError where this machine cannot do what they ask.
    """
    on_cpu = settings.device == "cpu"
    defaults: dict[str, Any] = {
        "learning_rate": default_rate(lora=recipe.lora is not None),
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": DEFAULT_BATCH_SIZE,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        # Float32 weights with products in bfloat16; `dtype: bfloat16` has bfloat16 weights, and needs no autocast.
        "bf16": not on_cpu
        and recipe.lora is None
        and settings.dtype == torch.bfloat16
        and student_dtype(recipe) == torch.float32,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,  # every trainable weight has its part in every row
        "optim": "adamw_torch",
    }
    chosen = {**defaults, **default_steps(recipe.train, bool(recipe.data.eval)), **recipe.train}
    if recipe.keeps_best:
        chosen = {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            **chosen,
        }
    # Reentrant checkpointing gives wrong gradients with adapters. Both are names of the same argument.
    how = [chosen.pop(f"{name}_checkpointing_kwargs", None) or {} for name in ("gradient", "activation")]
    owned: dict[str, Any] = {
        "activation_checkpointing_kwargs": {**how[0], **how[1], "use_reentrant": False},
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has been waiting
    }
    try:
        args = TrainingArguments(**chosen, **owned)
    except ValueError as error:  # what only this machine can tell, such as bf16 on a CPU
        raise UserError(f"train: {str(error).splitlines()[0]}") from error
    if args.deepspeed_plugin is not None:
        unset_hf_deepspeed_config()  # with it transformers would open models in parts; they are partitioned later
    return args


def planned_steps(mixture: Mixture, args: TrainingArguments) -> int:
    """Optimizer steps of the run: `train.max_steps`, or what `train.num_train_epochs` makes of the mixture."""
    return args.max_steps if args.max_steps > 0 else mixture.steps(args.num_train_epochs)


def rows_per_step(args: TrainingArguments) -> int:
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
