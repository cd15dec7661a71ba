"""Gap closed and retention against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.real_pair_scores import Document, TaskScores, gain, gap_closed, paired, retention
from kd.errors import UserError


def scores(seed: int, **rates: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {task: (rng.random(200) < rate).astype(float) for task, rate in rates.items()}


def test_gap_closed_is_the_ratio_of_sums_over_tasks() -> None:
    base = {"a": np.array([0.0, 0, 0, 1]), "b": np.array([0.0, 1])}
    expert = {"a": np.array([1.0, 1, 1, 1]), "b": np.array([1.0, 1])}
    student = {"a": np.array([1.0, 1, 0, 1]), "b": np.array([0.0, 1])}
    base, expert, student = ({t: np.tile(s, 50) for t, s in model.items()} for model in (base, expert, student))
    closed = gap_closed(base, expert, student)
    assert closed is not None
    assert closed.value == pytest.approx((0.5 + 0) / (0.75 + 0.5))
    assert closed.low < closed.value < closed.high
    assert gain(base, expert).value == pytest.approx(1.25)


def test_the_same_documents_are_drawn_for_all_models() -> None:
    base, expert = scores(0, a=0.3, b=0.2), scores(1, a=0.8, b=0.9)
    closed = gap_closed(base, expert, expert)
    assert closed is not None
    assert (closed.value, closed.low, closed.high) == pytest.approx((1, 1, 1))
    none = gap_closed(base, expert, base)
    assert none is not None
    assert (none.value, none.low, none.high) == (0, 0, 0)
    kept = retention(base, base)
    assert kept is not None
    assert (kept.value, kept.low, kept.high) == pytest.approx((100, 100, 100))


def test_gap_is_undefined_unless_the_expert_clearly_gained() -> None:
    def flipped(gained: int, lost: int) -> dict[str, np.ndarray]:
        return {"a": np.r_[np.ones(gained), np.zeros(100 - gained), np.zeros(lost), np.ones(100 - lost)]}

    base = flipped(0, 0)
    assert gap_closed(base, base, base) is None
    assert gap_closed(base, flipped(12, 10), base) is None
    assert gap_closed(base, flipped(10, 40), base) is None
    assert gap_closed(base, flipped(40, 10), base) is not None


def test_gain_interval_matches_the_normal_theory_of_paired_differences() -> None:
    base, expert = scores(0, a=0.4, b=0.5), scores(1, a=0.6, b=0.9)
    variance = sum(np.var(expert[t] - base[t]) / 200 for t in ("a", "b"))
    interval = gain(base, expert)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_retention_is_a_mean_of_ratios() -> None:
    reference = {"a": np.array([1.0, 1, 0, 0]), "b": np.array([1.0, 1])}
    student = {"a": np.array([1.0, 0, 0, 0]), "b": np.array([1.0, 1])}
    kept = retention(reference, student)
    assert kept is not None
    assert kept.value == pytest.approx(100 * (0.5 + 1) / 2)
    assert retention({"a": np.zeros(4)}, {"a": np.ones(4)}) is None


def test_only_the_same_documents_are_paired() -> None:
    def task(*documents: Document) -> dict[str, TaskScores]:
        return {"a": TaskScores("a", "1", "acc", documents)}

    one, two = Document(0, "x", 1.0), Document(1, "y", 0.0)
    left, right = paired(task(one, two), task(Document(0, "x", 0.0), two))
    assert (left["a"].tolist(), right["a"].tolist()) == ([1, 0], [0, 0])
    with pytest.raises(UserError, match="task a"):
        paired(task(one, two), task(one))
    with pytest.raises(UserError, match="task a"):
        paired(task(one), task(Document(0, "changed", 1.0)))
    with pytest.raises(UserError, match="different tasks"):
        paired(task(one), {})
