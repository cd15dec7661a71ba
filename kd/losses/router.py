"""The routers of a mixture of experts: what they decided in a forward pass, and the loss that keeps experts in use.

The loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6) is a mean over all tokens of a micro-batch, prompt and
response alike. So it has no part in the normaliser of response tokens: cut into other micro-batches, a step has another
one. It is a term of its own, logged alone.

Shape legend: B rows, T positions, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kd.errors import UserError
from kd.models.forward import unwrapped


def routers_of(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Every router of the model with the place of the logits among its outputs; none in a dense model."""
    base = unwrapped(model)
    recorded: Any = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
    if recorded is None:
        return []
    return [(module, recorded.index) for module in base.modules() if isinstance(module, recorded.target_class)]


def experts_per_token(model: nn.Module) -> int:
    return int(unwrapped(model).config.get_text_config().num_experts_per_tok)


def refuse_useless_router_loss(model: nn.Module, weight: float) -> None:
    """Raise UserError where a router loss is asked of a model without routers, or of one that uses every expert."""
    if weight == 0:
        return
    if not routers_of(model):
        raise UserError(
            f"router_aux_loss: {weight:g}: the student, a {type(unwrapped(model)).__name__}, is no mixture of experts "
            "with known routers; remove it"
        )
    config: Any = unwrapped(model).config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    if experts_per_token(model) == experts:
        raise UserError(
            f"router_aux_loss: {weight:g}: each token passes through all {experts} experts of this student, so it "
            "is constant and does nothing; remove it"
        )


@contextlib.contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The routers' logits [B * T, E], layer by layer, of what runs with gradient inside of it.

    Teachers that share the student's weights run without gradient, and are left out. With (non-reentrant) gradient
    checkpointing the recomputed forward pass comes in backward, after the recording.
    """
    logits: list[Tensor] = []

    def record(place: int, output: Any) -> None:
        if torch.is_grad_enabled():
            logits.append(output[place] if isinstance(output, tuple) else output)

    handles = [
        router.register_forward_hook(lambda _module, _args, output, place=place: record(place, output))
        for router, place in routers_of(model)
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(
    router_logits: Sequence[Tensor], per_token: int, attention_mask_BT: Tensor | None = None
) -> Tensor:
    """E * sum_e f_e P_e over all layers and tokens: per_token where experts are used alike, per_token * E at worst.

    f_e is the mean number of times that a token goes to expert e, P_e the mean probability that the router gives it.

    Args:
        router_logits: a tensor [B * T, E] for each layer.
        per_token: how many experts each token passes through.
        attention_mask_BT: 1 at tokens that count; None: all do.

    Returns:
        A float32 scalar. Only P_e carries a gradient.
    """
    loss = load_balancing_loss_func(
        tuple(router_logits),  # type: ignore[arg-type]  # it takes as many layers as there are
        router_logits[0].shape[-1],
        per_token,
        attention_mask_BT,
    )
    assert isinstance(loss, Tensor)
    return loss.float()
