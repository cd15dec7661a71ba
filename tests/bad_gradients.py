"""A gradient that is NaN for the rows with a certain token, under a loss that is finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return torch.full_like(gradients[0], torch.nan)


@dataclass(frozen=True)
class NanGradients:
    """To be armed in the process of a run, like processes.Signal."""

    token: int

    def arm(self) -> None:
        from kd.training import objective

        real = objective._losses

        def losses(hidden_BTD: Tensor, model: Any, batch: Any, *more: Any) -> Any:
            if bool((batch["input_ids"] == self.token).any()):
                hidden_BTD = _NanGradient.apply(hidden_BTD)
            return real(hidden_BTD, model, batch, *more)

        setattr(objective, "_losses", losses)  # noqa: B010
