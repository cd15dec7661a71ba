"""DeepSpeed's ZeRO-2 and ZeRO-3 through accelerate: what a launcher may ask, the engine's config, and its optimizer.

ZeRO-2: every process has all weights, and a part of the gradients and of the optimizer's state. ZeRO-3: the weights are
partitioned, too (kd/models/sharding.py). The engine computes in the dtypes of one process, under torch's own autocast,
and checkpoints are the files of one process, not DeepSpeed's.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.models.forward import unwrapped

# The engine flattens its weights, so that an optimizer must step each element alone.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_ENGINE = "zero3_engine"  # of a model: what gathers its weights until an engine with an optimizer does

# Keys of accelerate's deepspeed_config, the variable each becomes, the values that are accepted, why others are not.
_ACCEPTED = (
    ("zero_stage", "ACCELERATE_DEEPSPEED_ZERO_STAGE", ("2", "3"), "only ZeRO-2 and ZeRO-3 are supported"),
    (
        "deepspeed_config_file",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        (),
        "the recipe decides; remove it, and set zero_stage",
    ),
    ("offload_optimizer_device", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",), "is not supported"),
    ("offload_param_device", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), "is not supported"),
    (
        "zero3_init_flag",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT",
        ("false",),
        "leaves no process with whole weights to check and to start from; set it to false",
    ),
    (
        "gradient_accumulation_steps",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        (),
        "the recipe decides (train.gradient_accumulation_steps); remove it",
    ),
    ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", (), "the recipe decides (train.max_grad_norm); remove it"),
)


def asked_stage() -> int | None:
    """The ZeRO stage that the launcher's config asks for; None where it does not ask for DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def refuse_zero_config() -> None:
    """Raise UserError for what no run supports in accelerate's deepspeed_config, and where DeepSpeed is missing."""
    for key, variable, accepted, reason in _ACCEPTED:
        value = os.environ.get(variable, "").lower()
        if value and value not in accepted:
            raise UserError(f"accelerate's config: {key}: {value}: {reason}")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "accelerate's config asks for DeepSpeed, which is not installed: pip install -e '.[deepspeed]', or "
            "use recipes/accelerate/fsdp2.yaml"
        )


def refuse_under_zero(recipe: StageRecipe) -> None:
    """Raise UserError for what a recipe asks that neither ZeRO stage can do."""
    optimizer = str(recipe.train.get("optim", "adamw_torch"))
    if optimizer not in OPTIMIZERS:
        raise UserError(
            f"train.optim: {optimizer}: was not tested with DeepSpeed, which steps weights in one flat piece; use one "
            f"of {', '.join(OPTIMIZERS)}"
        )
    if recipe.lora is None and recipe.dtype == "bfloat16":
        raise UserError(
            "dtype: bfloat16: with `lora: null` DeepSpeed would train other weights than one process, in float32; "
            "remove it (train.bf16=true computes in bfloat16)"
        )


def refuse_other_dtypes(model: nn.Module) -> None:
    """Raise UserError where a weight trains in another dtype than float32: the engine would train a copy in float32."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"dtype: {name} trains in {dtype}, and DeepSpeed would train a copy in float32; set dtype=float32, or "
                "use recipes/accelerate/fsdp2.yaml"
            )


def set_up(args: TrainingArguments, model: nn.Module, stage: int) -> None:
    """Replace the config that accelerate made of the launcher's by the run's own, and put autocast on the model."""
    refuse_other_dtypes(model)
    config: dict[str, Any] = args.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
    config.clear()
    config.update(engine_config(args, model, stage))
    if args.bf16:
        _compute_in_bfloat16(model, args.device.type)


def engine_config(args: TrainingArguments, model: nn.Module, stage: int) -> dict[str, Any]:
    """DeepSpeed's config for training this model."""
    bucket = int(unwrapped(model).config.get_text_config().hidden_size) ** 2  # as transformers' `auto`
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 3:
        # No weight stays whole behind our back: what is written is written to the parts.
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": float("inf"),
    }


def _compute_in_bfloat16(model: nn.Module, device: str) -> None:
    """As accelerate does without DeepSpeed: float32 weights, products in bfloat16."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, **named: Any) -> Any:
        # Without its cache, which would hold each weight of ZeRO-3 whole, in bfloat16.
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return plain(*arguments, **named)

    vars(model)["_original_forward"] = plain  # where accelerate keeps it
    model.forward = forward


# -- ZeRO-3 before there is an optimizer -------------------------------------------------------------------------------


def partition(args: TrainingArguments, model: nn.Module) -> None:
    """Partition a model's weights over the ranks. Its layers gather theirs in a forward pass, without an engine too."""
    import deepspeed

    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)  # with the group there is
    config = engine_config(args, model, 3)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)  # weight by weight: the device never holds all
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(args.device)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    vars(model)[_ENGINE] = engine
    for weight in model.parameters():
        weight.ds_flights = model.ds_inflight_param_registry  # type: ignore[attr-defined]


def hand_over(model: nn.Module) -> None:
    """Take the engine of `partition` off a model: an engine with an optimizer brings its own hooks."""
    engine = vars(model).pop(_ENGINE, None)
    if engine is None:
        return
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):  # these belong to the hooks that are gone
            vars(module).pop(name, None)


# -- the optimizer's state, as one process has it ----------------------------------------------------------------------

Groups = Sequence[Mapping[str, Any]]


def whole_optimizer(zero: Any, groups: Groups) -> dict[str, Any]:
    """A `state_dict` of the torch optimizer that the engine was given, with whole tensors on the CPU. Collective.

    zero: the engine's optimizer. groups: of the torch optimizer, as it was made; the engine drops those without weights
    and puts its flat parts in the place of the others' weights.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_states(zero)
    parts: Mapping[str, Any] = next(iter(zero.optimizer.state.values()), {})
    state: dict[int, dict[str, Any]] = {}
    for index, weight in enumerate(chain.from_iterable(group["params"] for group in groups)):
        state[index] = {
            key: safe_get_full_optimizer_state(weight, key).cpu() if _is_flat(part) else deepcopy(part)
            for key, part in parts.items()
        }
    return {"state": state, "param_groups": _whole_groups(zero, groups)}


def _whole_groups(zero: Any, groups: Groups) -> list[dict[str, Any]]:
    count, described = 0, []
    for group, kept in zip(groups, places(groups), strict=True):
        indices = list(range(count, count + len(group["params"])))
        count += len(indices)
        settings = zero.optimizer.param_groups[kept] | {"weight_decay": group["weight_decay"]}
        described.append({key: value for key, value in settings.items() if key != "params"} | {"params": indices})
    return described


def places(groups: Groups) -> list[int]:
    """For each group its place among the engine's groups; that of the first for those which the engine drops."""
    filled = [index for index, group in enumerate(groups) if group["params"]]
    return [filled.index(index) if index in filled else 0 for index in range(len(groups))]


def load_whole_optimizer(zero: Any, groups: Groups, stored: Mapping[str, Any]) -> None:
    """Put a `state_dict` of whole tensors into the engine's optimizer."""
    for kept, settings in zip(places(groups), stored["param_groups"], strict=True):
        if settings["params"]:
            zero.optimizer.param_groups[kept].update({k: v for k, v in settings.items() if k != "params"})
    moments = stored["state"].get(0, {})
    flat: list[Tensor] = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    for part in flat:
        zero.optimizer.state[part] = {
            key: torch.zeros_like(part) if _is_flat(value) else deepcopy(value) for key, value in moments.items()
        }
    _link_states(zero)
    for index, weight in enumerate(chain.from_iterable(group["params"] for group in groups)):
        for key, value in stored["state"].get(index, {}).items():
            if _is_flat(value):
                _put_state(weight, key, value.to(weight.device))


def _link_states(zero: Any) -> None:
    """Let ZeRO-2 find each weight's share of the state; by itself it looks once, when only the first group has any."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _put_state(weight: Any, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(weight, "ds_id"):
        safe_set_full_optimizer_state(weight, value, key)
        return
    part = weight.ds_tensor.numel()  # DeepSpeed's own function fails where the last part is filled up
    filled = nn.functional.pad(value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(weight, filled.narrow(0, part * torch.distributed.get_rank(), part), key)


def _is_flat(value: Any) -> bool:
    """Whether this is a moment of each element, rather than a count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0


def whole_schedule(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """A schedule's `state_dict` with a value for each group, also for those which the engine drops."""
    count, where = sum(bool(group["params"]) for group in groups), places(groups)
    return {
        key: [value[kept] for kept in where] if isinstance(value, list) and len(value) == count else value
        for key, value in state.items()
    }


def own_schedule(stored: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """The inverse of `whole_schedule`."""
    filled = [index for index, group in enumerate(groups) if group["params"]]
    return {
        key: [value[index] for index in filled] if isinstance(value, list) and len(value) == len(groups) else value
        for key, value in stored.items()
    }
