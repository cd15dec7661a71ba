"""An adapter merged into its base, and configs that say the truth of tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kd.models.adapter_features import CANNOT_MERGE
from kd.models.checkpoint_files import ADAPTER_CONFIG
from kd.models.opening import opening
from kd.models.tensor_files import stored_tensor


def merged(model: PeftModel, adapter: str, path: str) -> PreTrainedModel:
    """The base with one of its adapters merged into it; the others are removed. `model` cannot be used afterwards.

    Layers that share their weights (tied embeddings, replicated layers) get copies of their own first: peft merges in
    place, so that one layer's update would be the other's, too. If the two embeddings differ afterwards, the config is
    changed to untied.

    path: of the adapter, for messages. Raises UserError where peft cannot merge it.
    """
    with opening(f"{Path(path) / ADAPTER_CONFIG}: cannot be merged into its base", CANNOT_MERGE):
        for other in [name for name in model.peft_config if name != adapter]:
            model.delete_adapter(other)
        take_off_wrappers_of_others(model, adapter)
        model.set_adapter(adapter)
        give_copies(model)
        base: Any = model.get_base_model()
        tied = is_tied(base.config)
        whole: PreTrainedModel = model.merge_and_unload(adapter_names=[adapter])
        refuse_unmerged(whole)
        set_tied(whole.config, tied)  # peft lets it say no where the copies are equal, too
    state_ties(whole)
    return whole


def refuse_unmerged(whole: nn.Module) -> None:
    """Raise ValueError where peft has left a layer of the adapter in place."""
    layers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    left = [name for name, module in whole.named_modules() if isinstance(module, layers)]
    if left:
        raise ValueError(
            f"peft leaves {left[0]} unmerged, which is kept whole (modules_to_save, trainable_token_indices) and has a "
            "layer of target_modules as well"
        )


def take_off_wrappers_of_others(model: PeftModel, adapter: str) -> None:
    """Put back the layers of the base around which only other adapters had wrappers (saved modules, token rows)."""
    base: Any = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter not in module._get_available_adapters():
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.original_module)


def give_copies(model: nn.Module) -> None:
    """Give each layer of `model` weights that no other layer has."""
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                module.register_parameter(name, own)
            else:
                seen.add(id(weight))


def state_ties(model: PreTrainedModel) -> None:
    """Where a config calls input and output embeddings one matrix, make it so if they are equal, else let it say no.

    A reader that believes the config would take the one for the other.
    """
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not is_tied(model.config) or any(getattr(end, "weight", None) is None for end in ends):
        return
    first, last = (end.weight for end in ends)
    if first.is_meta or last is first:
        return
    if torch.equal(first, last):
        ends[1].weight = first
    else:
        set_tied(model.config, False)


def state_ties_of_files(folder: Path, config: PretrainedConfig) -> None:
    """The same for the config, not yet written, of weights that lie in `folder`."""
    if not is_tied(config):
        return
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    first, last = (stored_tensor(folder, [f"{names[end]}.weight"]) for end in ends)
    if first is not None and last is not None and not torch.equal(first, last):
        set_tied(config, False)


def is_tied(config: PretrainedConfig) -> bool:
    return bool(config.get_text_config().tie_word_embeddings)


def set_tied(config: PretrainedConfig, tied: bool) -> None:
    """Let a config say whether the two embeddings are one matrix."""
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = tied
