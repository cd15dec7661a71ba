"""What a loss between layers can teach: nothing, where nothing that trains comes before what it compares.

A student whose adapter sits on `down_proj` alone has the attention maps of its first layer for good: a loss on them is
a number that does not move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd.config.layer_recipes import AttentionRecipe, HiddenRecipe, LayersRecipe
from kd.errors import UserError
from kd.losses.attention import AttentionInputs, observed_attention
from kd.losses.hidden_states import decoder_layers
from kd.models.forward import final_hidden_states, unwrapped
from kd.models.roles import Role, speaking_as

TOKENS = 8


def refuse_useless_terms(attention: AttentionRecipe | None, hidden: HiddenRecipe | None, student: Role) -> None:
    """Raise UserError where the attention or the hidden-state loss compares only layers that nothing trained reaches.

    student: also one without memory for its weights, as `dae check` has it.
    """
    if attention is not None:
        learns = maps_that_learn(student)
        refuse_useless_layers("attention", "the attention maps", attention, student, learns)
    if hidden is not None:
        learns = states_that_learn(student)
        refuse_useless_layers("hidden", "the output", hidden, student, learns)


def refuse_useless_layers(
    section: str, what: str, settings: LayersRecipe, student: Role, learns: dict[int, bool]
) -> None:
    """Raise UserError where none of a section's layers learns; one that is not known is taken to."""
    compared: Any = range(unwrapped(student.model).config.get_text_config().num_hidden_layers)
    shown: Any = "even"
    if settings.layers != "even":
        compared, shown = [ours for ours, _ in settings.layers], [list(pair) for pair in settings.layers]
    if not any(learns.get(layer, True) for layer in compared):
        raise UserError(
            f"{section}.layers: {shown}: nothing of the student that trains comes before {what} of these layers, so "
            f"this loss is constant and does nothing; choose later layers or other lora.target_modules, or remove "
            f"`{section}`"
        )


def maps_that_learn(student: Role) -> dict[int, bool]:
    """Layer -> whether its attention map depends on something that trains."""
    learns: dict[int, bool] = {}

    def note(module: nn.Module, inputs: AttentionInputs, _value: Tensor, _output: Tensor) -> None:
        learns[getattr(module, "layer_idx", -1)] = inputs.query_BHTC.requires_grad or inputs.key_BKTC.requires_grad

    with observed_attention([student.model], note):
        run_briefly(student)
    return learns


def states_that_learn(student: Role) -> dict[int, bool]:
    """Layer -> whether its output depends on something that trains."""
    learns: dict[int, bool] = {}

    def note(layer: int, output: Any) -> None:
        learns[layer] = (output[0] if isinstance(output, tuple) else output).requires_grad

    handles = [
        layer.register_forward_hook(lambda _module, _args, output, place=place: note(place, output))
        for place, layer in enumerate(decoder_layers(student))
    ]
    try:
        run_briefly(student)
    finally:
        for handle in handles:
            handle.remove()
    return learns


def run_briefly(student: Role) -> None:
    """A few tokens through the student, so that autograd tells what depends on what."""
    device = student.model.device
    inputs = {"input_ids": torch.arange(TOKENS, device=device)[None]}
    with speaking_as(student) as model, torch.enable_grad():
        if device.type == "meta":
            run_without_values(model, inputs)
        else:
            final_hidden_states(model, inputs)


def run_without_values(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The same where tensors have no values. Architectures that look at values on their way stop there."""
    base: Any = unwrapped(model)
    base.set_experts_implementation("batched_mm")  # the others count the tokens of each expert
    mask_11TT = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")  # a smaller one would be looked at
    try:
        final_hidden_states(model, {**inputs, "attention_mask": mask_11TT})
    except (RuntimeError, NotImplementedError):
        return
