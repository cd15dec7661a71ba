"""Gap closed and retention as a ratio: the same documents resampled for all models at once.

Intervals are two-sided 95 % percentile intervals of a paired bootstrap. Within each task the clusters are drawn with
replacement, for all models at once. Two things keep them honest where there is little to draw from. The percentiles are
expanded to what Student's t asks for (Hesterberg 2015, "What teachers should know about the bootstrap", 5.3). And in
the task where it matters most each model is given two documents more, one that it wins and one that it loses, so that
any two models differ in as much as `statistics.spread` adds. Legend: M models, D documents and G clusters of a task,
K tasks, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from dae_eval.comparing.statistics import (
    LEAST_DEGREES,
    Estimate,
    Floats,
    Ints,
    Spread,
    Word,
    degrees_of_freedom,
    documents_needed,
    in_parts,
    spread,
    t_quantile,
)

RESAMPLES = 4000


@dataclass(frozen=True)
class Answers:
    """Scores of several models on the documents of one task, scores_MD[m, i] on 0..1, and the documents' clusters.

    Each row has different weights; roles with the same weights share a row. score: the benchmark that the task is
    a member of, which counts as one score (empty: the task itself); share: the task's weight in it.
    """

    scores_MD: Floats
    clusters_D: Ints
    score: str = ""
    share: float = 1.0


def gain(tasks: Sequence[Answers], base: int, expert: int, *, seed: int = 0) -> Estimate:
    """The gap with its interval: sum over scores of (expert - base). base, expert: rows."""
    if base == expert:
        return Estimate(0.0, 0.0, 0.0)
    value, most = _summed(tasks, base, expert), sum(task.share for task in tasks)
    tail = _tail(tasks, base, expert)
    if tail is None:
        return Estimate(value, -most, most)
    means = _resampled_means(tasks, seed)
    found = _estimate(value, _over_tasks(tasks, means[expert] - means[base]), tail)
    return Estimate(value, max(found.low, -most), min(found.high, most))


def gap_closed(tasks: Sequence[Answers], base: int, expert: int, student: int, *, seed: int = 0) -> Estimate | None:
    """sum over tasks of (student - base) / sum over tasks of (expert - base): 1 is all of the expert's gain.

    None ("undefined") if the expert's gain is not clearly above 0, that is, if its interval reaches 0 or below.
    """
    if base == expert:
        return None
    return gap_difference(tasks, base, expert, base, student, seed=seed)


def gap_difference(
    tasks: Sequence[Answers], base: int, expert: int, other: int, student: int, *, seed: int = 0
) -> Estimate | None:
    """How much more of the gap a student closed than another one: sum of (student - other) / sum of (expert - base).

    None as in `gap_closed`.
    """
    tail = None if base == expert else _tail(tasks, base, expert)
    if tail is None:
        return None
    means = _resampled_means(tasks, seed)
    gained_R = _over_tasks(tasks, means[expert] - means[base])
    if _estimate(0.0, gained_R, tail).low <= 0:
        return None
    taken_R = _over_tasks(tasks, means[student] - means[other])
    # Resamples without a gain are fewer than the percentile cuts off; they count as an infinity of their sign.
    ratios_R = np.divide(taken_R, gained_R, out=np.copysign(np.inf, taken_R), where=gained_R > 0)
    return _estimate(_summed(tasks, other, student) / _summed(tasks, base, expert), ratios_R, tail)


def gap_word(closed: Estimate | None, minimum: float) -> Word:
    """PASS: the whole interval is above `minimum`; FAIL: none of it is; INCONCLUSIVE: otherwise, and if undefined."""
    if closed is None:
        return "INCONCLUSIVE"
    if closed.low > minimum:
        return "PASS"
    return "FAIL" if closed.high <= minimum else "INCONCLUSIVE"


def gap_documents_needed(
    tasks: Sequence[Answers],
    base: int,
    expert: int,
    student: int,
    minimum: float,
    totals_K: Sequence[int | None] | None = None,
    *,
    defined: bool,
) -> int | None:
    """Documents per task (as in `documents_needed`) that would decide whether more than `minimum` of the gap is closed.

    That is whether the sum of (student - base) - minimum x (expert - base) is above 0; if the gap is not `defined`,
    also whether that of (expert - base) is. None if no number would, as when the expert did not gain at all.
    """
    if _summed(tasks, base, expert) <= 0:
        return None
    shares, gained = [task.share for task in tasks], [_contrast(task, base, expert) for task in tasks]
    beyond = [
        spread(task.scores_MD[student] - task.scores_MD[base] - minimum * difference, task.clusters_D)
        for task, difference in ((task, task.scores_MD[expert] - task.scores_MD[base]) for task in tasks)
    ]
    needed = [
        documents_needed(spreads, 0.0, shares, totals_K) for spreads in ([beyond] if defined else [beyond, gained])
    ]
    return None if None in needed else max(n for n in needed if n is not None)


def retention_ratio(tasks: Sequence[Answers], reference: int, student: int, *, seed: int = 0) -> Estimate | None:
    """100 x macro-mean over scores of student score / reference score.

    None if the reference scores 0, or so close to it that the ratio has no upper bound, or with a single cluster.
    """
    observed = np.stack([task.scores_MD.mean(axis=1) for task in tasks], axis=1)[:, :, None]
    kept, whole = (_by_score(tasks, observed[model]) for model in (student, reference))
    if (whole <= 0).any():
        return None
    value = 100 * float((kept / whole).mean())
    if reference == student:
        return Estimate(value, value, value)
    tail = _tail(tasks, reference, student)
    if tail is None:
        return None
    means = _resampled_means(tasks, seed)
    kept_SR, whole_SR = (_by_score(tasks, means[model]) for model in (student, reference))
    ratios_SR = np.divide(kept_SR, whole_SR, out=np.full_like(kept_SR, np.inf), where=whole_SR > 0)
    found = _estimate(value, 100 * ratios_SR.mean(axis=0), tail)
    return Estimate(value, max(found.low, 0.0), found.high) if np.isfinite(found.high) else None


def _by_score(tasks: Sequence[Answers], means_KR: Floats) -> Floats:
    """[S, R]: a row for each score, the shares' sum of its tasks."""
    members: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        members.setdefault(task.score or f"task {place}", []).append(place)
    return np.stack([_over_tasks([tasks[place] for place in of], means_KR[of]) for of in members.values()])


def _over_tasks(tasks: Sequence[Answers], values_KR: Floats) -> Floats:
    """[R]: the sum over tasks, each times its share."""
    summed: Floats = np.array([task.share for task in tasks]) @ values_KR
    return summed


def _summed(tasks: Sequence[Answers], other: int, model: int) -> float:
    """The sum over scores of (model - other), as observed."""
    return sum(task.share * _contrast(task, other, model).mean for task in tasks)


def _contrast(task: Answers, other: int, model: int) -> Spread:
    return spread(task.scores_MD[model] - task.scores_MD[other], task.clusters_D)


def _tail(tasks: Sequence[Answers], other: int, model: int) -> float | None:
    """The probability that the expanded percentile interval leaves out at each end; None if it is unknown."""
    contrasts = [_contrast(task, other, model) for task in tasks]
    if any(task.degrees < LEAST_DEGREES for task in contrasts):
        return None
    variances = np.array([t.share**2 * one.variance for t, one in zip(tasks, contrasts, strict=True)])
    degrees = degrees_of_freedom(variances, np.array([task.degrees for task in contrasts]))
    return float(stats.norm.cdf(-t_quantile(degrees) * ((degrees + 1) / degrees) ** 0.5))


def _resampled_means(tasks: Sequence[Answers], seed: int) -> Floats:
    """Task means on joint resamples of the documents, [M, K, R]."""
    doubts = [_doubt(task) for task in tasks]
    weakest = int(
        np.argmax([(t.share / t.scores_MD.shape[1]) ** 2 * doubt for doubt, t in zip(doubts, tasks, strict=True)])
    )
    means = np.stack([_task_means(task, [seed, index]) for index, task in enumerate(tasks)], axis=1)
    drawn = np.random.default_rng([seed, len(tasks)]).poisson(1.0, size=(2, len(means), RESAMPLES))
    means[:, weakest] += doubts[weakest] ** 0.5 / 2 * (drawn[0] - drawn[1]) / tasks[weakest].scores_MD.shape[1]
    return means


def _doubt(task: Answers) -> float:
    pairs = combinations(range(len(task.scores_MD)), 2)
    return max((_contrast(task, one, other).doubt for one, other in pairs), default=0.0)


def _task_means(task: Answers, seed: Sequence[int]) -> Floats:
    """[M, R]. Clusters of equal scores and size are drawn as one kind: equivalent, and fast for 0/1 scores."""
    _, index_D = np.unique(task.clusters_D, return_inverse=True)
    columns = [np.bincount(index_D, weights=scores_D) for scores_D in (*task.scores_MD, np.ones(len(index_D)))]
    kinds_US, times_U = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(list(seed))
    clusters = int(times_U.sum())
    sums_RS = np.concatenate(
        [
            rng.multinomial(clusters, times_U / clusters, size=part) @ kinds_US
            for part in in_parts(RESAMPLES, len(times_U))
        ]
    )
    means: Floats = (sums_RS[:, :-1] / sums_RS[:, -1:]).T
    return means


def _estimate(value: float, resampled_R: Floats, tail: float) -> Estimate:
    low = np.quantile(resampled_R, tail, method="lower")
    high = np.quantile(resampled_R, 1 - tail, method="higher")
    return Estimate(float(value), float(low), float(high))
