"""Numbers, names and sentences of a report, the same in every format.

Scores are on 0..1 in the report and shown in per cent, ratings from 1 to 10; differences in points (100 x difference)
or ratings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate
from dae_eval.report import BenchmarkLine, LossLine, Report, TaskLine
from dae_eval.results import Kind, Unit
from dae_eval.units import FULL_SCALE, PERPLEXITIES, shown
from kd.config.problems import visible

SIGNIFICANT = 0.05  # p_holm below which a difference gets a mark
MARK, LOSS_MARK = "*", "▼"

COUNTS_IN: Mapping[Kind, str] = {
    "domain": "counts in gap closed",
    "general": "counts in retention",
    "shown": "counts in no line",
}


def one_line(text: str) -> str:
    """Visible text with every run of white space as one space."""
    return " ".join(visible(text).split())


def clipped(text: str, limit: int) -> str:
    """The first `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def clipped_start(text: str, limit: int) -> str:
    """The last `limit` characters of a text: the end of a prompt is its question."""
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :].lstrip()


@dataclass(frozen=True)
class Column:
    """Models with the same weights (`base`, `reference`), shown as one."""

    roles: tuple[str, ...]

    @property
    def label(self) -> str:
        """The roles' names, as `base = reference`."""
        return " = ".join(one_line(role) for role in self.roles)

    def value(self, scores: Mapping[str, float]) -> float | None:
        """The score of any of the roles; None if they have none."""
        return next((scores[role] for role in self.roles if role in scores), None)


def columns(report: Report) -> tuple[Column, ...]:
    """The models with scores, in the report's order; models with the same weights are one column."""
    roles: dict[str, list[str]] = {}
    for line in report.models:
        roles.setdefault(line.same_as or line.role, []).append(line.role)
    grouped = [Column(tuple(same)) for same in roles.values()]
    return tuple(one for one in grouped if any(one.value(task.scores) is not None for task in report.tasks))


def groups(report: Report) -> dict[str, tuple[TaskLine, ...]]:
    """The tasks by group, in the report's order."""
    found: dict[str, list[TaskLine]] = {}
    for task in report.tasks:
        found.setdefault(task.group, []).append(task)
    return {group: tuple(tasks) for group, tasks in found.items()}


def teachers(report: Report) -> tuple[str, ...]:
    return tuple(dict.fromkeys(role for line in report.held_out for role in line.kl))


def against(tasks: Sequence[TaskLine]) -> str:
    """The model that a group compares the student with: `base`, or `base or reference` if tasks differ."""
    return " or ".join(one_line(role) for role in dict.fromkeys(task.against for task in tasks))


def kinds(tasks: Sequence[TaskLine], report: Report) -> str:
    """The line of the verdict that a group's tasks count in."""
    counts = dict(COUNTS_IN)
    if report.student.gap is None:
        counts["domain"] = "counts in worst task"
    return " or ".join(dict.fromkeys(counts[task.kind] for task in tasks))


def count(number: int) -> str:
    """`12,400`."""
    return f"{number:,}"


def score(value: float | None, unit: Unit = "points") -> str:
    """A score on 0..1 in per cent, or as a rating; empty for None."""
    return "" if value is None else f"{FULL_SCALE[unit] * value:z.{digits_of(unit)}f}"


def digits_of(unit: Unit) -> int:
    return 2 if unit == "rating" else 1


def change(value: float, unit: Unit = "points") -> str:
    """A difference on -1..1 as `-0.4` points, or as `-0.04` ratings."""
    return signed(FULL_SCALE[unit] * value, digits_of(unit))


def signed(value: float, digits: int = 1) -> str:
    """`+1.2`, `-0.4`, and `0.0` without a sign."""
    text = f"{value:+z.{digits}f}"
    return text[1:] if float(text) == 0 else text


def points(difference: Estimate, digits: int = 1, unit: Unit = "points") -> str:
    """A difference on -1..1 as `-0.2 (-0.8 to +0.4)` points, or ratings."""
    parts, digits = (difference.value, difference.low, difference.high), max(digits, digits_of(unit))
    value, low, high = (signed(FULL_SCALE[unit] * part, digits) for part in parts)
    return f"{value} ({low} to {high})"


def p_value(p: float) -> str:
    """`0.031`, or `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def documents(task: TaskLine) -> str:
    """`240`, or `240 in 57` if documents share sources (57 clusters)."""
    return count(task.n) if task.clusters == task.n else f"{count(task.n)} in {count(task.clusters)}"


def without_seen(task: TaskLine, shown: Sequence[Column]) -> str:
    """Every model's score, and the difference, on the documents that do not occur in training rows."""
    if task.unseen_scores is None or task.unseen_difference is None:
        return "no documents are left without them"
    scores = ", ".join(f"{column.label} {score(column.value(task.unseen_scores), task.unit)}" for column in shown)
    return f"without them {scores}; difference {points(task.unseen_difference, unit=task.unit)}"


def tests_used(report: Report) -> str:
    return ", ".join(dict.fromkeys(task.test for task in report.tasks))


def is_significant(task: TaskLine) -> bool:
    """Whether the task's difference is significant after correction over all tasks (Holm)."""
    return task.p_holm < SIGNIFICANT


def is_loss(task: TaskLine) -> bool:
    """Whether the task lost significantly."""
    return is_significant(task) and task.difference.value < 0


def mark(task: TaskLine) -> str:
    """The mark of a significant loss or gain, or empty."""
    return LOSS_MARK if is_loss(task) else MARK if is_significant(task) else ""


def benchmark_mark(line: BenchmarkLine) -> str:
    if line.p_holm >= SIGNIFICANT:
        return ""
    return LOSS_MARK if line.difference.value < 0 else MARK


def metrics(tasks: Sequence[TaskLine]) -> str:
    """`metric acc`; where a group has several, the tasks of all but the most frequent one are named."""
    by_metric: dict[str, list[str]] = {}
    for task in tasks:
        by_metric.setdefault(one_line(task.metric), []).append(one_line(task.task))
    most = max(by_metric, key=lambda metric: len(by_metric[metric]))
    rest = [f"{metric} for {', '.join(names)}" for metric, names in by_metric.items() if metric != most]
    return ", ".join([f"metric {most}", *rest])


def benchmarks(report: Report, group: str) -> tuple[BenchmarkLine, ...]:
    return tuple(line for line in report.benchmarks if line.group == group)


def loss_value(line: LossLine, value: float) -> str:
    """A mean loss in the unit that a reader knows; of a perplexity the exponential."""
    return f"{shown(value, line.unit):.4g}"


def loss_change(line: LossLine) -> str:
    """Student - other, with its interval; of a perplexity the ratio of both."""
    parts = (line.difference.value, line.difference.low, line.difference.high)
    if line.unit in PERPLEXITIES:
        value, low, high = (f"{shown(part, line.unit):.3f}" for part in parts)
        return f"x{value} ({low} to {high})"
    value, low, high = (f"{part:+.4f}" for part in parts)
    return f"{value} ({low} to {high})"


def distances(report: Report) -> str:
    """`general 0.0107, domain 1.9023`: KL(reference || student) by route, in nats per response token; or empty.

    From the eval set, else where training ended. On domain prompts it predicts forgetting (arXiv 2509.04259).
    """
    found = {
        one.route: one.kl["reference"] for one in report.held_out if one.model == "student" and "reference" in one.kl
    }
    if not found:
        start, end = "KL(reference || student), ", " rows"
        found = {
            curve.name.removeprefix(start).removesuffix(end): curve.values[-1]
            for curve in report.curves
            if curve.model == "student" and curve.name.startswith(start) and curve.values
        }
    return ", ".join(f"{one_line(route)} {value:.4f}" for route, value in found.items())


def common_start(names: Sequence[str]) -> str:
    """The common start of all names up to its last `_`, `-`, `/`, `:` or `.`; empty for fewer than two names."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    cut = max((first.rfind(mark, 0, same) for mark in "_-/:."), default=-1)
    return first[: cut + 1]
