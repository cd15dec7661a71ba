"""Numbers, names and sentences of a report, the same in every format.

Scores are on 0..1 in the report and shown in per cent; differences in points (100 x difference).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate
from dae_eval.report import GapLine, Report, RetentionLine, StudentSummary, TaskLine
from dae_eval.results import Kind

SIGNIFICANT = 0.05  # p_holm below which a difference gets a mark
MARK = "*"

COUNTS_IN: Mapping[Kind, str] = {
    "domain": "counts in gap closed",
    "general": "counts in retention",
    "shown": "counts in neither line",
}

# Control characters (C0 and C1 except tab and newline), marks that reverse or hide text, line and paragraph separators,
# halves of surrogate pairs: they change a terminal or the text around them, or have no UTF-8 form.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with control characters (escapes, text direction, nulls) as `<U+202E>`."""
    return _INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text.replace("\r\n", "\n"))


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
    lines = {"domain": report.student.gap, "general": report.student.retention, "shown": None}
    counts = (COUNTS_IN[task.kind if lines[task.kind] is not None else "shown"] for task in tasks)
    return " or ".join(dict.fromkeys(counts))


def count(number: int) -> str:
    """`12,400`."""
    return f"{number:,}"


def score(value: float | None, digits: int = 1) -> str:
    """A score on 0..1 in per cent; empty for None."""
    return "" if value is None else f"{100 * value:z.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """`+1.2`, `-0.4`, and `0.0` without a sign."""
    text = f"{value:+z.{digits}f}"
    return text[1:] if float(text) == 0 else text


def points(difference: Estimate, digits: int = 1) -> str:
    """A difference on -1..1 as `-0.2 (-0.8 to +0.4)` points."""
    value, low, high = (signed(100 * part, digits) for part in (difference.value, difference.low, difference.high))
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
    scores = ", ".join(f"{column.label} {score(column.value(task.unseen_scores))}" for column in shown)
    return f"without them {scores}; difference {points(task.unseen_difference)}"


def tests_used(report: Report) -> str:
    return ", ".join(dict.fromkeys(task.test for task in report.tasks))


def is_significant(task: TaskLine) -> bool:
    """Whether the task's difference is significant after correction over all tasks (Holm)."""
    return task.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class Headline:
    """One line of the verdict in words. remark: may be empty."""

    measure: str
    figure: str
    interval: str
    condition: str
    word: str
    remark: str

    @property
    def sentence(self) -> str:
        """`gap closed 92.4 % (88.1 to 95.3), minimum 0 %`."""
        interval = f" ({self.interval})" if self.interval else ""
        return f"{self.measure} {self.figure}{interval}, {self.condition}"


def headlines(summary: StudentSummary) -> tuple[Headline, ...]:
    """The one or two lines of a verdict."""
    lines = []
    if summary.gap is not None:
        lines.append(gap_headline(summary.gap))
    if summary.retention is not None:
        lines.append(retention_headline(summary.retention))
    return tuple(lines)


def gap_headline(line: GapLine) -> Headline:
    """The gap closed, in per cent of the expert's gain."""
    minimum = f"minimum {100 * line.minimum:g} %"
    if line.closed is None:
        digits = telling_digits((100 * line.gain.low,), 0.0)
        remark = (
            f"the expert's gain over the base, {points(line.gain, digits)} points summed over the domain tasks, "
            "is not clearly above 0"
        )
        return Headline("gap closed", "undefined", "", minimum, line.word, _with_need(remark, line.documents_needed))
    closed = [100 * part for part in (line.closed.value, line.closed.low, line.closed.high)]
    digits = telling_digits(closed[1:], 100 * line.minimum)
    value, low, high = (f"{part:z.{digits}f}" for part in closed)
    remark = _with_need("", line.documents_needed)
    return Headline("gap closed", f"{value} %", f"{low} to {high}", minimum, line.word, remark)


def retention_headline(line: RetentionLine) -> Headline:
    """The loss on general tasks in points, and as a share of the reference if known."""
    digits = telling_digits((line.difference.low, line.difference.high), -line.margin)
    value, low, high = (signed(x, digits) for x in (line.difference.value, line.difference.low, line.difference.high))
    remark = ""
    if line.ratio is not None:
        remark = f"{line.ratio.value:.1f} % of the reference ({line.ratio.low:.1f} to {line.ratio.high:.1f})"
    need = _with_need(remark, line.documents_needed)
    return Headline("retention", f"{value} points", f"{low} to {high}", f"margin {line.margin:g}", line.word, need)


def _with_need(remark: str, documents: int | None) -> str:
    need = "" if documents is None else f"about {count(documents)} documents per task would decide"
    return "; ".join(part for part in (remark, need) if part)


def telling_digits(ends: Sequence[float], bound: float) -> int:
    """Digits after the point, 1 to 4, so that no end of the interval is rounded to the deciding bound."""
    return next(
        (
            digits
            for digits in (1, 2, 3)
            if all(round(end, digits) != round(bound, digits) or end == bound for end in ends)
        ),
        4,
    )


def common_start(names: Sequence[str]) -> str:
    """The common start of all names up to its last `_`, `-`, `/`, `:` or `.`; empty for fewer than two names."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    cut = max((first.rfind(mark, 0, same) for mark in "_-/:."), default=-1)
    return first[: cut + 1]
