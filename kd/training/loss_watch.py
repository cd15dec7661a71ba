"""Sees a loss or gradient norm that is not finite, or a loss that has exploded, before the optimizer takes the step.

Exploded: above EXPLODED times the larger of the first step's loss and log V, in nats per token. log V is the next-token
loss of a uniform guess over V tokens, and the most that forward KL can be from it. A student far above both has learnt
nothing from its rows, while an odd row in a small step, or a spike that passes, stays far below.

Each optimizer step reads two numbers from the device at once, loss and gradient norm of all processes: one wait more
than those of its micro-batches, which read the routes of their rows. An optimizer that steps inside of the backward
pass (LOMO, layer-wise GaLore) has changed its weights by then; the checkpoint that the message names has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from kd.models.sharding import whole

EXPLODED = 10.0


@dataclass(frozen=True)
class Fault:
    """Why a step must not be taken, in words; exploded: the loss is finite, and far too large."""

    words: str
    exploded: bool


def fault_of(loss: float, grad_norm: float, first_loss: float, vocabulary_rows: int) -> Fault | None:
    """What is wrong with a step, by its loss and gradient norm; None if nothing is."""
    if not math.isfinite(loss):
        return Fault(f"the loss is {loss:g}, not finite", exploded=False)
    if not math.isfinite(grad_norm):
        return Fault(f"the gradient norm is {grad_norm:g}, not finite (the loss is {loss:.4g})", exploded=False)
    limit = EXPLODED * max(first_loss, math.log(vocabulary_rows))
    if loss > limit:
        return Fault(f"the loss has exploded: {loss:.4g}, after {first_loss:.4g} at the first step", exploded=True)
    return None


class LossWatch(TrainerCallback, ExportableState):
    """What the criterion knows of the run so far; kept in checkpoints.

    first_loss: of the run's first step, None before it; highest_rate: the highest learning rate of a step so far.
    """

    def __init__(self) -> None:
        self.first_loss: float | None = None
        self.highest_rate = 0.0
        self._loss: Tensor | None = None  # of the optimizer step so far, on this rank

    def add(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def fault(
        self, grad_norm: Tensor | float, rate: float, vocabulary_rows: int, mean: Callable[[Tensor], Tensor]
    ) -> Fault | None:
        """What is wrong with the step that is about to be taken at this learning rate; every rank gets the same answer.

        mean: over the ranks.
        """
        assert self._loss is not None
        norm = whole(grad_norm) if isinstance(grad_norm, Tensor) else torch.tensor(grad_norm)
        both = torch.stack([self._loss.double(), norm.to(self._loss.device).double()])
        loss, norm_of_all = mean(both).tolist()
        self._loss = None
        self.highest_rate = max(self.highest_rate, rate)
        if self.first_loss is None:
            self.first_loss = loss
        return fault_of(loss, norm_of_all, self.first_loss, vocabulary_rows)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint of an earlier release has no state of this, and Trainer writes one only where it finds one."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # type: ignore[union-attr]

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        known: Mapping[str, Any] = {"first_loss": self.first_loss, "highest_rate": self.highest_rate}
        return {"args": {}, "attributes": dict(known)}
