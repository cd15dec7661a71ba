"""Putting a peft adapter on a model with all of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from kd.errors import UserError
from kd.models.adapter_features import (
    merge_command,
    refuse_changed_base,
    refuse_unknown_features,
    refuse_unshareable,
)
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.models.completeness import refuse_other_weights
from kd.models.opening import opening
from kd.models.tensor_files import stored_tensor

_PREFIX = "base_model.model."
_OTHER_BASE = (
    "If it was trained on another base, pass that one as --base; if tokens were added to its vocabulary, pass a base "
    "with as many rows (model.resize_token_embeddings); else save or download it again."
)
_OTHER_SHAPE = re.compile(r"size mismatch for (\S+): .*torch\.Size\((\[.*?\])\).*torch\.Size\((\[.*?\])\)")
# Where peft puts the layer that it wraps.
_WRAPPED = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")


def put_adapter(
    model: nn.Module,
    adapter: Checkpoint,
    name: str,
    *,
    trainable: bool = False,
    shared_with: Checkpoint | None = None,
) -> PeftModel:
    """Put a LoRA adapter on a model, under a name; the model may lie on the meta device.

    shared_with: the base, if other roles use the model's weights, too.

    Returns:
        The model wrapped, or the same one where it is wrapped already.

    Raises:
        UserError: the adapter's files do not hold the weights that its config describes, all of them and no others, its
            config does not fit the model or is not fully supported, it was trained on changed base weights,
            or it would change weights that others share.
    """
    refuse_changed_base(adapter)
    refuse_unknown_features(adapter)
    if shared_with is not None:
        refuse_unshareable(adapter)
    words, remedy = "does not fit its base", _OTHER_BASE
    if isinstance(model, PeftModel):
        words, remedy = "cannot stand beside the other adapters on its base", f"Instead, {merge_command(adapter)}."
    with opening(f"{adapter.folder / ADAPTER_CONFIG}: {words}", remedy):
        adapted = _with_layers(model, adapter, name, trainable=trainable, shared=shared_with is not None)
        if shared_with is not None:
            _refuse_nested(adapted, adapter)
            _answer_for_own_rows(adapted)
    if shared_with is not None:
        _refuse_own_base_weights(adapted, adapter, name, shared_with)
    with opening(f"{adapter}: its weights cannot be put on its base", "Save or download the adapter again."):
        _load_weights(adapted, adapter, name, trainable=trainable)
    return adapted


def _with_layers(model: nn.Module, adapter: Checkpoint, name: str, *, trainable: bool, shared: bool) -> PeftModel:
    empty = any(parameter.is_meta for parameter in model.parameters())
    config = LoraConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = not trainable
    if shared:  # biases that it brings are refused, and peft takes no second adapter beside one that says otherwise
        config.bias = "none"
    if empty:  # starts that are worked out from the base's weights (PiSSA and the like) would need some
        config.init_lora_weights = True
    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=empty)
        return model
    return PeftModelForCausalLM(model, config, name, low_cpu_mem_usage=empty)


def _refuse_nested(adapted: PeftModel, adapter: Checkpoint) -> None:
    """Raise UserError if a module or token rows that an adapter saves as a whole contain further adapted layers.

    peft copies these with the adapters on them, and then computes neither adapter.
    """
    for name, module in adapted.get_base_model().named_modules():
        inner: list[nn.Module] = []
        if isinstance(module, AuxiliaryTrainingWrapper):
            inner = [part for part in module.modules() if part not in (module, getattr(module, "token_adapter", None))]
        elif isinstance(module, BaseTunerLayer):
            inner = [module.get_base_layer()]
        if any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in inner):
            raise UserError(
                f"{adapter.folder / ADAPTER_CONFIG}: cannot stand beside the other adapters on its base: {name} is "
                "kept whole (modules_to_save, trainable_token_indices) and has further layers (target_modules), its "
                f"own or another adapter's. Train it with one of the two; or {merge_command(adapter)}."
            )


def _answer_for_own_rows(adapted: PeftModel) -> None:
    """Let layers with token rows (trainable_token_indices) know of no rows of adapters that have none there.

    peft 0.21 asks them for those of every adapter that it loads or saves, and ends with a KeyError.
    """
    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper) and "adapter_state_dict" not in vars(module):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                setattr(module, method, partial(_of_own_rows, module, getattr(module, method)))


def _of_own_rows(layer: TrainableTokensWrapper, answer: Callable[..., Any], name: str, *others: Any) -> Any:
    return answer(name, *others) if name in layer._get_available_adapters() else {}


def _load_weights(adapted: PeftModel, adapter: Checkpoint, name: str, *, trainable: bool) -> None:
    empty = any(parameter.is_meta for parameter in adapted.parameters())
    try:
        keys = adapted.load_adapter(
            str(adapter.folder), name, is_trainable=trainable, torch_device="cpu", low_cpu_mem_usage=empty
        )
    except KeyError as error:  # what a wrapped module (modules_to_save) should have found in the file
        if str(error.args[0]).startswith(_PREFIX):
            refuse_other_weights(adapter, ADAPTER_CONFIG, missing=[_as_saved(error.args[0], name)])
        raise
    except RuntimeError as error:
        found = _OTHER_SHAPE.findall(str(error))
        shapes = [(_as_saved(key, name), json.loads(stored), json.loads(wanted)) for key, stored, wanted in found]
        refuse_other_weights(adapter, ADAPTER_CONFIG, reshaped=shapes, remedy=_OTHER_BASE)
        raise
    refuse_other_weights(
        adapter,
        ADAPTER_CONFIG,
        missing=[_as_saved(key, name) for key in keys.missing_keys],
        unknown=[_as_saved(key, name) for key in keys.unexpected_keys],
        remedy=_OTHER_BASE,
    )
    if not trainable:  # peft forgets some of an adapter that is not the first one on its model
        for key, parameter in adapted.named_parameters():
            if name in key.split("."):
                parameter.requires_grad_(False)


def _as_saved(key: str, name: str) -> str:
    """A weight's name without peft's prefix and the name that the adapter was given here."""
    return key.removeprefix(_PREFIX).replace(f".{name}.", ".").removesuffix(f".{name}")


# -- weights of the base that an adapter's file brings along -----------------------------------------------------------


def _refuse_own_base_weights(adapted: PeftModel, adapter: Checkpoint, name: str, base: Checkpoint) -> None:
    """Raise UserError where an adapter brings weights of the base (biases, embeddings) that are not those of `base`.

    Loading it would write them over the weights that all roles share. What its layers keep of their own, saved modules
    among it, is no such weight.
    """
    own = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    there = base_weights(adapted)
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        for key in sorted(set(file.keys()) - own.keys()):
            plain = _WRAPPED.sub("", key.removeprefix(_PREFIX))
            weight = there.get(plain)
            if weight is not None and weight.is_meta:
                names = [other for other, tensor in there.items() if tensor is weight]
                weight = stored_tensor(base.folder, names)
            if weight is None:
                continue  # no weight of the base: refused as unknown when the weights are loaded
            stored: torch.Tensor = file.get_tensor(key)
            if stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
                kind = "biases of the base that it trained (bias)" if key.endswith(".bias") else "weights of its own"
                raise UserError(
                    f"{adapter}: brings {kind} for {plain.rpartition('.')[0]}, so it cannot share {base}; "
                    f"{merge_command(adapter)}."
                )


def base_weights(adapted: PeftModel) -> dict[str, Any]:
    """The base's weights by the names that they have without adapters."""
    parameters = adapted.get_base_model().named_parameters(remove_duplicate=False)
    return {_WRAPPED.sub("", name): weight for name, weight in parameters if not _is_of_an_adapter(name)}


def _is_of_an_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "modules_to_save", "trainable_tokens_")) for part in name.split("."))
