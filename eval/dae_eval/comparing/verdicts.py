"""The two lines of a verdict and the line of each task, from paired documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dae_eval.comparing.pairing import PairedTask
from dae_eval.comparing.resampling import Answers, gain, gap_closed, gap_documents_needed, gap_word, retention_ratio
from dae_eval.comparing.statistics import (
    Estimate,
    Floats,
    Word,
    detectable_difference,
    documents_needed,
    holm,
    macro_difference,
    non_inferiority,
    paired_difference,
    paired_test,
    spread,
)
from dae_eval.report import Flip, GapLine, RetentionLine, StudentSummary, TaskLine

NOTHING = Estimate(0.0, 0.0, 0.0)  # between a model and itself
_KINDS = ("general", "domain", "shown")


def summarise(
    tasks: Sequence[PairedTask], name: str, *, margin: float, min_gap: float, retention_only: bool, seed: int
) -> StudentSummary:
    """Both lines for the student called `name`. margin: in points."""
    domain = [task for task in tasks if task.result.kind == "domain"]
    general = [task for task in tasks if task.result.kind == "general"]
    gap = None if retention_only else _gap_line(domain, name, min_gap, seed)
    return StudentSummary(name, gap, _retention_line(general, name, margin, seed))


def overall(summary: StudentSummary) -> Word:
    """FAIL if a line fails, PASS if all pass."""
    words = [line.word for line in (summary.gap, summary.retention) if line is not None]
    if "FAIL" in words:
        return "FAIL"
    return "PASS" if all(word == "PASS" for word in words) else "INCONCLUSIVE"


def _gap_line(tasks: Sequence[PairedTask], student: str, minimum: float, seed: int) -> GapLine:
    answers, (base, expert, row) = _answers(tasks, ("base", "expert", student))
    gained = gain(answers, base, expert, seed=seed)
    closed = gap_closed(answers, base, expert, row, seed=seed)
    word = gap_word(closed, minimum)
    needed = None
    if word == "INCONCLUSIVE":
        needed = gap_documents_needed(answers, base, expert, row, minimum, defined=closed is not None)
    return GapLine(word, gained, closed, minimum, needed)


def _retention_line(tasks: Sequence[PairedTask], student: str, margin: float, seed: int) -> RetentionLine:
    answers, (reference, kept) = _answers(tasks, ("reference", student))
    ratio = retention_ratio(answers, reference, kept, seed=seed)
    if reference == kept:
        return RetentionLine("PASS", NOTHING, margin, None, ratio)
    spreads = [spread(task.scores[student] - task.scores["reference"], task.clusters_D) for task in tasks]
    difference = macro_difference(spreads)
    word = non_inferiority(difference, margin / 100)
    needed = documents_needed(spreads, margin / 100) if word == "INCONCLUSIVE" else None
    points = Estimate(100 * difference.value, 100 * difference.low, 100 * difference.high)
    return RetentionLine(word, points, margin, needed, ratio)


def _answers(tasks: Sequence[PairedTask], roles: tuple[str, ...]) -> tuple[list[Answers], list[int]]:
    """One row for each different set of weights, and the rows of `roles`."""
    owners = [tasks[0].same[role] for role in roles]
    distinct = list(dict.fromkeys(owners))
    answers = [Answers(np.stack([task.scores[role] for role in distinct]), task.clusters_D) for task in tasks]
    return answers, [distinct.index(owner) for owner in owners]


def task_lines(tasks: Sequence[PairedTask], *, seed: int) -> list[TaskLine]:
    """A line for each task: general tasks first, then the largest losses by group and task."""
    tested = [_test(task, seed) for task in tasks]
    corrected = holm([p for p, _ in tested])
    lines = [_task_line(*each) for each in zip(tasks, tested, corrected, strict=True)]
    worst: dict[tuple[str, str], float] = {}
    for line in lines:
        key = (line.kind, line.group)
        worst[key] = min(line.difference.value, worst.get(key, 1.0))
    return sorted(
        lines,
        key=lambda t: (_KINDS.index(t.kind), worst[(t.kind, t.group)], t.group, t.difference.value, t.task),
    )


def against(task: PairedTask) -> str:
    """The model that the student is compared with: `base` on domain tasks (if there is one), else `reference`."""
    return "base" if task.result.kind == "domain" and "base" in task.scores else "reference"


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

    def difference(chosen: np.typing.NDArray[np.bool_]) -> Estimate:
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
        unpaired=task.unpaired,
        seen=int(task.seen_D.sum()),
        unseen_scores=_means(task.scores, unseen) if some_seen else None,
        unseen_difference=difference(unseen) if some_seen else None,
    )


def _means(scores: Mapping[str, Floats], chosen: np.typing.NDArray[np.bool_]) -> dict[str, float]:
    return {role: float(scores_D[chosen].mean()) for role, scores_D in scores.items()}


def flips(tasks: Sequence[PairedTask]) -> list[Flip]:
    """Documents on which the student and the model it is compared with differ: worst regressions first.

    Ties: general tasks before domain tasks, then the task with the largest loss.
    """
    found = []
    for task in tasks:
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
                )
                found.append(((change, _KINDS.index(task.result.kind), lost, flip.task, flip.id), flip))
    return [flip for _, flip in sorted(found, key=lambda pair: pair[0])]
