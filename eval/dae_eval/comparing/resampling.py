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

    Each row has different weights; roles with the same weights share a row.
    """

    scores_MD: Floats
    clusters_D: Ints


def gain(tasks: Sequence[Answers], base: int, expert: int, *, seed: int = 0) -> Estimate:
    """The gap with its interval: sum over tasks of (expert - base). base, expert: rows."""
    if base == expert:
        return Estimate(0.0, 0.0, 0.0)
    contrasts = [_contrast(task, base, expert) for task in tasks]
    value = sum(task.mean for task in contrasts)
    tail = _tail(contrasts)
    if tail is None:
        return Estimate(value, -float(len(tasks)), float(len(tasks)))
    means = _resampled_means(tasks, seed)
    return _estimate(value, (means[expert] - means[base]).sum(axis=0), tail)


def gap_closed(tasks: Sequence[Answers], base: int, expert: int, student: int, *, seed: int = 0) -> Estimate | None:
    """sum over tasks of (student - base) / sum over tasks of (expert - base): 1 is all of the expert's gain.

    None ("undefined") if the expert's gain is not clearly above 0, that is, if its interval reaches 0 or below.
    """
    if base == expert:
        return None
    gained, taken = ([_contrast(task, base, model) for task in tasks] for model in (expert, student))
    tail = _tail(gained)
    if tail is None:
        return None
    means = _resampled_means(tasks, seed)
    gained_R = (means[expert] - means[base]).sum(axis=0)
    if _estimate(0.0, gained_R, tail).low <= 0:
        return None
    taken_R = (means[student] - means[base]).sum(axis=0)
    # Resamples without a gain are fewer than the percentile cuts off; they count as an infinity of their sign.
    ratios_R = np.divide(taken_R, gained_R, out=np.copysign(np.inf, taken_R), where=gained_R > 0)
    return _estimate(sum(task.mean for task in taken) / sum(task.mean for task in gained), ratios_R, tail)


def gap_word(closed: Estimate | None, minimum: float) -> Word:
    """PASS: the whole interval is above `minimum`; FAIL: none of it is; INCONCLUSIVE: otherwise, and if undefined."""
    if closed is None:
        return "INCONCLUSIVE"
    if closed.low > minimum:
        return "PASS"
    return "FAIL" if closed.high <= minimum else "INCONCLUSIVE"


def gap_documents_needed(
    tasks: Sequence[Answers], base: int, expert: int, student: int, minimum: float, *, defined: bool
) -> int | None:
    """Documents per task (as in `documents_needed`) that would decide whether more than `minimum` of the gap is closed.

    That is whether the sum of (student - base) - minimum x (expert - base) is above 0; if the gap is not `defined`,
    also whether that of (expert - base) is. None if no number would, as when the expert did not gain at all.
    """
    gained = [_contrast(task, base, expert) for task in tasks]
    if sum(task.mean for task in gained) <= 0:
        return None
    beyond = [
        spread(task.scores_MD[student] - task.scores_MD[base] - minimum * difference, task.clusters_D)
        for task, difference in ((task, task.scores_MD[expert] - task.scores_MD[base]) for task in tasks)
    ]
    needed = [documents_needed(beyond, 0.0)] + ([] if defined else [documents_needed(gained, 0.0)])
    return None if None in needed else max(n for n in needed if n is not None)


def retention_ratio(tasks: Sequence[Answers], reference: int, student: int, *, seed: int = 0) -> Estimate | None:
    """100 x macro-mean over tasks of student score / reference score.

    None if the reference scores 0 on a task, or so close to it that the ratio has no upper bound.
    """
    if any(task.scores_MD[reference].mean() <= 0 for task in tasks):
        return None
    value = 100 * float(np.mean([t.scores_MD[student].mean() / t.scores_MD[reference].mean() for t in tasks]))
    if reference == student:
        return Estimate(value, value, value)
    tail = _tail([_contrast(task, reference, student) for task in tasks])
    if tail is None:
        return None
    means = _resampled_means(tasks, seed)
    ratios_KR = np.divide(
        means[student], means[reference], out=np.full_like(means[student], np.inf), where=means[reference] > 0
    )
    found = _estimate(value, 100 * ratios_KR.mean(axis=0), tail)
    return found if np.isfinite(found.high) else None


def _contrast(task: Answers, other: int, model: int) -> Spread:
    return spread(task.scores_MD[model] - task.scores_MD[other], task.clusters_D)


def _tail(contrasts: Sequence[Spread]) -> float | None:
    """The probability that the expanded percentile interval leaves out at each end; None if it is unknown."""
    if any(task.degrees < LEAST_DEGREES for task in contrasts):
        return None
    variances = np.array([task.variance for task in contrasts])
    degrees = degrees_of_freedom(variances, np.array([task.degrees for task in contrasts]))
    return float(stats.norm.cdf(-t_quantile(degrees) * ((degrees + 1) / degrees) ** 0.5))


def _resampled_means(tasks: Sequence[Answers], seed: int) -> Floats:
    """Task means on joint resamples of the documents, [M, K, R]."""
    doubts = [_doubt(task) for task in tasks]
    weakest = int(np.argmax([doubt / task.scores_MD.shape[1] ** 2 for doubt, task in zip(doubts, tasks, strict=True)]))
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
