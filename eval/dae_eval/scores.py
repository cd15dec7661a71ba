"""Two numbers on documents that all models answered: how much of the expert's gain was taken, how much was retained.

Scores are on 0..1, one per document: D documents of a task, M models, R resamples. Intervals are two-sided 95 %
percentile intervals of a paired bootstrap: the same documents are drawn, with replacement within each task, for all
models at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dae_eval.harness import TaskScores
from kd.errors import UserError

Scores = Mapping[str, NDArray[np.float64]]  # task -> [D]
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


def paired(*models: Mapping[str, TaskScores]) -> list[dict[str, NDArray[np.float64]]]:
    """Each model's scores by task, over the same documents in the same order. Raises UserError where those differ."""
    first = models[0]
    for other in models[1:]:
        if other.keys() != first.keys():
            raise UserError(f"scores of different tasks cannot be paired: {sorted(first.keys() ^ other.keys())}")
        for task, scores in first.items():
            if [(d.id, d.hash) for d in scores.documents] != [(d.id, d.hash) for d in other[task].documents]:
                raise UserError(f"task {task}: the models answered different documents; score all on the same files")
    return [{task: np.array([d.score for d in s.documents]) for task, s in model.items()} for model in models]


def gain(base: Scores, expert: Scores, *, seed: int = 0) -> Estimate:
    """sum over tasks of (expert - base), with its interval: the gap that a student can close."""
    means, resampled = _task_means((base, expert), seed)
    return _estimate(_gap(means), _gap(resampled))


def gap_closed(base: Scores, expert: Scores, student: Scores, *, seed: int = 0) -> Estimate | None:
    """sum over tasks of (student - base) / sum over tasks of (expert - base): 1 is all of the expert's gain.

    None ("undefined") where the expert's gain is not clearly above 0, that is, where its interval reaches 0 or below.
    """
    if gain(base, expert, seed=seed).low <= 0:
        return None
    means, resampled = _task_means((base, expert, student), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _gap(resampled[[0, 2]]) / _gap(resampled)
    return _estimate(_gap(means[[0, 2]]) / _gap(means), ratios)


def retention(reference: Scores, student: Scores, *, seed: int = 0) -> Estimate | None:
    """100 x macro-mean over tasks of student score / reference score. None where the reference scores 0 on a task."""
    means, resampled = _task_means((reference, student), seed)
    if (means[0] == 0).any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 100 * (resampled[1] / resampled[0]).mean(axis=0)
    return _estimate(100 * (means[1] / means[0]).mean(axis=0), ratios)


def _gap(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2 or more models, tasks, R] -> [R]: by how much the second model's sum over tasks exceeds the first's."""
    difference: NDArray[np.float64] = (means[1] - means[0]).sum(axis=0)
    return difference


def _task_means(models: Sequence[Scores], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Task means on the documents as they are, [M, tasks, 1], and on joint resamples of them, [M, tasks, R]."""
    rng = np.random.default_rng(seed)
    means, resampled = [], []
    for task in models[0]:
        scores_MD = np.stack([model[task] for model in models])
        n = scores_MD.shape[1]
        drawn_RD = rng.integers(n, size=(RESAMPLES, n))
        means.append(scores_MD.mean(axis=1, keepdims=True))
        resampled.append(np.stack([scores[drawn_RD].mean(axis=1) for scores in scores_MD]))
    return np.stack(means, axis=1), np.stack(resampled, axis=1)


def _estimate(value: NDArray[np.float64], resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value[0]), float(low), float(high))
