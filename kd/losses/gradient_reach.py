"""Which layers a gradient can reach: a loss between layers is constant where nothing before them trains.

Example: an adapter on `down_proj` alone never changes the attention maps of the first layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.losses.attention import AttentionInputs, observed_attention
from kd.losses.hidden_states import decoder_layers
from kd.losses.layer_pairs import Layers
from kd.models.forward import final_hidden_states, unwrapped
from kd.models.roles import Role, activate

TOKENS = 8


def refuse_constant_losses(attention: Layers | None, hidden: Layers | None, student: Role) -> None:
    """Raise UserError where the attention or the hidden-state loss compares only layers that nothing trained reaches.

    student: also one without memory for its weights, as `dae check` has it.
    """
    if attention is not None:
        reached = attention_maps_with_gradient(student)
        refuse_constant_loss("attention", "the attention maps", attention, student, reached)
    if hidden is not None:
        reached = hidden_states_with_gradient(student)
        refuse_constant_loss("hidden", "the output", hidden, student, reached)


def refuse_constant_loss(section: str, what: str, layers: Layers, student: Role, reached: dict[int, bool]) -> None:
    """Raise UserError where a gradient reaches no layer of a section; one that was not observed counts as reached."""
    compared: Any = range(unwrapped(student.model).config.get_text_config().num_hidden_layers)
    shown: Any = "even"
    if layers != "even":
        compared, shown = [ours for ours, _ in layers], [list(pair) for pair in layers]
    if not any(reached.get(layer, True) for layer in compared):
        raise UserError(
            f"{section}.layers: {shown}: nothing of the student that trains comes before {what} of these layers, so "
            f"this loss is constant and does nothing; choose later layers or other lora.target_modules, or remove "
            f"`{section}`"
        )


def attention_maps_with_gradient(student: Role) -> dict[int, bool]:
    """Layer -> whether its attention map depends on something that trains."""
    reached: dict[int, bool] = {}

    def note(module: nn.Module, inputs: AttentionInputs, _value: Tensor, _output: Tensor) -> None:
        reached[getattr(module, "layer_idx", -1)] = inputs.query_BHTC.requires_grad or inputs.key_BKTC.requires_grad

    with observed_attention([student.model], note):
        run_on_a_few_tokens(student)
    return reached


def hidden_states_with_gradient(student: Role) -> dict[int, bool]:
    """Layer -> whether its output depends on something that trains."""
    reached: dict[int, bool] = {}

    def note(layer: int, output: Any) -> None:
        reached[layer] = (output[0] if isinstance(output, tuple) else output).requires_grad

    handles = [
        layer.register_forward_hook(lambda _module, _args, output, place=place: note(place, output))
        for place, layer in enumerate(decoder_layers(student))
    ]
    try:
        run_on_a_few_tokens(student)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def run_on_a_few_tokens(student: Role) -> None:
    """A forward pass over a few tokens, with gradients."""
    device = student.model.device
    inputs = {"input_ids": torch.arange(TOKENS, device=device)[None]}
    with activate(student) as model, torch.enable_grad():
        if device.type == "meta":
            run_without_values(model, inputs)
        else:
            final_hidden_states(model, inputs)


def run_without_values(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The same without values. Architectures whose forward pass reads values stop there."""
    base: Any = unwrapped(model)
    base.set_experts_implementation("batched_mm")  # the others count the tokens of each expert
    mask_11TT = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")  # a smaller one would be looked at
    try:
        final_hidden_states(model, {**inputs, "attention_mask": mask_11TT})
    except (RuntimeError, NotImplementedError):
        return
