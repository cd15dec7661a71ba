"""report.md: the report as a section of a model card. Pipe tables, headings from ## on, no HTML, no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from dae_eval.rendering.headlines import compared_sentence, headlines
from dae_eval.rendering.wording import (
    LOSS_MARK,
    MARK,
    Column,
    against,
    benchmark_mark,
    benchmarks,
    clipped,
    clipped_start,
    columns,
    count,
    distances,
    documents,
    groups,
    kinds,
    loss_change,
    loss_value,
    mark,
    metrics,
    one_line,
    p_value,
    points,
    score,
    teachers,
    tests_used,
    without_seen,
)
from dae_eval.report import BenchmarkLine, Flip, Report, TaskLine

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
        "Losses": _losses(report),
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


def section(report: Report) -> str:
    """The verdict and the tasks, as a section of a model card."""
    return f"## Evaluation: {report.word}\n\n{_verdict(report)}\n\n{_tasks(report)}"


def _verdict(report: Report) -> str:
    rows = [
        (name, line.measure, f"**{line.figure}**", line.interval, line.condition, line.word, line.remark)
        for name, summary in ((escape(one.name), one) for one in (report.student, *report.others))
        for line in headlines(summary)
    ]
    parts = [_table(("student", "measure", "value", "95 % interval", "condition", "verdict", "remark"), rows)]
    compared = (f"- Student minus {escape(one.other)}: {escape(compared_sentence(one))}" for one in report.compared)
    parts.append("\n".join(compared))
    if found := distances(report):
        parts.append(f"KL(reference \\|\\| student) in nats per response token: {escape(found)}.")
    return "\n\n".join([*filter(None, parts), f"Date: {report.date}."])


def _models(report: Report) -> str:
    rows = []
    for line in report.models:
        same = f"same weights as {escape(line.same_as)}" if line.same_as else ""
        rows.append((escape(line.role), escape(line.path), escape(line.fingerprint), same))
    return _table(("role", "checkpoint", "SHA-256", ""), rows)


def _tasks(report: Report) -> str:
    shown = columns(report)
    models = [escape(column.label) for column in shown]
    tested = ("difference (95 %)", "p", "p (Holm)", "won / lost", "same %", "detectable")
    head = ("task", "n", "chance", "majority", *models, *tested)
    parts = []
    for group, tasks in groups(report).items():
        rows = [_benchmark(line, shown) for line in benchmarks(report, group)]
        rows += [
            (
                escape(task.task),
                documents(task),
                score(task.chance),
                score(task.majority),
                *(score(column.value(task.scores), task.unit) for column in shown),
                f"{points(task.difference, unit=task.unit)} {escape(mark(task))}".rstrip(),
                p_value(task.p),
                p_value(task.p_holm),
                f"{count(task.wins)} / {count(task.losses)}",
                f"{100 * task.unchanged:.0f}",
                score(task.detectable, task.unit),
            )
            for task in tasks
        ]
        about = f"{kinds(tasks, report)}; student - {escape(against(tasks))}; {escape(metrics(tasks))}"
        title = f"**{escape(group)}** ({about})"
        remarks = "".join(f"\n- {remark}" for remark in _remarks(tasks, shown))
        parts.append(f"{title}\n\n{_table(head, rows, left=1)}" + (f"\n{remarks}" if remarks else ""))
    if parts:
        parts.append(
            "Scores in per cent, ratings from 1 to 10; differences in points or ratings with 95 % intervals. "
            f"n: documents, and their sources if they share some. p: {escape(tests_used(report))}. "
            f"{LOSS_MARK} loss, \\{MARK} gain: p < 0.05 after Holm's correction over all tasks. same: documents with "
            "the same score. detectable: the smallest true difference that n would have found with 80 % power."
        )
    return "\n\n".join(parts)


def _benchmark(line: BenchmarkLine, shown: Sequence[Column]) -> tuple[str, ...]:
    scores = (score(column.value(line.scores)) for column in shown)
    empty = ("",) * 5
    name = f"{escape(line.benchmark)} ({line.members} tasks)"
    change = f"{points(line.difference)} {escape(benchmark_mark(line))}".rstrip()
    return (name, count(line.n), "", "", *scores, change, *empty)


def _losses(report: Report) -> str:
    """Tasks that are losses: lower is better."""
    shown = columns(report)
    head = ("task", "unit", "n", *(escape(column.label) for column in shown), "student - other (95 %)", "p (Holm)")
    rows = []
    for line in report.losses:
        values = [column.value(line.values) for column in shown]
        cells = ("" if value is None else loss_value(line, value) for value in values)
        change = f"{loss_change(line)}, against {escape(line.against)}"
        rows.append((escape(line.task), line.unit, count(line.n), *cells, change, p_value(line.p_holm)))
    table = _table(head, rows, left=2)
    return f"Lower is better; they count in no line of the verdict.\n\n{table}" if rows else ""


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
