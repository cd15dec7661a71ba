"""The section `train` of a recipe: which transformers.TrainingArguments it may set, their types and their ranges.

Types come from transformers.TrainingArguments itself, which is imported only when `train` is not empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import typing
import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kd.config.problems import NO_VALUE, Problem, in_plain_words, one_of, suggestion

if TYPE_CHECKING:
    from transformers import TrainingArguments


def _split(table: Mapping[str, str]) -> dict[str, str]:
    """{"a b": text} -> {"a": text, "b": text}."""
    return {name: text for names, text in table.items() for name in names.split()}


# What a recipe may set, by what it is for. The types are transformers' own.
_ALLOWED = {
    "optimization": """learning_rate optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
        adam_epsilon max_grad_norm neftune_noise_alpha full_determinism""",
    "schedule": "num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps",
    "batches": """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order""",
    "evaluation and checkpoints": """eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps
        save_total_limit""",
    "logging": """logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
        include_num_input_tokens_seen skip_memory_metrics debug report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id""",
    "precision and memory": """bf16 bf16_full_eval tf32 gradient_checkpointing gradient_checkpointing_kwargs
        activation_checkpointing activation_checkpointing_kwargs torch_empty_cache_steps""",
    "distributed": """ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
        ddp_static_graph""",
}
ALLOWED = frozenset(name for names in _ALLOWED.values() for name in names.split())

_BY_SEED_AND_STEP = "the rows of each step depend on (seed, step) alone, on any number of ranks"
_BY_LENGTH = "the rows of each step are already sorted by length"
_DEVICE = "the device is found automatically; to train on the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES="
_NO_COMPILE = "compiling the student and not its teachers would give equal models a KL above 0"

# What the toolkit decides -> the key or command to use instead, or the reason. Everything else that transformers has
# and ALLOWED has not is refused as not supported: a new release of transformers needs no entry here.
SET_BY_TOOLKIT = _split(
    {
        "output_dir": "set the top-level key `output`",
        "seed data_seed": "set the top-level key `seed`",
        "remove_unused_columns": "the columns with response mask and route must stay",
        "label_names": "the loss reads the response mask, not labels",
        "label_smoothing_factor": "the keys `lambda` and `divergence` define the loss",
        "average_tokens_across_devices": "the loss is always divided by the token count over all ranks",
        "torch_compile torch_compile_backend torch_compile_mode": _NO_COMPILE,
        "use_liger_kernel": "it replaces the forward pass from which the chunked loss takes hidden states",
        "use_cache": "a key-value cache would let packed rows attend to each other",
        "fp16 fp16_full_eval": "use `bf16: true`: the loss is not scaled for fp16",
        "do_train do_eval do_predict": "the command decides",
        "resume_from_checkpoint restore_callback_states_from_checkpoint": "the same command resumes from the last "
        "complete checkpoint",
        "enable_jit_checkpoint": "a signal always writes a checkpoint before the run stops",
        "ignore_data_skip auto_find_batch_size dataloader_drop_last accelerator_config": _BY_SEED_AND_STEP,
        "train_sampling_strategy": _BY_LENGTH,
        "save_only_model save_on_each_node": "checkpoints are always complete, so that a run can resume",
        "load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only": "with an eval set "
        "(`data.eval`), routes are scored and the best checkpoint is kept automatically",
        "push_to_hub hub_model_id": "a run only writes a folder; upload the finished folder with `hf upload`",
        "fsdp fsdp_config": "use accelerate launch --config_file recipes/accelerate/fsdp2.yaml",
        "deepspeed": "use accelerate launch --config_file recipes/accelerate/zero3.yaml (or zero2.yaml)",
        "local_rank": "torchrun sets it",
        "ddp_timeout": "processes wait three hours for each other, as the first one writes and proves the result",
        "use_cpu": _DEVICE,
        "disable_tqdm": "progress is a bar in a terminal and lines elsewhere",
        "logging_nan_inf_filter": "a loss that is not finite must stop the run, not be hidden",
    }
)

# Arguments of earlier releases of transformers -> what to do now.
RENAMED = _split(
    {
        "warmup_ratio": "write `warmup_steps` (below 1 it is a fraction of the run: `warmup_steps: 0.1`)",
        "group_by_length": f"remove it: {_BY_LENGTH}",
        "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR; metrics.jsonl is always written",
        "save_safetensors": "remove it: weights are always safetensors",
        "overwrite_output_dir": "remove it: choose another `output`, or delete that folder",
        "evaluation_strategy": "write `eval_strategy`",
        "no_cuda use_mps_device": f"remove it: {_DEVICE}",
        "per_gpu_train_batch_size": "write `per_device_train_batch_size`",
        "per_gpu_eval_batch_size": "write `per_device_eval_batch_size`",
        "adafactor": "write `optim: adafactor`",
        "fp16_opt_level fp16_backend half_precision_backend": "write `bf16: true`",
        "torchdynamo": f"remove it: {_NO_COMPILE}",
        "include_tokens_per_second": "remove it: metrics.jsonl has tokens per second",
        "dispatch_batches split_batches": f"remove it: {_BY_SEED_AND_STEP}",
    }
)

# What other libraries say -> the argument they mean, where the spelling alone would not tell.
_SYNONYMS = _split(
    {
        "lr": "learning_rate",
        "optimizer": "optim",
        "wd": "weight_decay",
        "grad_clip gradient_clipping": "max_grad_norm",
        "epochs num_epochs": "num_train_epochs",
        "steps": "max_steps",
        "scheduler lr_scheduler": "lr_scheduler_type",
        "warmup": "warmup_steps",
        "batch_size micro_batch_size train_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "grad_accum": "gradient_accumulation_steps",
        "num_workers": "dataloader_num_workers",
    }
)

# Lower bound, and whether the bound itself is allowed: transformers checks none of these.
MINIMA = {
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "num_train_epochs": (0, False),
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "logging_steps": (0, False),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "save_total_limit": (1, True),
    "dataloader_num_workers": (0, True),
}

CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")

# Building a TrainingArguments with one of these changes the state of the whole process.
_NOT_TRIED = {"tf32", "log_level", "log_level_replica"}

_NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that are built from it


def training_argument_problems(train: Mapping[str, Any], held_out: bool = False) -> list[Problem]:
    """What is wrong with the section `train`: names that it may not set, wrong types, values out of range.

    held_out: whether the recipe has an eval set, so that the best checkpoint is kept.
    """
    if not train:
        return []
    found = {name: wrong(name, value) for name, value in train.items()}
    problems = [Problem(("train", name), train[name], words) for name, words in found.items() if words is not None]
    if not problems and (words := refused_together(train, held_out)):
        problems.append(Problem(("train",), NO_VALUE, words))
    return problems


def wrong(name: Any, value: Any) -> str | None:
    """What is wrong with one argument, with the remedy; None if nothing is."""
    if name in SET_BY_TOOLKIT:
        return f"cannot be set in a recipe: {SET_BY_TOOLKIT[name]}"
    if name in RENAMED:
        return f"belongs to earlier releases of transformers: {RENAMED[name]}"
    types = argument_types()
    if name in ALLOWED and name in types:
        return wrong_type(types[name], value) or wrong_value(name, value)
    if name in ALLOWED:
        return "the installed transformers does not have it: remove it"
    if name in types:
        return "an argument of transformers that is not supported here: remove it"
    near = f"; did you mean `{_SYNONYMS[name]}`?" if name in _SYNONYMS else suggestion(str(name), ALLOWED)
    return f"unknown training argument `{name}`{near}"


def wrong_type(annotation: Any, value: Any) -> str | None:
    """Why a value does not fit an argument's type; an enumeration takes the names of its members as text."""
    kinds = (annotation, *typing.get_args(annotation))
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if choices:
        names = [str(member.value) for member in choices[0]]
        return None if value in names else f"expected {any_of(names)}{suggestion(str(value), names)}"
    exact = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        TypeAdapter(annotation, config=exact).validate_python(value)
    except ValidationError as error:
        # One message for each type of a union, such as "expected a number": their first word is the same.
        words = [in_plain_words({**line, "input": None}, ()).partition(" ")[2] for line in error.errors()]
        return f"expected {one_of(list(dict.fromkeys(words)))}"
    return None


def any_of(names: list[str]) -> str:
    """The names, or where to read them if they are too many for a line."""
    return one_of(names) if len(names) <= 12 else f"one of {len(names)} names that transformers.TrainingArguments lists"


def wrong_value(name: str, value: Any) -> str | None:
    """Why a value of the right type cannot work."""
    if name in MINIMA and value is not None:
        least, included = MINIMA[name]
        if value < least or (value == least and not included):
            return f"must be {'at least' if included else 'above'} {least}"
    if name == "max_steps" and value == 0:
        return "must be at least 1 (remove it to train for num_train_epochs)"
    if name.endswith("_strategy") and value in ("epoch", "best"):
        return (
            f"expected steps or no: set `{name.removesuffix('_strategy')}_steps` (below 1 it is a fraction of the run)"
        )
    if name in CHECKPOINTING_KWARGS and isinstance(value, str):
        return "expected a mapping"
    if name in CHECKPOINTING_KWARGS and isinstance(value, dict) and value.get("use_reentrant"):
        return "reentrant checkpointing gives wrong gradients with adapters: set use_reentrant: false"
    return missing_reporter(value) if name == "report_to" else None


def missing_reporter(names: str | list[str]) -> str | None:
    """Which of the named experiment trackers is not installed; None if all are."""
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    absent = [
        name for name in ([names] if isinstance(names, str) else names) if name not in ("all", "none", *installed)
    ]
    if not absent:
        return None
    return f"{one_of(absent)} is not installed: install it, or remove it (metrics.jsonl is always written)"


@functools.cache
def argument_types() -> dict[str, Any]:
    """Name -> type of every training argument of the installed transformers."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def refused_together(train: Mapping[str, Any], held_out: bool) -> str | None:
    """Why transformers refuses these arguments together; None if it takes them."""
    import torch
    from transformers import TrainingArguments

    class Unplaced(TrainingArguments):
        # Finding the device would start torch.distributed and fix it for the whole process.
        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

    if held_out and train.get("eval_strategy") == "no":
        return "eval_strategy: no: the eval set (`data.eval`) would never be scored; remove one of the two"
    given = {name: value for name, value in train.items() if name not in _NOT_TRIED}
    tried = default_steps(train, held_out) | ({"load_best_model_at_end": True} if held_out else {}) | given
    with warnings.catch_warnings(), _without_deepspeed():
        warnings.simplefilter("ignore")
        try:
            try_optimizer(Unplaced(**{"report_to": "none", **tried, "output_dir": "unused", "use_cpu": True}))
        except (ValueError, TypeError, ImportError) as error:
            reason = str(error).replace("--", "")
            if "load_best_model_at_end" not in reason:
                return reason
            kept = reason.replace("load_best_model_at_end", "keeping the best checkpoint (`data.eval`)").rstrip(".")
            return f"{kept}; give eval_steps alone, or save_steps as a multiple of it, and leave save_strategy out"
    return None


def default_steps(train: Mapping[str, Any], held_out: bool) -> dict[str, Any]:
    """How often to save, and with an eval set to score it: as often as the other, where one of them is given."""
    if not held_out:
        return {"save_steps": 0.1}
    save_steps = train.get("save_steps") or train.get("eval_steps") or 0.1
    return {"save_steps": save_steps, "eval_strategy": "steps", "eval_steps": save_steps}


@contextlib.contextmanager
def _without_deepspeed() -> Iterator[None]:
    """A launcher's DeepSpeed is no part of the recipe, and is refused where the run starts."""
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


def try_optimizer(arguments: TrainingArguments) -> None:
    """Build the optimizer's settings and the schedule as training will.

    Raises ImportError if the optimizer's library is missing, ValueError or TypeError if a setting does not fit.
    """
    import torch
    from transformers import Trainer, get_scheduler

    if not arguments.optim.startswith(_NEED_THE_MODEL):
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)]),
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type] # text has become a mapping
    )
