"""report.html: one self-contained page. The template escapes all text of models and users."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dae_eval.comparing.statistics import Estimate
from dae_eval.rendering import wording
from dae_eval.rendering.headlines import compared_sentence, headlines
from dae_eval.report import Flip, Report, StudentSummary
from dae_eval.units import FULL_SCALE
from kd.config.problems import visible

if TYPE_CHECKING:
    from dae_eval.rendering.plots import Plot

HERE = Path(__file__).parent
FLIPS = 400  # documents in the page; report.json has all
ROOM = 12.0  # per cent of a card's width that a number below its line takes
PROMPT, ANSWER = 2000, 1000  # characters of a prompt (its end) and of an answer (its start)

# Names of the plots' colours; page.css gives each a value for light and for dark.
_PLOT_COLOURS = {
    "#1b1f24": "ink", "#8a929c": "faint", "#ffffff": "paper", "#6e7781": "grey", "#0072b2": "blue",
    "#d55e00": "vermillion", "#009e73": "green", "#b5558f": "purple", "#b07a00": "orange", "#6b4c2a": "brown",
    "#b3261e": "lost",
}  # fmt: skip


def render(report: Report, plots: Sequence[Plot]) -> str:
    """The page's text: a function of the report and its plots alone."""
    shown = embedded(report.flips)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            plots=[(plot, _themed(plot.svg)) for plot in plots],
            plotted={plot.name.split("-")[0] for plot in plots},
            flips=[view(flip, report) for flip in shown],
            flip_groups=_tasks_by_group(shown),
            scales=_scales(report.student),
            headlines=headlines,
            compared_sentence=compared_sentence,
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            wording=wording,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"minus": minus, "breakable": breakable}
    return environment


def breakable(name: str) -> Markup:
    """An escaped name with line breaks allowed after `_`."""
    return escape(visible(name)).replace("_", Markup("_<wbr>"))


def minus(text: str) -> str:
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _themed(svg: str) -> Markup:
    """An inline plot: without the XML head, and with the colours of the page's theme."""
    inline = svg[svg.index("<svg") :]
    for colour, name in _PLOT_COLOURS.items():
        inline = inline.replace(colour, f"var(--plot-{name})")
    return Markup(inline)  # noqa: S704 - drawn by matplotlib, which escapes what it writes


@dataclass(frozen=True)
class Tick:
    place: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Positions of a headline's figures on a line, in per cent of its width, and the numbers below it."""

    low: float
    value: float
    high: float
    zero: float
    bound: float
    ticks: tuple[Tick, ...]


def _scales(student: StudentSummary) -> dict[str, Scale | None]:
    gap, retention, floor = student.gap, student.retention, student.floor
    scales: dict[str, Scale | None] = {"gap closed": None, "retention": None, "worst task": None}
    if gap and gap.closed:
        figure = Estimate(100 * gap.closed.value, 100 * gap.closed.low, 100 * gap.closed.high)
        scales["gap closed"] = _scale(figure, 100 * gap.minimum, 100, 1, " %")
    if retention:
        factor = FULL_SCALE[retention.unit] / 100
        scales["retention"] = _scale(retention.difference, -retention.margin, retention.margin, factor, "")
    if floor:
        scales["worst task"] = _scale(floor.worst.difference, -floor.limit, 0, 1, "")
    return scales


def _scale(figure: Estimate, bound: float, also: float, factor: float, unit: str) -> Scale:
    """A line through all values and `also`, with a margin of a twelfth of its length at both ends.

    Below it the bound, 0 and `also`, as far as there is room. factor: from values to what is shown.
    """
    shown = (figure.low, figure.value, figure.high, 0.0, bound)
    start, length = min(*shown, also), (max(*shown, also) - min(*shown, also)) or 1.0

    def place(value: float) -> float:
        return round(100 * (1 / 12 + (value - start) / length * 10 / 12), 2)

    ticks: list[Tick] = []
    for value in (bound, 0.0, also):
        if all(abs(place(value) - tick.place) > ROOM for tick in ticks):
            ticks.append(Tick(place(value), f"{factor * value:g}{unit}"))
    low, middle, high, zero, at_bound = map(place, shown)
    return Scale(low, middle, high, zero, at_bound, tuple(ticks))


def embedded(flips: Sequence[Flip], limit: int = FLIPS) -> list[Flip]:
    """At most `limit` flips, in their order: the worst of every task and direction in turn."""
    if len(flips) <= limit:
        return list(flips)
    turns: dict[tuple[str, bool], int] = {}
    ranked = []
    for place, flip in enumerate(flips):
        kind = (flip.task, flip.change < 0)
        turns[kind] = turns.get(kind, 0) + 1
        ranked.append((turns[kind], place))
    return [flips[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


@dataclass(frozen=True)
class Shown:
    """A text in the page. cut: describes its truncation, or empty."""

    text: str
    cut: str


@dataclass(frozen=True)
class Answer:
    """The answer of one model, under all its names."""

    label: str
    shown: Shown
    score: float | None


@dataclass(frozen=True)
class FlipView:
    """A flip with the two compared answers and those of the other models."""

    flip: Flip
    prompt: Shown
    target: Shown
    compared: tuple[Answer, Answer]
    others: tuple[Answer, ...]


def view(flip: Flip, report: Report) -> FlipView:
    """The texts of a flip, truncated for the page."""
    before, after = (_answer(flip, role, role) for role in (flip.against, "student"))
    others = (column for column in wording.columns(report) if not {flip.against, "student"} & set(column.roles))
    return FlipView(
        flip,
        _prompt(flip.prompt),
        _start(flip.target),
        (before, after),
        tuple(_answer(flip, column.label, role) for column in others for role in column.roles if role in flip.answers),
    )


def _answer(flip: Flip, label: str, role: str) -> Answer:
    return Answer(label, _start(flip.answers.get(role, "")), flip.scores.get(role))


def _start(text: str) -> Shown:
    cut = f"the first {ANSWER:,} of {len(text):,} characters" if len(text) > ANSWER else ""
    return Shown(wording.clipped(text, ANSWER), cut)


def _prompt(text: str) -> Shown:
    cut = f"the last {PROMPT:,} of {len(text):,} characters" if len(text) > PROMPT else ""
    return Shown(wording.clipped_start(text, PROMPT), cut)


def _tasks_by_group(flips: Sequence[Flip]) -> dict[str, dict[str, Any]]:
    """The number of flips in the page by group and task."""
    found: dict[str, dict[str, int]] = {}
    for flip in sorted(flips, key=lambda one: (one.group, one.task)):
        tasks = found.setdefault(flip.group, {})
        tasks[flip.task] = tasks.get(flip.task, 0) + 1
    return found
