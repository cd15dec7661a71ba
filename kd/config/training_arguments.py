"""What `train` in a recipe may say: transformers.TrainingArguments by name, less the fields that the toolkit owns.

transformers is imported only inside functions, and only when `train` says something.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kd.config.problems import NO_VALUE, Problem, in_plain_words, one_of, suggestion

if TYPE_CHECKING:
    from transformers import TrainingArguments

_BY_SEED_AND_STEP = "the rows of each step follow from (seed, step) alone, on any number of ranks"
_HELD_OUT = "held-out rows (`data.eval`) are scored by KL per route and the best checkpoint is kept without being asked"
_NO_UPLOAD = "a run writes a folder only; upload the finished folder with `hf upload`"
_NOT_DISTRIBUTED = "shared roles are trained with DDP only (torchrun, accelerate launch)"
_DEVICE = "the device is found by itself; to train on the CPU, hide the others: CUDA_VISIBLE_DEVICES="
_WHOLE_CHECKPOINTS = "checkpoints are whole, so that a run can go on after a stop"

# Field -> why a recipe cannot set it, and what to do instead.
OWNED = {
    "output_dir": "the run folder is the key `output`",
    "seed": "the seed is the key `seed`, outside `train`",
    "data_seed": "the seed is the key `seed`, outside `train`",
    "remove_unused_columns": "it would drop the columns that hold response mask and route",
    "label_names": "the loss reads the response mask, not labels",
    "label_smoothing_factor": "the loss is the one of the recipe's `lambda` and `divergence`",
    "torch_compile": "the student would be compiled and its teachers not: equal models would no longer give a KL of 0",
    "use_liger_kernel": "it replaces the forward pass that the chunked loss reads hidden states from",
    "use_cache": "a key-value cache would let packed rows see each other",
    "average_tokens_across_devices": "the loss is always divided by the count over all ranks",
    "fp16": "use bf16: the loss is not scaled for fp16",
    "fp16_full_eval": "use bf16: the loss is not scaled for fp16",
    "do_train": "the command decides what is done",
    "do_eval": "the command decides what is done",
    "do_predict": "the command decides what is done",
    "resume_from_checkpoint": "the same command goes on from the last whole checkpoint by itself",
    "ignore_data_skip": _BY_SEED_AND_STEP,
    "auto_find_batch_size": _BY_SEED_AND_STEP,
    "dataloader_drop_last": _BY_SEED_AND_STEP,
    "accelerator_config": _BY_SEED_AND_STEP,
    "train_sampling_strategy": "rows are sorted by length within each step by themselves",
    "length_column_name": "rows are sorted by length within each step by themselves",
    "save_only_model": _WHOLE_CHECKPOINTS,
    "save_on_each_node": _WHOLE_CHECKPOINTS,
    "enable_jit_checkpoint": "a stop by signal writes a checkpoint by itself",
    "restore_callback_states_from_checkpoint": "the same command goes on from the last whole checkpoint by itself",
    "load_best_model_at_end": _HELD_OUT,
    "metric_for_best_model": _HELD_OUT,
    "greater_is_better": _HELD_OUT,
    "prediction_loss_only": _HELD_OUT,
    "include_for_metrics": _HELD_OUT,
    "batch_eval_metrics": _HELD_OUT,
    "eval_accumulation_steps": _HELD_OUT,
    "eval_do_concat_batches": _HELD_OUT,
    "eval_use_gather_object": _HELD_OUT,
    "push_to_hub": _NO_UPLOAD,
    "hub_model_id": _NO_UPLOAD,
    "hub_strategy": _NO_UPLOAD,
    "hub_token": _NO_UPLOAD,
    "hub_private_repo": _NO_UPLOAD,
    "hub_always_push": _NO_UPLOAD,
    "hub_revision": _NO_UPLOAD,
    "fsdp": _NOT_DISTRIBUTED,
    "fsdp_config": _NOT_DISTRIBUTED,
    "deepspeed": _NOT_DISTRIBUTED,
    "parallelism_config": _NOT_DISTRIBUTED,
    "local_rank": "torchrun sets it",
    "use_cpu": _DEVICE,
    "disable_tqdm": "progress is shown in a terminal, and as lines elsewhere",
    "logging_nan_inf_filter": "a loss that is no number ends the run, and is not to be hidden",
}

# Names that transformers has dropped, or that other toolkits use -> what to write here.
RENAMED = {
    "warmup_ratio": "write `warmup_steps` (below 1 it is a fraction of the run: `warmup_steps: 0.1`)",
    "group_by_length": "remove it: rows are sorted by length within each step by themselves",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR; metrics.jsonl is always written",
    "save_safetensors": "remove it: weights are always safetensors",
    "overwrite_output_dir": "remove it: choose another `output`, or delete that folder",
    "evaluation_strategy": "write `eval_strategy`",
    "no_cuda": f"remove it: {_DEVICE}",
    "use_mps_device": "remove it: the device is found by itself",
    "per_gpu_train_batch_size": "write `per_device_train_batch_size`",
    "per_gpu_eval_batch_size": "write `per_device_eval_batch_size`",
    "adafactor": "write `optim: adafactor`",
    "fp16_opt_level": "write `bf16: true`",
    "fp16_backend": "write `bf16: true`",
    "half_precision_backend": "write `bf16: true`",
    "torchdynamo": "write `torch_compile_backend`",
    "include_tokens_per_second": "remove it: metrics.jsonl has tokens per second",
    "dispatch_batches": f"remove it: {_BY_SEED_AND_STEP}",
    "split_batches": f"remove it: {_BY_SEED_AND_STEP}",
    "lr": "write `learning_rate`",
    "epochs": "write `num_train_epochs`",
    "batch_size": "write `per_device_train_batch_size`",
}

# Smallest allowed value, and whether it is itself allowed: transformers checks none of these.
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
_NOT_TRIED = {"tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "log_level", "log_level_replica"}

_NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that cannot be made without it


def check_training_arguments(train: Mapping[str, Any]) -> list[str]:
    """What is wrong with the section `train`, one line for each problem; an empty list when nothing is."""
    return [
        f"train.{problem.key[-1]}: {problem.message}" if len(problem.key) > 1 else f"train: {problem.message}"
        for problem in training_argument_problems(train)
    ]


def training_argument_problems(train: Mapping[str, Any], held_out: bool = False) -> list[Problem]:
    """What is wrong with the section `train`: owned, removed and unknown names, wrong types, values out of range.

    held_out: whether the recipe has held-out rows, so that checkpoints are chosen by their score.
    """
    if not train:
        return []
    found = {name: wrong(name, value) for name, value in train.items()}
    problems = [Problem(("train", name), train[name], words) for name, words in found.items() if words is not None]
    if not problems and (words := refused_together(train, held_out)):
        problems.append(Problem(("train",), NO_VALUE, words))
    return problems


def wrong(name: Any, value: Any) -> str | None:
    """What is wrong with one argument, in plain words with the remedy; None when nothing is."""
    fields = argument_types()
    if name in OWNED:
        return f"is not for a recipe to set: {OWNED[name]}"
    if name not in fields:
        gone = RENAMED.get(name)
        return (
            f"is no longer a training argument: {gone}" if gone else f"unknown argument{suggestion(str(name), fields)}"
        )
    return wrong_type(fields[name], value) or wrong_value(name, value)


def wrong_type(annotation: Any, value: Any) -> str | None:
    """Why a value does not fit an argument's type; names of an enumeration count as text that fits."""
    kinds = (annotation, *typing.get_args(annotation))
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if choices:
        names = [str(member.value) for member in choices[0]]
        return None if value in names else f"wants {any_of(names)}{suggestion(str(value), names)}"
    exact = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        TypeAdapter(annotation, config=exact).validate_python(value)
    except ValidationError as error:
        words = [in_plain_words({**line, "input": None}, ()).removeprefix("wants ") for line in error.errors()]
        return f"wants {one_of(list(dict.fromkeys(words)))}"
    return None


def any_of(names: list[str]) -> str:
    """The names themselves, or where they can be read when there are too many for a line."""
    return one_of(names) if len(names) <= 12 else f"one of {len(names)} names that transformers.TrainingArguments lists"


def wrong_value(name: str, value: Any) -> str | None:
    """Values that are of the right type and cannot work."""
    if name in MINIMA and value is not None:
        least, included = MINIMA[name]
        if value < least or (value == least and not included):
            return f"must be {'at least' if included else 'above'} {least}"
    if name == "max_steps" and value == 0:
        return "must be at least 1 (leave it out for num_train_epochs)"
    if name.endswith("_strategy") and value in ("epoch", "best"):
        return f"wants steps or no: set `{name.removesuffix('_strategy')}_steps` (below 1 it is a fraction of the run)"
    if name in CHECKPOINTING_KWARGS and isinstance(value, str):
        return "wants a mapping"
    if name in CHECKPOINTING_KWARGS and isinstance(value, dict) and value.get("use_reentrant"):
        return "with adapters, reentrant checkpointing gives wrong gradients without a word: use_reentrant: false"
    return missing_reporter(value) if name == "report_to" else None


def missing_reporter(names: str | list[str]) -> str | None:
    """Which of the named experiment trackers is not installed here; None when all are."""
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    absent = [
        name for name in ([names] if isinstance(names, str) else names) if name not in ("all", "none", *installed)
    ]
    if not absent:
        return None
    return f"{one_of(absent)} is not installed here: install it, or remove it (metrics.jsonl is always written)"


@functools.cache
def argument_types() -> dict[str, Any]:
    """Name -> type of every training argument of the installed transformers."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def refused_together(train: Mapping[str, Any], held_out: bool) -> str | None:
    """What transformers says against these arguments taken together; None when it takes them."""
    import torch
    from transformers import TrainingArguments

    class Unplaced(TrainingArguments):
        # Finding the device would start torch.distributed and fix it for the whole process.
        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

    if held_out and train.get("eval_strategy") == "no":
        return "eval_strategy: no: held-out rows (`data.eval`) are there to be scored; remove one of the two"
    tried = {"save_steps": 0.1} | {name: value for name, value in train.items() if name not in _NOT_TRIED}
    if held_out:
        tried = {"eval_strategy": "steps", "eval_steps": tried["save_steps"], "load_best_model_at_end": True} | tried
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try_optimizer(Unplaced(**{"report_to": "none", **tried, "output_dir": "unused", "use_cpu": True}))
        except (ValueError, TypeError, ImportError) as error:
            reason = str(error).replace("--", "")
            return reason.replace("load_best_model_at_end", "keeping the best checkpoint (`data.eval`)")
    return None


def try_optimizer(arguments: TrainingArguments) -> None:
    """Make the optimizer's settings and the schedule, as training will.

    Raises ImportError for an optimizer whose library is missing, ValueError and TypeError for settings that do not fit.
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
