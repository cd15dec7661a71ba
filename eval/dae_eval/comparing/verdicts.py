"""The lines of a verdict, from paired documents: gap closed, retention, and the largest loss of a single task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

LEAST_DOCUMENTS = 30  # independent ones over the tasks of a line: on fewer, no verdict rests


@dataclass(frozen=True)
class Asked:
    """What a verdict is about. margin, max_task_loss: in points; allowed: tasks that may be missing."""

    margin: float
    min_gap: float
    max_task_loss: float
    retention_only: bool
    allowed: Collection[str]
    seed: int


def summarise(answered: Paired, with_expert: Paired | None, name: str, asked: Asked) -> StudentSummary:
    """The lines for the student called `name`. with_expert: the domain tasks as the gap closed needs them."""
    gap = None if with_expert is None else _gap_line(with_expert, name, asked)
    return StudentSummary(name, gap, _retention_line(answered, name, asked), _floor_line(answered, name, asked))


def overall(summary: StudentSummary) -> Word:
    """FAIL if a line fails, PASS if all pass."""
    words = [line.word for line in (summary.gap, summary.retention, summary.floor) if line is not None]
    if "FAIL" in words:
        return "FAIL"
    return "PASS" if all(word == "PASS" for word in words) else "INCONCLUSIVE"


def _gap_line(paired: Paired, student: str, asked: Asked) -> GapLine:
    tasks = paired.of("domain")
    answers, (base, expert, row) = _answers(tasks, (tasks[0].needed[0], "expert", student))
    closed = gap_closed(answers, base, expert, row, seed=asked.seed)
    word, needed, reasons = gap_word(closed, asked.min_gap), None, _reasons(tasks, paired.missing, "domain", asked)
    if word == "INCONCLUSIVE":
        needed = gap_documents_needed(answers, base, expert, row, asked.min_gap, defined=closed is not None)
    return GapLine(
        word=_unless(reasons, word, tasks),
        gain=gain(answers, base, expert, seed=asked.seed),
        closed=closed,
        minimum=asked.min_gap,
        documents_needed=needed,
        documents_exist=_existing(tasks),
        same_weights=base == expert,
        reasons=reasons,
    )


def _retention_line(paired: Paired, student: str, asked: Asked) -> RetentionLine:
    tasks = paired.of("general")
    answers, (reference, kept) = _answers(tasks, ("reference", student))
    reasons, margin = _reasons(tasks, paired.missing, "general", asked), asked.margin / 100
    if reference == kept:  # known without any document
        reasons = _incomplete(tasks, paired.missing, "general", asked)
    spreads, shares = [_spread(task, student) for task in tasks], _shares(tasks)
    difference = NOTHING if reference == kept else macro_difference(spreads, shares)
    word = non_inferiority(difference, margin)
    needed = documents_needed(spreads, margin, shares) if word == "INCONCLUSIVE" else None
    return RetentionLine(
        word=_unless(reasons, word, tasks),
        difference=_in_points(difference),
        margin=asked.margin,
        documents_needed=needed,
        ratio=retention_ratio(answers, reference, kept, seed=asked.seed),
        documents_exist=_existing(tasks),
        unit=_unit(tasks),
        reasons=reasons,
    )


def _floor_line(paired: Paired, student: str, asked: Asked) -> FloorLine:
    """Each task alone, the members of benchmarks, and benchmarks as a whole; losses are Holm's over all of them."""
    limit = asked.max_task_loss / 100
    tasks = [*paired.of("general"), *paired.of("domain")]
    alone = [task for task in tasks if not task.result.benchmark]
    benchmarks: dict[tuple[str, str], list[PairedTask]] = {}
    for task in (task for task in tasks if task.result.benchmark):
        benchmarks.setdefault((task.result.group, task.result.benchmark), []).append(task)
    whole = [([task], task.result.task) for task in alone]
    whole += [(members, name) for (_, name), members in benchmarks.items()]
    members = [([task], task.result.task) for of in benchmarks.values() for task in of]
    losses = [_loss(of, name, student, limit) for of, name in (*whole, *members)]
    corrected = holm([loss.p for loss in losses])
    lost = [one for one, p in zip(losses, corrected, strict=True) if p < ALPHA and one.documents >= LEAST_DOCUMENTS]
    undecided = [one for one in losses[: len(whole)] if one not in lost and not _is_ruled_out(one, asked)]
    # With a gap line, it has the reasons of the domain tasks.
    reasons = _incomplete(paired.of("domain"), paired.missing, "domain", asked) if asked.retention_only else ()
    word: Word = "FAIL" if lost else "INCONCLUSIVE" if undecided or reasons else "PASS"
    worst = min(losses, key=lambda loss: loss.difference.value)
    return FloorLine(word, asked.max_task_loss, worst, tuple(lost), tuple(undecided), reasons)


def _is_ruled_out(loss: TaskLoss, asked: Asked) -> bool:
    """Whether a loss beyond the limit is ruled out."""
    same = loss.difference == NOTHING
    return same or (loss.difference.low > -asked.max_task_loss and loss.documents >= LEAST_DOCUMENTS)


def _loss(tasks: Sequence[PairedTask], name: str, student: str, limit: float) -> TaskLoss:
    other, n = tasks[0].needed[0], _independent(tasks)
    if tasks[0].same[other] == tasks[0].same[student]:
        return TaskLoss(name, other, n, NOTHING, 1.0, None)
    spreads, shares = [_spread(task, student) for task in tasks], _shares(tasks)
    difference, needed = macro_difference(spreads, shares), None
    if non_inferiority(difference, limit) == "INCONCLUSIVE":
        needed = documents_needed(spreads, limit, shares)
    return TaskLoss(name, other, n, _in_points(difference), loss_p(spreads, limit, shares), needed)


def student_difference(answered: Paired, with_expert: Paired | None, other: str, *, seed: int) -> StudentDifference:
    """The student against another one. answered, with_expert: paired over both students."""
    general, domain = answered.of("general"), () if with_expert is None else with_expert.of("domain")
    gap, retention = None, None
    if domain:
        roles = (domain[0].needed[0], "expert", other, "student")
        answers, (base, expert, its, mine) = _answers(domain, roles)
        gap = gap_difference(answers, base, expert, its, mine, seed=seed)
        gap = NOTHING if its == mine and gap is not None else gap
    if general:
        same = general[0].same["student"] == general[0].same[other]
        spreads = [spread(task.scores["student"] - task.scores[other], task.clusters_D) for task in general]
        retention = NOTHING if same else _in_points(macro_difference(spreads, _shares(general)))
    return StudentDifference(other, gap, retention)


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


def _existing(tasks: Sequence[PairedTask]) -> int | None:
    """The documents of the largest task; None if a task's are unknown."""
    totals = [task.result.total for task in tasks]
    return None if None in totals else max(total for total in totals if total is not None)


def _reasons(tasks: Sequence[PairedTask], missing: Sequence[Missing], kind: str, asked: Asked) -> tuple[str, ...]:
    """Why a line cannot pass: missing tasks or documents that were not allowed by name, too few documents."""
    n, found = _independent(tasks), _incomplete(tasks, missing, kind, asked)
    few = f"{n} independent documents are too few for a verdict: it needs {LEAST_DOCUMENTS}"
    return (*found, few) if n < LEAST_DOCUMENTS else found


def _incomplete(tasks: Sequence[PairedTask], missing: Sequence[Missing], kind: str, asked: Asked) -> tuple[str, ...]:
    """Missing tasks and documents that were not allowed by name."""
    found = [
        f"task {one.task} was not answered by {' and '.join(one.roles)}; to pass without it, --allow-missing {one.task}"
        for one in missing
        if one.kind == kind and one.task not in asked.allowed
    ]
    found += [
        f"task {name}: {task.unpaired} of {task.unpaired + len(task.clusters_D)} documents were answered by only some "
        f"of {', '.join(task.needed)}; to pass without them, --allow-missing {name}"
        for task, name in ((task, task.result.task) for task in tasks)
        if task.too_few and name not in asked.allowed
    ]
    return tuple(found)


def _independent(tasks: Sequence[PairedTask]) -> int:
    return sum(int(task.clusters_D.max()) + 1 for task in tasks)


def _unless(reasons: Sequence[str], word: Word, tasks: Sequence[PairedTask]) -> Word:
    """A line with reasons cannot pass, and cannot fail on too few documents."""
    too_few = _independent(tasks) < LEAST_DOCUMENTS
    return "INCONCLUSIVE" if reasons and (word == "PASS" or too_few) else word
