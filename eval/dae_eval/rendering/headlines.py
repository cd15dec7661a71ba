"""The lines of a verdict in words, the same in every format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate, Word
from dae_eval.rendering.wording import count, digits_of, one_line, points, signed
from dae_eval.report import FloorLine, GapLine, RetentionLine, StudentDifference, StudentSummary, TaskLoss
from dae_eval.results import Unit
from dae_eval.units import FULL_SCALE

_LISTED = 3  # tasks that a line names before it counts the rest


@dataclass(frozen=True)
class Headline:
    """One line of the verdict in words. remark: may be empty."""

    measure: str
    figure: str
    interval: str
    condition: str
    word: Word
    remark: str

    @property
    def sentence(self) -> str:
        """`gap closed 92.4 % (88.1 to 95.3), minimum 0 %`."""
        interval = f" ({self.interval})" if self.interval else ""
        return f"{self.measure} {self.figure}{interval}, {self.condition}"


def headlines(summary: StudentSummary) -> tuple[Headline, ...]:
    """The lines of a verdict."""
    lines = []
    if summary.gap is not None:
        lines.append(gap_headline(summary.gap))
    if summary.retention is not None:
        lines.append(retention_headline(summary.retention))
    if summary.floor is not None:
        lines.append(floor_headline(summary.floor))
    return tuple(lines)


def gap_headline(line: GapLine) -> Headline:
    """The gap closed, in per cent of the expert's gain."""
    minimum = f"minimum {100 * line.minimum:g} %"
    need = _need(line.documents_needed, line.exhausted, "add tasks to the domain group")
    if line.closed is None:
        return Headline("gap closed", "undefined", "", minimum, line.word, _joined(_no_gain(line), need, *line.reasons))
    closed = [100 * part for part in (line.closed.value, line.closed.low, line.closed.high)]
    digits = telling_digits(closed[1:], 100 * line.minimum)
    value, low, high = (f"{part:z.{digits}f}" for part in closed)
    return Headline("gap closed", f"{value} %", f"{low} to {high}", minimum, line.word, _joined(need, *line.reasons))


def _no_gain(line: GapLine) -> str:
    """Why the gap closed is undefined."""
    if line.same_weights:
        return "expert and base have the same weights, so there is no gain to take"
    digits = telling_digits((100 * line.gain.low,), 0.0)
    gain = f"{points(line.gain, digits)} points summed over the domain tasks"
    if line.gain.high < 0:
        return f"the expert is worse than the base, by {gain}, so there is no gain to take"
    return f"the expert's gain over the base, {gain}, is not clearly above 0"


def retention_headline(line: RetentionLine) -> Headline:
    """The loss on general tasks in points or ratings, and as a share of the reference if known."""
    margin = _scale(line.unit) * line.margin
    figure, interval = in_unit(line.difference, line.unit, line.margin)
    ratio = ""
    if line.ratio is not None and not line.reasons:
        ratio = f"{line.ratio.value:.1f} % of the reference ({line.ratio.low:.1f} to {line.ratio.high:.1f})"
    enough = math.ceil(-10 * line.difference.low) / 10
    need = _need(line.documents_needed, line.exhausted, f"add general tasks, or accept --margin {enough:g}")
    remark = _joined(ratio, need, *line.reasons)
    return Headline("retention", figure, interval, f"margin {margin:g}", line.word, remark)


def floor_headline(line: FloorLine) -> Headline:
    """The task with the largest loss, and the tasks that make the line fail or undecided."""
    worst = line.worst
    figure, interval = in_unit(worst.difference, worst.unit, line.limit)
    lost = "" if line.lost in ((), (worst,)) else f"significantly beyond it: {_tasks(line.lost)}"
    undecided = f"a loss beyond it is not ruled out: {_tasks(line.undecided)}" if line.undecided else ""
    remark = _joined(f"{one_line(worst.task)}, against {worst.against}", lost, undecided, *line.reasons)
    limit = f"limit {_scale(worst.unit) * line.limit:g} per task"
    return Headline("worst task", figure, interval, limit, line.word, remark)


def _tasks(losses: Sequence[TaskLoss]) -> str:
    """The first tasks with their differences and what would decide, and a count of the rest."""
    shown = []
    for one in losses[:_LISTED]:
        figure, interval = in_unit(one.difference, one.unit)
        shown.append(f"{one_line(one.task)} {figure} ({interval}{_what_would_decide(one)})")
    more = len(losses) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _what_would_decide(loss: TaskLoss) -> str:
    if loss.documents_needed is not None:
        return f"; about {count(loss.documents_needed)} documents would decide"
    return f"; n {count(loss.documents)}, and it has no more" if loss.exhausted else f"; n {count(loss.documents)}"


def compared_sentence(line: StudentDifference) -> str:
    """`gap closed +3.1 % (+0.8 to +5.4), retention +0.2 points (-0.4 to +0.8)`: the student minus another one."""
    parts = []
    if line.gap is not None:
        value, low, high = (signed(100 * part, 1) for part in (line.gap.value, line.gap.low, line.gap.high))
        parts.append(f"gap closed {value} % ({low} to {high})")
    if line.retention is not None:
        figure, interval = in_unit(line.retention, line.unit)
        parts.append(f"retention {figure} ({interval})")
    left_out = f"without {', '.join(map(one_line, line.left_out))}, which one of them lacks" if line.left_out else ""
    return _joined(", ".join(parts) or "too few documents in common", left_out)


def in_unit(difference: Estimate, unit: Unit, bound: float = math.inf) -> tuple[str, str]:
    """`-0.2 points` and `-0.8 to +0.4`, from points; ratings as ratings. bound: -bound decides."""
    parts = [_scale(unit) * part for part in (difference.value, difference.low, difference.high)]
    least, scaled = digits_of(unit), -_scale(unit) * bound
    digits = least if math.isinf(bound) else max(least, telling_digits(parts[1:], scaled))
    value, low, high = (signed(part, digits) for part in parts)
    return f"{value} {'rating' if unit == 'rating' else 'points'}", f"{low} to {high}"


def _scale(unit: Unit) -> float:
    """From points to what is shown."""
    return FULL_SCALE[unit] / 100


def _need(documents: int | None, exhausted: bool, remedy: str) -> str:
    """How many documents would decide, or what else would where the tasks have no more."""
    if exhausted:
        return f"the tasks do not have the documents to decide: {remedy}"
    return "" if documents is None else f"about {count(documents)} documents per task would decide"


def _joined(*parts: str) -> str:
    return "; ".join(one_line(part) for part in parts if part)


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
