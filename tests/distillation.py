"""What the tests of `dae distill` share: rows of one route, batches of them, and when gradients are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.batches import Batch, predicting_positions
from kd.data.mixing import collate
from kd.training.objective import Objective, route_sums

Row = dict[str, Any]


def make_rows(count: int = 6, seed: int = 0, shortest: int = 4) -> list[Row]:
    """Rows of `shortest` to 13 tokens; each ends in two response tokens, longer ones have a second response turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, 14, (), generator=generator))
        mask = [False] * length
        mask[length - 2] = mask[length - 1] = True
        if length > 8:
            mask[2] = mask[3] = True
        rows.append(
            {
                "input_ids": torch.randint(3, 280, (length,), generator=generator).numpy().astype(np.int32),
                "response_mask": np.array(mask),
                "route_id": 0,
            }
        )
    return rows


def as_batch(rows: Sequence[Row], packing: bool = False) -> dict[str, Tensor]:
    """Rows as the trainer sees them."""
    return collate(rows, pad_token_id=0, packing=packing)  # type: ignore[arg-type]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every gradient by name; they are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """No entry differs by more than this part of the largest. (Some architectures normalise in fp32.)"""
    assert a.keys() == b.keys() and a
    largest = max(float(gradient.abs().max()) for gradient in b.values())
    assert largest > 1e-4
    for name, gradient in a.items():
        assert float((gradient - b[name]).abs().max()) <= tolerance * largest, name


def step_loss(model: torch.nn.Module, batches: Sequence[Batch], objective: Objective) -> Tensor:
    """What the trainer does with the micro-batches of one optimizer step."""
    tokens_R = torch.stack([predicting_positions(batch).sum() for batch in batches]).sum().reshape(1)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        sums = route_sums(model, batch, objective, with_teachers=objective.routes[0].teacher is not None)
        loss = (objective.weights(tokens_R) * sums.loss).sum()
        loss.backward()
        total += loss.detach()
    return total
