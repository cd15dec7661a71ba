"""The lines of a verdict in words, the same in every format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate, Word
from dae_eval.rendering.wording import count, digits_of, one_line, points, signed
from dae_eval.report import FloorLine, GapLine, RetentionLine, StudentDifference, StudentSummary, TaskLoss
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
    need = _need(line.documents_needed, line.documents_exist, "add tasks to the domain group")
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
    scale, least = FULL_SCALE[line.unit] / 100, digits_of(line.unit)
    difference = [scale * part for part in (line.difference.value, line.difference.low, line.difference.high)]
    margin = scale * line.margin
    digits = max(least, telling_digits(difference[1:], -margin))
    value, low, high = (signed(part, digits) for part in difference)
    ratio = ""
    if line.ratio is not None and not line.reasons:
        ratio = f"{line.ratio.value:.1f} % of the reference ({line.ratio.low:.1f} to {line.ratio.high:.1f})"
    enough = math.ceil(-difference[1] * 10**least) / 10**least
    need = _need(line.documents_needed, line.documents_exist, f"add general tasks, or accept a margin of {enough:g}")
    unit = "points" if line.unit == "points" else "rating"
    remark = _joined(ratio, need, *line.reasons)
    return Headline("retention", f"{value} {unit}", f"{low} to {high}", f"margin {margin:g}", line.word, remark)


def floor_headline(line: FloorLine) -> Headline:
    """The task with the largest loss, and the tasks that make the line fail or undecided."""
    worst, condition = line.worst, f"limit {line.limit:g} per task"
    others = [one for one in line.lost if one != worst]
    lost = f"also lost more than that: {_tasks(others)}" if others else ""
    undecided = f"a larger loss is not ruled out: {_tasks(line.undecided)}" if line.undecided else ""
    digits = telling_digits((worst.difference.low, worst.difference.high), -line.limit)
    value, low, high = (
        signed(x, digits) for x in (worst.difference.value, worst.difference.low, worst.difference.high)
    )
    remark = _joined(f"{one_line(worst.task)}, against {worst.against}", lost, undecided, *line.reasons)
    return Headline("worst task", f"{value} points", f"{low} to {high}", condition, line.word, remark)


def _tasks(losses: Sequence[TaskLoss]) -> str:
    """The first tasks with their differences and the documents that would decide, and a count of the rest."""
    shown = [
        f"{one_line(one.task)} {signed(one.difference.value, 1)} ({signed(one.difference.low, 1)} to "
        f"{signed(one.difference.high, 1)}{_documents(one)})"
        for one in losses[:_LISTED]
    ]
    more = len(losses) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _documents(loss: TaskLoss) -> str:
    return "" if loss.documents_needed is None else f"; about {count(loss.documents_needed)} documents would decide"


def compared_sentence(line: StudentDifference) -> str:
    """`gap closed +3.1 % (+0.8 to +5.4), retention +0.2 points (-0.4 to +0.8)`: the student minus another one."""
    parts = []
    if line.gap is not None:
        parts.append(f"gap closed {_estimate(line.gap, 100)[0]} % {_estimate(line.gap, 100)[1]}")
    if line.retention is not None:
        parts.append(f"retention {_estimate(line.retention, 1)[0]} points {_estimate(line.retention, 1)[1]}")
    return ", ".join(parts) or "nothing to compare"


def _estimate(estimate: Estimate, scale: float) -> tuple[str, str]:
    value, low, high = (signed(scale * part, 1) for part in (estimate.value, estimate.low, estimate.high))
    return value, f"({low} to {high})"


def _need(documents: int | None, exist: int | None, remedy: str) -> str:
    """How many documents would decide, or what else would where the tasks have no more."""
    if documents is None:
        return ""
    if exist is not None and documents > exist:
        return f"it would take about {count(documents)} documents per task, and they have {count(exist)}: {remedy}"
    return f"about {count(documents)} documents per task would decide"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


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
