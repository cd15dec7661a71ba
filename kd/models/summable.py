"""Whether the difference of an expert to the base can be summed: what the line of kd/models/line.py needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PretrainedConfig

from kd.errors import UserError
from kd.models.adapters import base_weights
from kd.models.quantization import is_quantised
from kd.models.roles import Role
from kd.models.sharding import whole_shape

BASE = "use start=base"
MERGED = f"{BASE}, or merge the expert (`dae merge weights ... weight=1`) and give the checkpoint"


@dataclass(frozen=True)
class NoSum:
    """What of an adapter is no low-rank update of a linear layer, and what helps."""

    words: str
    remedy: str = MERGED


KEPT_WHOLE = NoSum("is kept whole (modules_to_save)")
BY_ROWS = NoSum("is trained by rows (trainable_token_indices)")
DORA = NoSum("has a magnitude (use_dora)")
# An adapter of the student's on a mixture's experts cannot take their difference (refuse_adapted_parameters).
PARAMETERS = NoSum("has adapted parameters (target_parameters)", f"{MERGED}, with lora=null")
BIAS = NoSum("has a bias of its own (lora_bias)", BASE)  # `dae merge weights` cannot merge it
NOT_LINEAR = NoSum("is no linear layer")
OF_A_CONFIG = {
    "modules_to_save": KEPT_WHOLE,
    "trainable_token_indices": BY_ROWS,
    "use_dora": DORA,
    "target_parameters": PARAMETERS,
    "lora_bias": BIAS,
}
# Parts of the names of a config's keys that change no output of a model with the same weights.
NO_PART_OF_THE_OUTPUT = (
    "dropout", "layerdrop", "initializer", "jitter", "aux_loss", "token_id", "use_cache", "tie_word", "max_position",
    "n_positions", "n_ctx", "vocab_size", "pretraining_tp", "gradient_checkpointing",
    "head_dim",  # with the same shapes and numbers of heads it is the same, given or not
)  # fmt: skip


def refuse_unsummable(expert: Role, student: nn.Module) -> None:
    """Raise UserError if a difference to the base cannot be summed.

    Of an adapter: more than plain low-rank updates of linear layers. Of another expert: other weights or another
    forward pass than the base's, or quantised ones.
    """
    if expert.adapter is None:
        if is_quantised(student) or is_quantised(expert.model):
            raise UserError(no_line_to_quantised(expert.name))
        refuse_another_model(expert, student)
        return
    base: Any = expert.model.get_base_model() if isinstance(expert.model, PeftModel) else expert.model
    for name, module in base.named_modules():
        if found := beyond_a_sum(module, expert.adapter):
            raise UserError(f"start: {expert.name}: {name} {found.words}, which is no low-rank update; {found.remedy}")


def refuse_unsummable_config(expert: str, config: Mapping[str, Any]) -> None:
    """Raise UserError if an adapter's config (adapter_config.json) has what cannot be summed. Needs no weights."""
    for key, found in OF_A_CONFIG.items():
        if config.get(key):
            raise UserError(f"start: {expert}: {found.words}, which is no low-rank update; {found.remedy}")


def no_line_to_quantised(expert: str) -> str:
    """Why there is no line to an expert with weights of its own that are quantised, and what helps.

    Of two quantised matrices the difference is for the most part that of their rounding.
    """
    return (
        f"start: {expert}: has weights of its own, and with `quantization` their difference to the base is lost in "
        "rounding; make an adapter of it (dae merge to-lora --reference BASE --expert EXPERT --output ADAPTER) and "
        "give that, or use start=base"
    )


def refuse_another_model(expert: Role, student: nn.Module) -> None:
    """Raise UserError where weights have other names or shapes, or the same ones give another output."""
    theirs, base = (_shapes(model) for model in (expert.model, student))
    if odd := sorted(theirs.items() ^ base.items()):
        raise UserError(
            f"start: {expert.name}: {odd[0][0]} is missing or has another shape on one side, so there is no line "
            "from the base to this expert; use start=base"
        )
    configs: list[Any] = [expert.model.config, student.config]
    for key, (their, our) in forward_keys(*(config.get_text_config() for config in configs)).items():
        if their != our:
            raise UserError(
                f"start: {expert.name}: its config has {key} = {their!r}, and the base's {our!r}: the expert's weights "
                "would not work the same in the base; use start=base"
            )


def forward_keys(*configs: PretrainedConfig) -> dict[str, tuple[Any, ...]]:
    """What decides the output beside the weights: the value in each config, by key.

    Only fields that a config's class declares: files hold others that nothing reads. Of a class without own fields
    (remote code), the keys that all have.
    """
    values = [config.to_dict() for config in configs]
    declared = {one.name for config in configs for one in fields(config)}
    declared -= {one.name for one in fields(PretrainedConfig)}
    keys = declared or set.intersection(*(set(one) for one in values))
    kept = [key for key in sorted(keys) if not any(part in key for part in NO_PART_OF_THE_OUTPUT)]
    return {key: tuple(_plain(one.get(key)) for one in values) for key in ["model_type", *kept]}


def _plain(value: Any) -> Any:
    """A value without what has no effect: RoPE's older names, and its defaults."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    defaults = {"partial_rotary_factor": 1.0}
    return {key: _plain(one) for key, one in value.items() if key != "type" and defaults.get(key) != one}


def refuse_adapted_parameters(expert: Role, layers: Mapping[str, LoraLayer]) -> None:
    """Raise UserError where a student's adapter on parameters of a mixture would have to take a difference."""
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            raise UserError(
                f"start: {expert.name}: is a full checkpoint, and the student's adapter is on parameters of {name}, "
                "which cannot take the difference to it; adapt linear layers alone (such as "
                "lora.target_modules=[q_proj, v_proj]), train all weights (lora=null), or use start=base"
            )


def beyond_a_sum(module: Any, adapter: str) -> NoSum | None:
    """What an adapter has on a module besides a low-rank update of a linear layer."""
    if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._get_available_adapters():
        return BY_ROWS if isinstance(module, TrainableTokensWrapper) else KEPT_WHOLE
    if not isinstance(module, LoraLayer) or adapter not in module.r:
        return None
    if module.use_dora.get(adapter):
        return DORA
    if isinstance(module, ParamWrapper):
        return PARAMETERS
    factors: Any = module.lora_A
    if adapter not in factors or len(whole_shape(factors[adapter].weight)) != 2:
        return NOT_LINEAR
    return BIAS if module.lora_bias.get(adapter) else None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model without its adapters."""
    weights = (
        base_weights(model) if isinstance(model, PeftModel) else dict(model.named_parameters(remove_duplicate=False))
    )
    return {name: whole_shape(weight) for name, weight in weights.items()}
