"""Gap closed and retention against their definitions, and their intervals against simulation."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from dae_eval.comparing.resampling import Answers, gain, gap_closed, gap_documents_needed, gap_word, retention_ratio
from dae_eval.comparing.statistics import Estimate

BASE, EXPERT, STUDENT = 0, 1, 2


def answers(*models: np.ndarray, repeat: int = 1) -> Answers:
    """Documents that are their own clusters, each `repeat` times over."""
    scores = np.tile(np.array(models, dtype=float), repeat)
    return Answers(scores, np.arange(scores.shape[1]))


def simulated(rng: np.random.Generator, n: int, levels: tuple[float, ...], alike: float = 0.7) -> Answers:
    """0/1 scores at the given levels; a share `alike` of the answers depends on the document alone."""
    shared, own = rng.random(n), rng.random((len(levels), n))
    difficulty = np.where(rng.random((len(levels), n)) < alike, shared, own)
    return Answers((difficulty < np.array(levels)[:, None]).astype(float), np.arange(n))


def test_gap_closed_is_the_ratio_of_sums_over_tasks() -> None:
    a = answers([0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1], repeat=50)
    b = answers([0, 1], [1, 1], [0, 1], repeat=50)
    closed = gap_closed([a, b], BASE, EXPERT, STUDENT)
    assert closed is not None
    assert closed.value == pytest.approx((0.5 + 0) / (0.75 + 0.5))
    assert closed.low < closed.value < closed.high
    assert gain([a, b], BASE, EXPERT).value == pytest.approx(1.25)


def test_roles_with_the_same_weights_are_exactly_none_or_all_of_the_gap() -> None:
    task = answers(np.zeros(100), np.r_[np.ones(60), np.zeros(40)])
    assert gap_closed([task], BASE, EXPERT, EXPERT) == Estimate(1, 1, 1)
    assert gap_closed([task], BASE, EXPERT, BASE) == Estimate(0, 0, 0)
    assert gain([task], BASE, BASE) == Estimate(0, 0, 0)
    assert gap_closed([task], BASE, BASE, EXPERT) is None
    assert retention_ratio([task], EXPERT, EXPERT) == Estimate(100, 100, 100)


def test_other_weights_with_the_same_answers_are_not_certain_to_be_equal() -> None:
    right = np.r_[np.ones(60), np.zeros(40)]
    task = answers(np.zeros(100), right, right)
    closed = gap_closed([task], BASE, EXPERT, STUDENT)
    assert closed is not None
    assert closed.value == 1
    # Two documents of 100, over a gain of 60.
    assert 0.02 < closed.high - 1 < 0.08
    assert 0.02 < 1 - closed.low < 0.08
    ratio = retention_ratio([task], EXPERT, STUDENT)
    assert ratio is not None
    assert ratio.low < 100 < ratio.high


def test_gap_is_undefined_unless_the_expert_clearly_gained() -> None:
    def closed(gained: int, lost: int, n: int = 200) -> Estimate | None:
        expert = np.r_[np.ones(gained), np.zeros(n // 2 - gained), np.zeros(lost), np.ones(n // 2 - lost)]
        base = np.r_[np.zeros(n // 2), np.ones(n // 2)]
        return gap_closed([answers(base, expert, base)], BASE, EXPERT, STUDENT)

    assert closed(0, 0) is None
    assert closed(12, 10) is None
    assert closed(10, 40) is None
    assert closed(40, 10) is not None
    assert gap_closed([answers(np.zeros(2), np.ones(2), np.ones(2))], BASE, EXPERT, STUDENT) is None


def test_a_gain_that_is_hardly_one_makes_no_warnings() -> None:
    rng = np.random.default_rng(0)
    defined = 0
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for _ in range(60):
            task = simulated(rng, 60, (0.4, 0.6, 0.5))
            closed = gap_closed([task], BASE, EXPERT, STUDENT)
            ratio = retention_ratio([task], BASE, STUDENT)
            assert ratio is None or np.isfinite([ratio.low, ratio.high]).all()
            if closed is not None:
                defined += 1
                assert np.isfinite([closed.low, closed.high]).all()
                assert closed.low <= closed.value <= closed.high
    assert 10 < defined < 60


def test_gain_interval_matches_the_normal_theory_of_paired_differences() -> None:
    rng = np.random.default_rng(1)
    tasks = [simulated(rng, 400, (0.4, 0.6)), simulated(rng, 400, (0.5, 0.9))]
    variance = sum(np.var(task.scores_MD[1] - task.scores_MD[0]) / 400 for task in tasks)
    interval = gain(tasks, BASE, EXPERT)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.07)


def test_documents_of_a_cluster_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    alone = simulated(rng, 100, (0.4, 0.6))
    four_times = Answers(np.repeat(alone.scores_MD, 4, axis=1), np.repeat(alone.clusters_D, 4))
    one, other = gain([alone], BASE, EXPERT), gain([four_times], BASE, EXPERT)
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.05)


@pytest.mark.parametrize(
    ("tasks", "n", "base", "expert", "closed"),
    [(2, 20, 0.2, 0.8, 0.9), (3, 50, 0.3, 0.8, 0.0), (1, 200, 0.5, 0.65, 0.5), (4, 100, 0.5, 0.65, 1.0)],
)
def test_coverage_of_gain_and_gap_closed(
    tasks: int, n: int, base: float, expert: float, closed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dae_eval.comparing.resampling.RESAMPLES", 600)
    rng = np.random.default_rng(3)
    levels = (base, expert, base + closed * (expert - base))
    gains, gaps = [], []
    for trial in range(200):
        drawn = [simulated(rng, n, levels) for _ in range(tasks)]
        gains.append(gain(drawn, BASE, EXPERT, seed=trial))
        gaps.append(gap_closed(drawn, BASE, EXPERT, STUDENT, seed=trial))
    defined = [gap for gap in gaps if gap is not None]
    assert len(defined) > 150
    assert np.mean([g.low <= tasks * (expert - base) <= g.high for g in gains]) > 0.9
    assert np.mean([gap.low <= closed <= gap.high for gap in defined]) > 0.9


def test_retention_is_a_mean_of_ratios() -> None:
    tasks = [answers([1, 1, 0, 0], [1, 0, 0, 0], repeat=20), answers([1, 1], [1, 1], repeat=20)]
    kept = retention_ratio(tasks, 0, 1)
    assert kept is not None
    assert kept.value == pytest.approx(100 * (0.5 + 1) / 2)
    assert kept.low < kept.value < kept.high
    assert retention_ratio([answers(np.zeros(40), np.ones(40))], 0, 1) is None
    assert retention_ratio([answers(np.r_[1, np.zeros(39)], np.ones(40))], 0, 1) is None


def test_coverage_of_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dae_eval.comparing.resampling.RESAMPLES", 600)
    rng = np.random.default_rng(4)
    found = [retention_ratio([simulated(rng, 80, (0.6, 0.55)) for _ in range(3)], 0, 1, seed=i) for i in range(200)]
    assert np.mean([r is not None and r.low <= 100 * 0.55 / 0.6 <= r.high for r in found]) > 0.9


def test_words_of_the_gap() -> None:
    assert gap_word(Estimate(0.5, 0.2, 0.8), 0.1) == "PASS"
    assert gap_word(Estimate(0.5, 0.2, 0.8), 0.2) == "INCONCLUSIVE"
    assert gap_word(Estimate(0.0, -0.1, 0.0), 0.0) == "FAIL"
    assert gap_word(None, 0.0) == "INCONCLUSIVE"


def test_documents_that_would_decide_the_gap() -> None:
    def repeated(times: int) -> list[Answers]:
        return [answers([0] * 12 + [1] * 8, [1] * 6 + [0] * 9 + [1] * 5, [1] * 4 + [0] * 10 + [1] * 6, repeat=times)]

    assert gap_closed(repeated(1), BASE, EXPERT, STUDENT) is None
    needed = gap_documents_needed(repeated(1), BASE, EXPERT, STUDENT, 0.0, defined=False)
    assert needed is not None
    assert gap_word(gap_closed(repeated(needed // 20 + 3), BASE, EXPERT, STUDENT), 0.0) == "PASS"
    assert gap_word(gap_closed(repeated(needed // 30), BASE, EXPERT, STUDENT), 0.0) == "INCONCLUSIVE"
    never = [answers([1] * 10 + [0] * 10, [0] * 20, [1] * 20)]
    assert gap_documents_needed(never, BASE, EXPERT, STUDENT, 0.0, defined=False) is None
