"""Scores and losses in the units that a reader is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dae_eval.results import SCORES, TaskResult, Unit

FULL_SCALE: Mapping[Unit, float] = {"points": 100, "rating": 10}  # what a score of 1 is shown as
PERPLEXITIES: tuple[Unit, ...] = ("byte perplexity", "word perplexity")
_LARGEST = 700.0  # nats whose exponential is still a number


def shown(mean: float, unit: Unit) -> float:
    """A mean, as in `TaskResult`, in the unit that a reader is shown."""
    if unit in PERPLEXITIES:
        return math.exp(mean) if mean < _LARGEST else math.inf
    return FULL_SCALE.get(unit, 1) * mean


def in_unit(result: TaskResult) -> float:
    """The mean of a task in its unit."""
    return shown(result.mean, result.unit)


def benchmark_score(members: Sequence[TaskResult]) -> float | None:
    """The score of a benchmark in the unit of its members; None if they have several."""
    if len({member.unit for member in members}) > 1:
        return None
    return sum(member.share * in_unit(member) for member in members)


def as_text(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit in SCORES else f"{value:.3f}"
