"""The lines of a verdict, from paired documents: gap closed, retention, and the largest loss of a single task."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from dae_eval.comparing.pairing import Missing, Paired, PairedTask
from dae_eval.comparing.resampling import (
    Answers,
    gain,
    gap_closed,
    gap_difference,
    gap_documents_needed,
    gap_word,
    retention_ratio,
)
from dae_eval.comparing.statistics import (
    ALPHA,
    Estimate,
    Spread,
    Word,
    documents_needed,
    holm,
    loss_p,
    macro_difference,
    non_inferiority,
    spread,
)
from dae_eval.comparing.task_lines import NOTHING
from dae_eval.report import FloorLine, GapLine, RetentionLine, StudentDifference, StudentSummary, TaskLoss
from dae_eval.results import Unit

LEAST_DOCUMENTS = 60  # independent ones over the tasks of a line: no verdict rests on fewer
LEAST_OF_TASK = 30  # independent ones of a task that fails alone, or whose loss is ruled out


@dataclass(frozen=True)
class Criteria:
    """The bounds of a verdict. margin, max_task_loss: in points; allow_missing: names of tasks."""

    margin: float
    min_gap: float
    max_task_loss: float
    retention_only: bool
    allow_missing: Collection[str]
    seed: int


def summarise(answered: Paired, with_expert: Paired | None, name: str, criteria: Criteria) -> StudentSummary:
    """The lines for the student called `name`; None where it has no tasks for one.

    with_expert: the domain tasks as the gap closed needs them.
    """
    gap = None if with_expert is None or not with_expert.of("domain") else _gap_line(with_expert, name, criteria)
    retention = _retention_line(answered, name, criteria) if answered.of("general") else None
    floor = _floor_line(answered, name, criteria) if answered.of("general") or answered.of("domain") else None
    return StudentSummary(name, gap, retention, floor)


def overall(summary: StudentSummary) -> Word:
    """FAIL if a line fails, PASS if all pass."""
    words = [line.word for line in (summary.gap, summary.retention, summary.floor) if line is not None]
    if "FAIL" in words:
        return "FAIL"
    return "PASS" if all(word == "PASS" for word in words) else "INCONCLUSIVE"


def _gap_line(paired: Paired, student: str, criteria: Criteria) -> GapLine:
    tasks = paired.of("domain")
    answers, (base, expert, row) = _answers(tasks, (tasks[0].needed[0], "expert", student))
    closed = gap_closed(answers, base, expert, row, seed=criteria.seed)
    word = gap_word(closed, criteria.min_gap)
    reasons = _reasons(tasks, paired.missing, "domain", criteria, word)

    def needed(totals_K: Sequence[int | None] | None) -> int | None:
        defined = closed is not None
        return gap_documents_needed(answers, base, expert, row, criteria.min_gap, totals_K, defined=defined)

    documents, exhausted = _enough(needed, tasks) if word == "INCONCLUSIVE" else (None, False)
    return GapLine(
        word=_unless(reasons, word, tasks),
        gain=gain(answers, base, expert, seed=criteria.seed),
        closed=closed,
        minimum=criteria.min_gap,
        documents_needed=documents,
        exhausted=exhausted,
        same_weights=base == expert,
        reasons=reasons,
    )


def _enough(
    needed: Callable[[Sequence[int | None] | None], int | None], tasks: Sequence[PairedTask]
) -> tuple[int | None, bool]:
    """Documents per task that would decide; else whether only the tasks' sizes are in the way. needed: by totals."""
    documents = needed([task.result.total for task in tasks])
    return documents, documents is None and needed(None) is not None


def _retention_line(paired: Paired, student: str, criteria: Criteria) -> RetentionLine:
    tasks, margin = paired.of("general"), criteria.margin / 100
    answers, (reference, kept) = _answers(tasks, ("reference", student))
    spreads, shares, same = [_spread(task, student) for task in tasks], _shares(tasks), reference == kept
    difference = NOTHING if same else macro_difference(spreads, shares)
    word = non_inferiority(difference, margin)
    documents, exhausted = (
        _enough(lambda totals_K: documents_needed(spreads, margin, shares, totals_K), tasks)
        if word == "INCONCLUSIVE"
        else (None, False)
    )
    # Of a model against itself the difference is known without any document.
    explain = _incomplete if same else _reasons
    reasons = explain(tasks, paired.missing, "general", criteria, word)
    return RetentionLine(
        word=_unless(reasons, word, tasks),
        difference=_in_points(difference),
        margin=criteria.margin,
        documents_needed=documents,
        exhausted=exhausted,
        ratio=retention_ratio(answers, reference, kept, seed=criteria.seed),
        unit=_unit(tasks),
        reasons=reasons,
    )


def _floor_line(paired: Paired, student: str, criteria: Criteria) -> FloorLine:
    """Each task alone, benchmarks as a whole and each of their members; losses are Holm's over all of them."""
    limit = criteria.max_task_loss
    tasks = [*paired.of("general"), *paired.of("domain")]
    alone = [task for task in tasks if not task.result.benchmark]
    benchmarks: dict[tuple[str, str], list[PairedTask]] = {}
    for task in (task for task in tasks if task.result.benchmark):
        benchmarks.setdefault((task.result.group, task.result.benchmark), []).append(task)
    whole = [([task], task.result.task) for task in alone]
    whole += [(members, name) for (_, name), members in benchmarks.items()]
    members = [([task], task.result.task) for of in benchmarks.values() for task in of]
    losses = [_loss(of, name, student, limit / 100) for of, name in (*whole, *members)]
    corrected = holm([loss.p for loss in losses])
    lost = [one for one, p in zip(losses, corrected, strict=True) if p < ALPHA / 2 and one.documents >= LEAST_OF_TASK]
    # Members are too small to rule a loss out one by one; they are undecided if they lost more all the same.
    suspect = [one for one in losses[: len(whole)] if not _is_ruled_out(one, limit)]
    suspect += [one for one in losses[len(whole) :] if one.difference.high < -limit]
    undecided = [one for one in suspect if one not in lost]
    word: Word = "FAIL" if lost else "INCONCLUSIVE" if undecided else "PASS"
    # Where there is a gap line, that one has the reasons of the domain tasks.
    reasons = (
        _incomplete(paired.of("domain"), paired.missing, "domain", criteria, word) if criteria.retention_only else ()
    )
    worst = min(losses[: len(whole)], key=lambda loss: loss.difference.value)
    return FloorLine(
        "INCONCLUSIVE" if word == "PASS" and reasons else word, limit, worst, tuple(lost), tuple(undecided), reasons
    )


def _is_ruled_out(loss: TaskLoss, limit: float) -> bool:
    """Whether a loss beyond the limit is ruled out."""
    return loss.difference == NOTHING or (loss.difference.low > -limit and loss.documents >= LEAST_OF_TASK)


def _loss(tasks: Sequence[PairedTask], name: str, student: str, limit: float) -> TaskLoss:
    other, n, unit = tasks[0].needed[0], _independent(tasks), _unit(tasks)
    if tasks[0].same[other] == tasks[0].same[student]:
        return TaskLoss(name, other, n, NOTHING, 1.0, None, unit=unit)
    spreads, shares = [_spread(task, student) for task in tasks], _shares(tasks)
    difference, documents, exhausted = macro_difference(spreads, shares), None, False
    if non_inferiority(difference, limit) == "INCONCLUSIVE":
        documents, exhausted = _enough(lambda totals_K: documents_needed(spreads, limit, shares, totals_K), tasks)
    p = loss_p(spreads, limit, shares)
    return TaskLoss(name, other, n, _in_points(difference), p, documents, exhausted, unit)


def student_difference(answered: Paired, with_expert: Paired | None, other: str, *, seed: int) -> StudentDifference:
    """The student against another one. answered, with_expert: paired over both students."""
    general, domain = answered.of("general"), () if with_expert is None else with_expert.of("domain")
    gap, retention = None, None
    if _independent(domain) >= LEAST_DOCUMENTS:
        roles = (domain[0].needed[0], "expert", other, "student")
        answers, (base, expert, its, mine) = _answers(domain, roles)
        gap = gap_difference(answers, base, expert, its, mine, seed=seed)
        gap = NOTHING if its == mine and gap is not None else gap
    if _independent(general) >= LEAST_DOCUMENTS:
        same = general[0].same["student"] == general[0].same[other]
        spreads = [spread(task.scores["student"] - task.scores[other], task.clusters_D) for task in general]
        retention = NOTHING if same else _in_points(macro_difference(spreads, _shares(general)))
    missing = (*answered.missing, *(() if with_expert is None else with_expert.missing))
    left_out = dict.fromkeys(one.task for one in missing if one.kind != "shown")
    return StudentDifference(other, gap, retention, _unit(general), tuple(left_out))


def _answers(tasks: Sequence[PairedTask], roles: tuple[str, ...]) -> tuple[list[Answers], list[int]]:
    """One row for each different set of weights, and the rows of `roles`."""
    owners = [tasks[0].same[role] for role in roles]
    distinct = list(dict.fromkeys(owners))
    answers = [
        Answers(
            np.stack([task.scores[roles[owners.index(owner)]] for owner in distinct]),
            task.clusters_D,
            task.result.benchmark,
            task.result.share,
        )
        for task in tasks
    ]
    return answers, [distinct.index(owner) for owner in owners]


def _spread(task: PairedTask, student: str) -> Spread:
    return spread(task.scores[student] - task.scores[task.needed[0]], task.clusters_D)


def _shares(tasks: Sequence[PairedTask]) -> list[float]:
    return [task.result.share for task in tasks]


def _in_points(difference: Estimate) -> Estimate:
    return Estimate(100 * difference.value, 100 * difference.low, 100 * difference.high)


def _unit(tasks: Sequence[PairedTask]) -> Unit:
    units = {task.result.unit for task in tasks}
    return units.pop() if len(units) == 1 else "points"


def _reasons(
    tasks: Sequence[PairedTask], missing: Sequence[Missing], kind: str, criteria: Criteria, word: Word
) -> tuple[str, ...]:
    """Why a line cannot pass: missing tasks or documents that were not allowed by name, too few documents."""
    n, found = _independent(tasks), _incomplete(tasks, missing, kind, criteria, word)
    documents = f"{n} independent document{'' if n == 1 else 's'}"
    few = f"{documents}: too few for a verdict, which needs {LEAST_DOCUMENTS}"
    return (*found, few) if n < LEAST_DOCUMENTS else found


def _incomplete(
    tasks: Sequence[PairedTask], missing: Sequence[Missing], kind: str, criteria: Criteria, word: Word
) -> tuple[str, ...]:
    """Missing tasks and documents that were not allowed by name. word: of the line's figures alone."""

    def advice(name: str) -> str:
        return f"; to pass without it: --allow-missing {shlex.quote(name)}" if word == "PASS" else ""

    found = [
        f"task {one.task} was not answered by {' and '.join(one.roles)}{advice(one.task)}"
        for one in missing
        if one.kind == kind and one.task not in criteria.allow_missing
    ]
    found += [
        f"task {name}: {task.unpaired} of {task.unpaired + len(task.clusters_D)} documents were answered by only some "
        f"of {', '.join(task.needed)}{advice(name)}"
        for task, name in ((task, task.result.task) for task in tasks)
        if task.too_few and name not in criteria.allow_missing
    ]
    found += [
        f"task {task.result.task}: models with the same weights have different scores on {task.disagreeing} of "
        f"{len(task.clusters_D)} documents; evaluate them again"
        for task in tasks
        if task.contradictory
    ]
    return tuple(found)


def _independent(tasks: Sequence[PairedTask]) -> int:
    return sum(int(task.clusters_D.max()) + 1 for task in tasks)


def _unless(reasons: Sequence[str], word: Word, tasks: Sequence[PairedTask]) -> Word:
    """A line with reasons cannot pass, and cannot fail on too few documents."""
    too_few = _independent(tasks) < LEAST_DOCUMENTS
    return "INCONCLUSIVE" if reasons and (word == "PASS" or too_few) else word
