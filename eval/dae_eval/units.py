"""Scores and losses in the units that a reader is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dae_eval.results import SCORES, TaskResult

_LARGEST = 700.0  # nats whose exponential is still a number


def in_unit(result: TaskResult) -> float:
    """The mean of a task in its unit."""
    if result.unit in SCORES:
        return result.mean * (100 if result.unit == "points" else 10)
    if result.unit in ("byte perplexity", "word perplexity"):
        return math.exp(result.mean) if result.mean < _LARGEST else math.inf
    return result.mean


def benchmark_score(members: Sequence[TaskResult]) -> float | None:
    """The score of a benchmark in the unit of its members; None if they have several."""
    if len({member.unit for member in members}) > 1:
        return None
    return sum(member.share * in_unit(member) for member in members)


def as_text(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit in SCORES else f"{value:.3f}"
