"""report.md: the report as a section of a model card. Pipe tables, headings from ## on, no HTML, no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from dae_eval.rendering.wording import (
    MARK,
    Column,
    against,
    clipped,
    clipped_start,
    columns,
    count,
    documents,
    groups,
    headlines,
    is_significant,
    kinds,
    one_line,
    p_value,
    points,
    score,
    teachers,
    tests_used,
    without_seen,
)
from dae_eval.report import Flip, Report, TaskLine

REGRESSIONS = 10  # shown, at most two of a task; report.json has all

# Characters with a meaning inside a line of Markdown or on a hub (links, mentions, formulas). An underscore between two
# letters has none and is not escaped, so that names of tasks stay readable in the raw file.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&$#!@{}]|(?<![^\W_])_|_(?![^\W_])|(?<=\w):(?=//)")
_LIST_START = re.compile(r"^(?:([-+=])|(\d+)([.)]))")


def escape(text: str) -> str:
    """The text as one line of Markdown without formatting or links."""
    escaped = _SPECIAL.sub(lambda match: f"\\{match[0]}", one_line(text)).replace("www.", "www\\.")
    return _LIST_START.sub(lambda match: f"{match[2] or ''}\\{match[1] or match[3]}", escaped)


def render(report: Report) -> str:
    """The file's text; empty sections are omitted."""
    sections = {
        f"Evaluation: {report.word}": _verdict(report),
        "Models": _models(report),
        "Tasks": _tasks(report),
        "Held-out responses": _held_out(report),
        "Regressions": _regressions(report),
        "Notes": "\n".join(f"- {escape(clipped(note, 600))}" for note in report.notes),
        "Provenance": _table(("what", "value"), ((escape(what), escape(value)) for what, value in report.provenance)),
    }
    return "\n".join(
        f"{'##' if number == 0 else '###'} {title}\n\n{content}\n"
        for number, (title, content) in enumerate(sections.items())
        if content
    )


def _verdict(report: Report) -> str:
    rows = [
        (name, line.measure, f"**{line.figure}**", line.interval, line.condition, line.word, line.remark)
        for name, summary in ((escape(one.name), one) for one in (report.student, *report.others))
        for line in headlines(summary)
    ]
    return _table(("student", "measure", "value", "95 % interval", "condition", "verdict", "remark"), rows)


def _models(report: Report) -> str:
    rows = []
    for line in report.models:
        same = f"same weights as {escape(line.same_as)}" if line.same_as else ""
        rows.append((escape(line.role), escape(line.path), escape(line.fingerprint[:16]), same))
    return _table(("role", "checkpoint", "fingerprint", ""), rows)


def _tasks(report: Report) -> str:
    shown = columns(report)
    models = [escape(column.label) for column in shown]
    tested = ("difference (95 %)", "p", "p (Holm)", "won / lost", "detectable")
    head = ("task", "n", "chance", "majority", *models, *tested)
    parts = []
    for group, tasks in groups(report).items():
        rows = [
            (
                escape(task.task),
                documents(task),
                score(task.chance),
                score(task.majority),
                *(score(column.value(task.scores)) for column in shown),
                points(task.difference) + (f" \\{MARK}" if is_significant(task) else ""),
                p_value(task.p),
                p_value(task.p_holm),
                f"{count(task.wins)} / {count(task.losses)}",
                score(task.detectable),
            )
            for task in tasks
        ]
        title = f"**{escape(group)}** ({kinds(tasks, report)}; student - {escape(against(tasks))})"
        remarks = "".join(f"\n- {remark}" for remark in _remarks(tasks, shown))
        parts.append(f"{title}\n\n{_table(head, rows, left=1)}" + (f"\n{remarks}" if remarks else ""))
    if parts:
        parts.append(
            "Scores in per cent, differences in points with 95 % intervals. n: documents, and their sources if they "
            f"share some. p: {escape(tests_used(report))}. \\{MARK}: p < 0.05 after Holm's correction over all "
            "tasks. detectable: the smallest true difference that n would have found with 80 % power."
        )
    return "\n\n".join(parts)


def _remarks(tasks: Sequence[TaskLine], shown: Sequence[Column]) -> Iterator[str]:
    for task in tasks:
        if task.unpaired:
            yield f"{escape(task.task)}: {count(task.unpaired)} documents that only some models answered are left out"
        if task.seen:
            without = escape(without_seen(task, shown))
            yield f"{escape(task.task)}: {count(task.seen)} of {count(task.n)} also in training rows; {without}"


def _held_out(report: Report) -> str:
    head = ("route", "model", "tokens", "loss", *(f"KL({escape(role)} \\|\\| model)" for role in teachers(report)))
    rows = [
        (
            escape(line.route),
            escape(line.model),
            count(line.tokens),
            f"{line.loss:.4f}",
            *(f"{line.kl[role]:.4f}" if role in line.kl else "" for role in teachers(report)),
        )
        for line in report.held_out
    ]
    table = _table(head, rows, left=2)
    return f"Nats per response token, teacher-forced.\n\n{table}" if rows else ""


def _regressions(report: Report) -> str:
    worse = [flip for flip in report.flips if flip.change < 0]
    if not worse:
        return ""
    head = ("document", "prompt", "expected", "compared with", "student")
    better = count(len(report.flips) - len(worse))
    title = f"{count(len(worse))} documents became worse, {better} better. The worst of each task:"
    return f"{title}\n\n{_table(head, map(_regression, _worst(worse)), left=len(head))}"


def _worst(worse: Sequence[Flip]) -> list[Flip]:
    taken: dict[str, int] = {}
    chosen: list[Flip] = []
    for flip in worse:
        taken[flip.task] = taken.get(flip.task, 0) + 1
        if taken[flip.task] <= 2 and len(chosen) < REGRESSIONS:
            chosen.append(flip)
    return chosen


def _regression(flip: Flip) -> tuple[str, ...]:
    answers = (
        f"{role}: {clipped(one_line(flip.answers.get(role, '')), 160) or '(nothing)'}"
        for role in (flip.against, "student")
    )
    return (
        escape(f"{flip.task} {flip.id}") + (" (in training rows)" if flip.seen else ""),
        escape(clipped_start(one_line(flip.prompt), 240)),
        escape(clipped(one_line(flip.target), 160)),
        *map(escape, answers),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A pipe table, empty without rows; columns from `left` on are aligned right."""
    body = list(rows)
    if not body:
        return ""
    left = len(head) if left is None else left
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
