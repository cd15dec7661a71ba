"""The report in a terminal, verdict first, for 80 columns or another width."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dae_eval.rendering.headlines import Headline, compared_sentence, headlines
from dae_eval.rendering.wording import (
    LOSS_MARK,
    MARK,
    SIGNIFICANT,
    Column,
    against,
    benchmark_mark,
    benchmarks,
    change,
    clipped,
    clipped_start,
    columns,
    common_start,
    count,
    distances,
    groups,
    is_significant,
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
    without_seen,
)
from dae_eval.report import BenchmarkLine, Flip, Report, TaskLine

STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
REGRESSIONS = 4  # shown, of different tasks; the files hold all
NAMES_FROM, NAMES_TO = 14, 0.3  # columns for names of tasks: at least, and at most this share of the width
WHERE_ROOM_IS = 40  # columns of the task table from this rank on are shown only if there is room


def show(report: Report, console: Console) -> None:
    """Print the report. Text of models and users is printed without markup and control characters."""
    for part in (
        verdict(report, console),
        other_students(report),
        models(report),
        task_table(report, console.width),
        losses(report),
        held_out(report),
        regressions(report, console.width),
        notes(report),
    ):
        if part is not None:
            console.print(part)
            console.print()


def verdict(report: Report, console: Console) -> RenderableType:
    """The word in a frame, and its lines beside it, or below it if the terminal is too narrow."""
    style = STYLES[report.word]
    word = Panel(
        Text(report.word, style=f"bold {style}"), box=box.HEAVY, border_style=style, padding=(0, 2), expand=False
    )
    beside = console.width - len(report.word) - 8
    found = headlines(report.student)
    lines = Group(*(_headline(line, with_word=len(found) > 1) for line in found), *_distance(report))
    if beside < max((len(line.sentence) + 2 + len(line.word) for line in found), default=0):
        return Group(word, lines)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(word, lines)
    return grid


def _distance(report: Report) -> Iterator[Text]:
    if found := distances(report):
        yield Text(f"KL(reference || student) in nats per response token: {found}", style="dim")


def _headline(line: Headline, *, with_word: bool) -> Text:
    interval = f" ({line.interval})" if line.interval else ""
    text = Text.assemble((f"{line.measure} {line.figure}", "bold"), f"{interval}, {line.condition}")
    if with_word:
        text.append(f"  {line.word}", style=STYLES[line.word])
    if line.remark:
        text.append(f"\n  {line.remark}", style="dim")
    return text


def other_students(report: Report) -> RenderableType | None:
    texts = []
    for summary in report.others:
        text = Text(one_line(summary.name), style="bold")
        for line in headlines(summary):
            text.append(f"\n  {line.sentence}  ", style="not bold")
            text.append(line.word, style=f"not bold {STYLES[line.word]}")
            if line.word != "PASS" and line.remark:
                text.append(f"\n    {line.remark}", style="not bold dim")
        for compared in (one for one in report.compared if one.other == summary.name):
            text.append(f"\n  student minus {one_line(summary.name)}: {compared_sentence(compared)}", style="not bold")
        texts.append(text)
    return Group(Text("Other students", style="underline"), *texts) if texts else None


def models(report: Report) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(no_wrap=True)
    for line in report.models:
        same = f" = {line.same_as}" if line.same_as else ""
        grid.add_row(
            Text(one_line(line.role + same), style="bold"),
            Text(one_line(line.path)),
            Text(clipped(one_line(line.fingerprint), 13).rstrip("…"), style="dim"),
        )
    grid.add_row(Text("date", style="bold"), Text(report.date))
    return grid


@dataclass(frozen=True)
class Field:
    """A column of the task table. title: its lines. rank: columns of the highest rank are left out first."""

    name: str
    title: tuple[str, ...]
    rank: int
    cell: Callable[[TaskLine], str]


def task_table(report: Report, width: int) -> RenderableType | None:
    """One line per task, by group; columns that do not fit are named below."""
    if not report.tasks:
        return None
    start = common_start([one_line(task.task) for task in report.tasks])
    names = [one_line(task.task).removeprefix(start) for task in report.tasks]
    all_fields = _fields(report)
    name_width = min(max(map(cell_len, [*names, "task"])), _room_for_names(all_fields, report.tasks, width))
    fields, left_out = _fitting(all_fields, report.tasks, width - name_width)
    widths = {field.name: _width(field, report.tasks) for field in fields}
    lines: list[RenderableType] = list(_head(fields, widths, name_width))
    for group, tasks in groups(report).items():
        title = Text(one_line(group), style="bold")
        about = f"  {kinds(tasks, report)}, against {against(tasks)}; {metrics(tasks)}"
        title.append(about, style="not bold dim")
        lines += [Text(), title, *(_benchmark(line, columns(report)) for line in benchmarks(report, group))]
        for task in tasks:
            lines += _row(task, one_line(task.task).removeprefix(start), fields, widths, name_width)
        remarks = _remarks(tasks, start, columns(report))
        lines += [Padding(Text(remark, style="dim"), (0, 0, 0, 2)) for remark in remarks]
    return Group(*lines, Text(), Text(" ".join(_legend(start, left_out)), style="dim"))


def _fields(report: Report) -> list[Field]:
    compared = {"student"} | {task.against for task in report.tasks}
    scores = [_score_field(column, number, compared) for number, column in enumerate(columns(report))]
    return [
        Field("n", ("n",), 30, lambda task: count(task.n)),
        Field("chance", ("chance",), 31, lambda task: score(task.chance)),
        *scores,
        Field("difference", ("diff.",), 0, lambda task: change(task.difference.value, task.unit)),
        Field("interval", ("95 % interval ",), 10, _interval),
        Field("p", ("p",), 44, lambda task: p_value(task.p)),
        Field("p after Holm", ("p", "(Holm)"), 40, lambda task: p_value(task.p_holm)),
        Field("wins and losses", ("won/", "lost"), 41, lambda task: f"{task.wins}/{task.losses}"),
        Field("documents without a change", ("same", "%"), 45, lambda task: f"{100 * task.unchanged:.0f}"),
        Field("detectable difference", ("detect-", "able"), 42, _detectable),
        Field("majority", ("major-", "ity"), 43, lambda task: score(task.majority)),
    ]


def _score_field(column: Column, number: int, compared: set[str]) -> Field:
    first, *same = (_broken(one_line(role)) for role in column.roles)
    lines = [*first, *(line for name in same for line in (f"= {name[0]}", *name[1:]))]
    rank = 1 if compared & set(column.roles) else 20 + number
    return Field(column.label, tuple(lines), rank, lambda task: score(column.value(task.scores), task.unit))


def _broken(role: str, width: int = 7) -> list[str]:
    if role == "reference":
        return ["refer-", "ence"]
    return textwrap.wrap(role, width, break_on_hyphens=True) or [""]


def _interval(task: TaskLine) -> str:
    low, high = (change(end, task.unit) for end in (task.difference.low, task.difference.high))
    return f"[{low:>5} {high:>5}]{mark(task) or ' '}"


def _detectable(task: TaskLine) -> str:
    return score(task.detectable, task.unit)


def _width(field: Field, tasks: Sequence[TaskLine]) -> int:
    return max(cell_len(text) for text in (*field.title, *map(field.cell, tasks)))


def _room_for_names(fields: Sequence[Field], tasks: Sequence[TaskLine], width: int) -> int:
    taken = sum(1 + _width(field, tasks) for field in fields if field.rank < WHERE_ROOM_IS)
    return max(NAMES_FROM, min(width - taken, int(width * NAMES_TO)))


def _fitting(fields: list[Field], tasks: Sequence[TaskLine], room: int) -> tuple[list[Field], list[str]]:
    """The fields that fit into `room` columns with a space before each, and the names of those that do not.

    A field whose cells are all empty is not shown at all.
    """
    kept = [field for field in fields if any(map(field.cell, tasks))]
    left_out = []
    while len(kept) > 1 and sum(1 + _width(field, tasks) for field in kept) > room:
        last = max(kept, key=lambda field: field.rank)
        kept.remove(last)
        left_out.append(last.name)
    return kept, left_out[::-1]


def _head(fields: Sequence[Field], widths: dict[str, int], name_width: int) -> Iterator[Text]:
    height = max(len(field.title) for field in fields)
    for number in range(height):
        text = Text("task".ljust(name_width) if number == height - 1 else " " * name_width)
        for field in fields:
            lines = ("",) * (height - len(field.title)) + field.title
            text.append(" " + _aligned(lines[number], widths[field.name]))
        yield text
    yield Text("─" * (name_width + sum(1 + width for width in widths.values())), style="dim")


def _row(task: TaskLine, name: str, fields: Sequence[Field], widths: dict[str, int], name_width: int) -> Iterator[Text]:
    first, *more = _folded(name, name_width)
    text = Text(first + " " * (name_width - cell_len(first)))
    for field in fields:
        style = "" if field.name != "difference" or not is_significant(task) else _direction(task.difference.value)
        text.append(" " + _aligned(field.cell(task), widths[field.name]), style=style)
    yield text
    yield from (Text(part) for part in more)


def _direction(change: float) -> str:
    return "bold green" if change > 0 else "bold red"


def _aligned(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text


def _folded(name: str, width: int) -> list[str]:
    """A name in lines of at most `width` columns, broken after `_` if possible."""
    lines, rest = [], name
    while cell_len(rest) > width:
        cut = next(size for size in range(len(rest), 0, -1) if cell_len(rest[:size]) <= width or size == 1)
        cut = rest.rfind("_", cut // 2, cut) + 1 or cut
        lines.append(rest[:cut])
        rest = rest[cut:]
    return [*lines, rest]


def _benchmark(line: BenchmarkLine, shown: Sequence[Column]) -> Text:
    """The score that the members of a benchmark give together."""
    scores = ", ".join(
        f"{column.label} {score(value)}" for column in shown if (value := column.value(line.scores)) is not None
    )
    sign = benchmark_mark(line)
    about = f"{one_line(line.benchmark)} ({line.members} tasks, n {count(line.n)})"
    return Text(f"  {about}: {scores}; {points(line.difference)}{sign}", style="bold red" if sign == LOSS_MARK else "")


def _remarks(tasks: Sequence[TaskLine], start: str, shown: Sequence[Column]) -> Iterator[str]:
    unpaired = [f"{one_line(t.task).removeprefix(start)} {count(t.unpaired)}" for t in tasks if t.unpaired]
    if unpaired:
        yield f"documents that only some models answered, left out: {', '.join(unpaired)}"
    for task in (task for task in tasks if task.seen):
        name = one_line(task.task).removeprefix(start)
        yield f"{name}: {count(task.seen)} of {count(task.n)} also in training rows; {without_seen(task, shown)}"


def _legend(start: str, left_out: Sequence[str]) -> Iterator[str]:
    yield "Scores in per cent, ratings from 1 to 10;"
    yield "differences student - other in points or ratings with 95 % intervals;"
    yield f"{LOSS_MARK} loss, {MARK} gain: p < 0.05 after Holm's correction over all tasks."
    if start:
        yield f"Task names without their common start {start}."
    if left_out:
        yield f"No room for: {', '.join(left_out)}."


def losses(report: Report) -> RenderableType | None:
    """Tasks that are losses: lower is better."""
    if not report.losses:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("task", overflow="fold")
    table.add_column("n", justify="right")
    for column in columns(report):
        table.add_column(Text(column.label), justify="right")
    table.add_column("student - other (95 %)", justify="right", no_wrap=True)
    for line in report.losses:
        values = [column.value(line.values) for column in columns(report)]
        shown = ("" if value is None else loss_value(line, value) for value in values)
        name = Text(f"{one_line(line.task)}\n{line.unit}, against {line.against}")
        worse = line.p_holm < SIGNIFICANT and line.difference.value > 0
        change = Text(f"{loss_change(line)}\np {p_value(line.p_holm)} (Holm)", style="bold red" if worse else "")
        table.add_row(name, count(line.n), *shown, change)
    return Group(Text("Losses: lower is better; they count in no line of the verdict", style="bold"), table)


def held_out(report: Report) -> RenderableType | None:
    if not report.held_out:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("route", overflow="fold")
    table.add_column("model", overflow="fold")
    for title in ("tokens", "loss", *(f"KL({one_line(role)}\n|| model)" for role in teachers(report))):
        table.add_column(Text(title), justify="right")
    for line in report.held_out:
        kl = (f"{line.kl[role]:.4f}" if role in line.kl else "" for role in teachers(report))
        table.add_row(
            Text(one_line(line.route)), Text(one_line(line.model)), count(line.tokens), f"{line.loss:.4f}", *kl
        )
    return Group(Text("Held-out responses, nats per response token", style="bold"), table)


def regressions(report: Report, width: int) -> RenderableType | None:
    """The worst regressions, one per task."""
    worse = [flip for flip in report.flips if flip.change < 0]
    if not worse:
        return None
    worst: dict[str, Flip] = {}
    for flip in worse:
        worst.setdefault(flip.task, flip)
    better = len(report.flips) - len(worse)
    title = Text.assemble(("Regressions", "bold"), f"  {count(len(worse))} documents worse, {count(better)} better")
    texts = [_flip(flip, width - 4) for flip in list(worst.values())[:REGRESSIONS]]
    return Group(title, *texts)


def _flip(flip: Flip, width: int) -> Text:
    change = " -> ".join(score(flip.scores.get(role), flip.unit) for role in (flip.against, "student"))
    text = Text(f"{one_line(flip.task)} {flip.id}  {change}{'  seen in training rows' if flip.seen else ''}\n")
    text.append(f"  {clipped_start(one_line(flip.prompt), width)}\n", style="dim")
    shown = [("expected:", flip.target)] if flip.target else []
    shown += [(f"{one_line(role)}:", flip.answers.get(role, "")) for role in (flip.against, "student")]
    parts = [f"{who} {clipped(one_line(answer), 60) or '(nothing)'}" for who, answer in shown]
    together = " | ".join(parts)
    text.append("\n".join(f"  {line}" for line in ([together] if cell_len(together) < width else parts)))
    return text


def notes(report: Report) -> RenderableType | None:
    if not report.notes:
        return None
    grid = Table.grid(padding=(0, 1))
    for note in report.notes:
        grid.add_row("-", Text(clipped(one_line(note), 400), overflow="fold"))
    return Group(Text("Notes", style="bold"), grid)
