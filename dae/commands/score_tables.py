"""The tables of `dae eval tasks` in the terminal: what will be asked, and what was scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dae_eval.benchmarks import Member
    from dae_eval.planning import Plan
    from dae_eval.results import Evaluation, TaskResult
    from rich.console import Console
    from rich.table import Table

    T = TypeVar("T", Member, TaskResult)


def show_plan(plan: Plan) -> None:
    """Print a line for each task or benchmark, and the members of each benchmark."""
    from dae_eval.benchmarks import some
    from rich.text import Text

    table = _table("metric", "documents", "shots")
    members_of = []
    for group, parts in _by_group(plan.members.values(), lambda member: member.entry.task):
        table.add_row(Text(group, style="bold"))
        for name, members in parts:
            n, total = sum(member.documents for member in members), sum(member.total for member in members)
            table.add_row(
                Text(f"  {name}"),
                Text(_joined(member.metric.key for member in members)),
                f"{n:,}" if n == total else f"{n:,} of {total:,}",
                _joined(str(member.task.get_config("num_fewshot")) for member in members),
            )
            if members[0].benchmark:
                tasks = [member.entry.task for member in members]
                members_of.append(f"{name}: {len(tasks)} task{'s' * (len(tasks) > 1)}: {some(tasks)}")
    console = _console()
    console.print(table)
    for line in members_of:
        console.print(Text(line))
    console.print()


def print_scores(evaluation: Evaluation) -> None:
    """Print a line for each task; a benchmark's line has its own score, its tasks follow."""
    from dae_eval.units import as_text, benchmark_score, in_unit
    from rich.text import Text

    table = _table("metric", "n", "score", "unit", "chance")

    def add(name: str, results: Sequence[TaskResult], score: float | None) -> None:
        unit = "" if score is None else results[0].unit
        table.add_row(
            Text(name),
            Text(_joined(result.metric for result in results)),
            f"{sum(len(result.documents) for result in results):,}",
            "" if score is None else as_text(score, unit),
            unit,
            _chance(results),
        )

    for group, parts in _by_group(evaluation.tasks.values(), lambda result: result.task):
        table.add_row(Text(group, style="bold"))
        for name, results in parts:
            if results[0].benchmark:
                add(f"  {name}", results, benchmark_score(results))
            for result in results:
                add(f"{'    ' if result.benchmark else '  '}{result.task}", [result], in_unit(result))
    _console().print(table)


def _by_group(items: Iterable[T], name: Callable[[T], str]) -> Iterator[tuple[str, list[tuple[str, list[T]]]]]:
    """Tasks by group and, inside it, by benchmark or else by themselves."""
    for group, in_group in groupby(items, key=lambda item: item.group):
        parts = groupby(in_group, key=lambda item: item.benchmark or name(item))
        yield group, [(part, list(members)) for part, members in parts]


def _chance(results: Sequence[TaskResult]) -> str:
    """What guessing scores, in per cent; empty where it is not known of every task."""
    shares = sum(result.share for result in results)
    known = [result.share * result.chance / shares for result in results if result.chance is not None]
    return f"{100 * sum(known):.1f}" if len(known) == len(results) else ""


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for title in titles:
        is_text = title in ("metric", "unit")
        justify: Any = "left" if is_text else "right"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=not is_text)
    return table


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
