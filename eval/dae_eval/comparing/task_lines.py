"""The line of each task, benchmark and loss, and the documents on which models differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dae_eval.comparing.pairing import PairedTask
from dae_eval.comparing.statistics import (
    LEAST_DEGREES,
    Estimate,
    Floats,
    Spread,
    detectable_difference,
    difference_p,
    holm,
    macro_difference,
    paired_difference,
    paired_test,
    spread,
    t_quantile,
)
from dae_eval.report import BenchmarkLine, Flip, LossLine, TaskLine

NOTHING = Estimate(0.0, 0.0, 0.0)  # between a model and itself
_KINDS = ("general", "domain", "shown")


def against(task: PairedTask) -> str:
    """The model that the student is compared with: `base` on domain tasks (if there is one), else `reference`."""
    return "base" if task.result.kind == "domain" and "base" in task.scores else "reference"


def task_lines(tasks: Sequence[PairedTask], *, seed: int) -> list[TaskLine]:
    """A line for each task: general tasks first, then the largest losses by group and task."""
    scored = [task for task in tasks if not task.result.is_loss]
    tested = [_test(task, seed) for task in scored]
    corrected = holm([p for p, _ in tested])
    lines = [_task_line(*each) for each in zip(scored, tested, corrected, strict=True)]
    worst: dict[tuple[str, str], float] = {}
    for line in lines:
        key = (line.kind, line.group)
        worst[key] = min(line.difference.value, worst.get(key, 1.0))
    return sorted(
        lines,
        key=lambda t: (_KINDS.index(t.kind), worst[(t.kind, t.group)], t.group, t.difference.value, t.task),
    )


def _test(task: PairedTask, seed: int) -> tuple[float, str]:
    other = against(task)
    if task.same[other] == task.same["student"]:
        return 1.0, "same weights"
    differences_D = task.scores["student"] - task.scores[other]
    return paired_test(differences_D, task.clusters_D, binary=_binary(task), seed=seed)


def _binary(task: PairedTask) -> bool:
    return all(bool(np.isin(scores_D, (0.0, 1.0)).all()) for scores_D in task.scores.values())


def _task_line(task: PairedTask, tested: tuple[float, str], p_holm: float) -> TaskLine:
    result, other = task.result, against(task)
    differences_D = task.scores["student"] - task.scores[other]
    one_model = task.same[other] == task.same["student"]
    unseen, everything = ~task.seen_D, np.ones_like(task.seen_D)
    some_seen = bool(task.seen_D.any() and unseen.any())

    def difference(chosen: NDArray[np.bool_]) -> Estimate:
        return NOTHING if one_model else paired_difference(differences_D[chosen], task.clusters_D[chosen])

    detectable = (
        None if one_model else detectable_difference(spread(differences_D, task.clusters_D), binary=_binary(task))
    )
    return TaskLine(
        task=result.task,
        group=result.group,
        kind=result.kind,
        metric=result.metric,
        n=len(differences_D),
        clusters=int(task.clusters_D.max()) + 1,
        chance=result.chance,
        majority=result.majority,
        scores=_means(task.scores, everything),
        against=other,
        difference=difference(everything),
        p=tested[0],
        p_holm=p_holm,
        test=tested[1],
        detectable=detectable,
        wins=int((differences_D > 0).sum()),
        losses=int((differences_D < 0).sum()),
        unchanged=float((differences_D == 0).mean()),
        unpaired=task.unpaired,
        seen=int(task.seen_D.sum()),
        unseen_scores=_means(task.scores, unseen) if some_seen else None,
        unseen_difference=difference(unseen) if some_seen else None,
        unit=result.unit,
        benchmark=result.benchmark,
    )


def _means(scores: Mapping[str, Floats], chosen: NDArray[np.bool_]) -> dict[str, float]:
    return {role: float(scores_D[chosen].mean()) for role, scores_D in scores.items()}


def benchmark_lines(tasks: Sequence[PairedTask]) -> list[BenchmarkLine]:
    """A line for each group of lm-eval, in the order of the tasks."""
    members: dict[tuple[str, str], list[PairedTask]] = {}
    for task in tasks:
        if task.result.benchmark and not task.result.is_loss:
            members.setdefault((task.result.group, task.result.benchmark), []).append(task)
    lines = [_benchmark_line(of) for of in members.values()]
    corrected = holm([line.p_holm for line in lines])
    return [replace(line, p_holm=p) for line, p in zip(lines, corrected, strict=True)]


def _benchmark_line(tasks: Sequence[PairedTask]) -> BenchmarkLine:
    first, other = tasks[0], against(tasks[0])
    shares = np.array([task.result.share for task in tasks])
    roles = [role for role in first.scores if all(role in task.scores for task in tasks)]
    scores = {role: float(np.average([t.scores[role].mean() for t in tasks], weights=shares)) for role in roles}
    spreads = [spread(task.scores["student"] - task.scores[other], task.clusters_D) for task in tasks]
    one_model, weights = first.same[other] == first.same["student"], [float(share) for share in shares]
    return BenchmarkLine(
        benchmark=first.result.benchmark,
        group=first.result.group,
        kind=first.result.kind,
        members=len(tasks),
        n=sum(len(task.clusters_D) for task in tasks),
        scores=scores,
        against=other,
        difference=NOTHING if one_model else macro_difference(spreads, weights),
        p_holm=1.0 if one_model else difference_p(spreads, weights),
    )


def loss_lines(tasks: Sequence[PairedTask]) -> list[LossLine]:
    """A line for each task that is a loss."""
    lines = [_loss_line(task) for task in tasks if task.result.is_loss]
    corrected = holm([line.p for line in lines])
    return [replace(line, p_holm=p) for line, p in zip(lines, corrected, strict=True)]


def _loss_line(task: PairedTask) -> LossLine:
    result, other = task.result, against(task)
    difference, p = weighted_difference(task.scores["student"] - task.scores[other], task.weights_D, task.clusters_D)
    if task.same[other] == task.same["student"]:
        difference, p = NOTHING, 1.0
    return LossLine(
        task=result.task,
        group=result.group,
        metric=result.metric,
        unit=result.unit,
        n=len(task.clusters_D),
        clusters=int(task.clusters_D.max()) + 1,
        values={role: float(np.average(values, weights=task.weights_D)) for role, values in task.scores.items()},
        against=other,
        difference=difference,
        p=p,
        p_holm=p,
    )


def weighted_difference(
    differences_D: Floats, weights_D: Floats, clusters_D: NDArray[np.int64]
) -> tuple[Estimate, float]:
    """The weighted mean difference with its interval, and the two-sided p of no difference, by Student's t.

    The variance is the cluster-robust one of a ratio of sums (linearised: Cochran 1977, 6.3). With a single cluster
    it is unknown: the interval is infinite, p is 1.
    """
    value = float(np.average(differences_D, weights=weights_D))
    influence_D = weights_D / weights_D.mean() * (differences_D - value)
    found: Spread = spread(influence_D, clusters_D)
    if found.degrees < LEAST_DEGREES:
        return Estimate(value, -np.inf, np.inf), 1.0
    error = (found.squares * (1 + 1 / found.degrees)) ** 0.5 / found.n
    half = t_quantile(found.degrees) * error
    p = 1.0 if error == 0 and value == 0 else 2 * float(stats.t.sf(abs(value) / max(error, 1e-300), found.degrees))
    return Estimate(value, value - half, value + half), p


def flips(tasks: Sequence[PairedTask]) -> list[Flip]:
    """Documents on which the student and the model it is compared with differ: worst regressions first.

    Ties: general tasks before domain tasks, then the task with the largest loss. Losses are left out: they differ on
    every document.
    """
    found = []
    for task in tasks:
        if task.result.is_loss:
            continue
        other = against(task)
        lost = float((task.scores["student"] - task.scores[other]).mean())
        for index, (mine, its) in enumerate(zip(task.documents["student"], task.documents[other], strict=True)):
            if mine.score != its.score:
                change = mine.score - its.score
                flip = Flip(
                    task=task.result.task,
                    group=task.result.group,
                    id=mine.id,
                    prompt=mine.prompt,
                    target=mine.target,
                    answers={other: its.answer, "student": mine.answer},
                    scores={other: its.score, "student": mine.score},
                    against=other,
                    change=change,
                    seen=bool(task.seen_D[index]),
                    unit=task.result.unit,
                )
                found.append(((change, _KINDS.index(task.result.kind), lost, flip.task, flip.id), flip))
    return [flip for _, flip in sorted(found, key=lambda pair: pair[0])]
