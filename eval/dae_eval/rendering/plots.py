"""The report's plots as SVG and PNG: forest plot of differences, radar of categories, curves over training.

Figures are made without pyplot and change no global state; the same report gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator

from dae_eval.comparing.statistics import Estimate
from dae_eval.rendering.wording import (
    against,
    clipped,
    columns,
    common_start,
    groups,
    is_loss,
    is_significant,
    one_line,
)
from dae_eval.report import Curve, Radar, Report, TaskLine
from dae_eval.results import Kind

INK, FAINT, PAPER, GREY = "#1b1f24", "#8a929c", "#ffffff", "#6e7781"
# After Okabe and Ito, for colour-blind readers; pale colours are darker for the contrast of thin lines. Each model also
# has its own marker and line style.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BROWN = "#0072b2", "#d55e00", "#009e73", "#b5558f", "#b07a00", "#6b4c2a"
LOST = "#b3261e"  # a significant loss
WIDTH = 3.9  # inches: text of 9 points is readable at the full width of a phone
ROW, LABELS = 0.25, 1.6  # inches per task in the forest plot, and at most for its name
FEW_SPOKES = 14  # up to this number the labels of a radar are horizontal
LABEL_ACROSS, LABEL_ALONG, LABEL_BESIDE = 0.4, 0.85, 0.8  # inches
PANELS: Mapping[Kind, str] = {"domain": "Domain tasks", "general": "General tasks", "shown": "Tasks in no line"}

_SETTINGS: dict[Any, Any] = {  # on matplotlib's own defaults; a user's matplotlibrc is ignored
    **{key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")},
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "svg.fonttype": "path",  # needs no font
}


@dataclass(frozen=True)
class Plot:
    """One plot. name: of its files; description: alternative text. svg: with a white background."""

    name: str
    title: str
    description: str
    svg: str
    png: bytes


def draw(report: Report) -> tuple[Plot, ...]:
    """The plots that the report has data for: `forest`, `radar-1`, ..., `curve-1`, ..."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        return tuple(_plots(report))


def _plots(report: Report) -> Iterator[Plot]:
    if report.tasks:
        described = f"Forest plot of {len(report.tasks)} tasks; the table of tasks has the same numbers."
        yield _plot("forest", "Differences by task", described, forest(report))
    styles = _styles(report)
    for number, radar in enumerate((one for one in report.radars if len(one.axes) >= 3), 1):
        described = f"Radar plot of {len(radar.values)} models on {len(radar.axes)} categories, axes from 0 to 100 %."
        yield _plot(f"radar-{number}", radar.title, described, radar_plot(radar, report, styles))
    for number, curves in enumerate(_by_quantity(report.curves), 1):
        described = "; ".join(_course(curve) for curve in curves)
        yield _plot(f"curve-{number}", curves[0].name, described, curve_plot(curves, styles))


def _plot(name: str, title: str, description: str, figure: Figure) -> Plot:
    return Plot(name, one_line(title), description, _svg(figure, name), _png(figure))


def _svg(figure: Figure, name: str) -> str:
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    # A page can have several plots, so every id is prefixed with the plot's name.
    text = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", file.getvalue())
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _styles(report: Report) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each model, the same in every plot."""
    fixed: dict[str, dict[str, Any]] = {
        "student": {"color": BLUE, "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5},
        "expert": {"color": VERMILLION, "marker": "^", "linestyle": "--"},
        "base": {"color": GREY, "marker": "s", "linestyle": ":"},
        "reference": {"color": GREEN, "marker": "D", "linestyle": "-."},
    }
    more = (("P", (0, (5, 1))), ("v", (0, (3, 1, 1, 1))), ("X", (0, (1, 1))))
    roles = [line.role for line in report.models] + [role for radar in report.radars for role in radar.values]
    others = [role for role in dict.fromkeys([*roles, *(curve.model for curve in report.curves)]) if role not in fixed]
    for number, role in enumerate(others):
        marker, dashes = more[(number + number // 3) % 3]
        fixed[role] = {"color": (PURPLE, ORANGE, BROWN)[number % 3], "marker": marker, "linestyle": dashes}
    return {role: {"linewidth": 1.4, "markersize": 4.5, **style} for role, style in fixed.items()}


# Forest plot: a panel for each kind of task, each on its own scale, because a gain of 60 points would hide a loss of 1.


def forest(report: Report) -> Figure:
    """Differences of the tasks in points with 95 % intervals, in the report's order; full marker: significant."""
    panels = {kind: [task for task in report.tasks if task.kind == kind] for kind in PANELS}
    rows = {kind: list(_rows(kind, tasks, report)) for kind, tasks in panels.items() if tasks}
    heights = [ROW * len(found) + 0.1 for found in rows.values()]
    top, gap, bottom = 0.34, 0.78, 0.5
    height = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure = _figure(height)
    start = common_start([one_line(task.task) for task in report.tasks])
    for found in rows.values():
        found[:] = [(_fitted(figure, label, start if isinstance(row, TaskLine) else None), row) for label, row in found]
    widest = max(_inches(figure, label, isinstance(row, TaskLine)) for found in rows.values() for label, row in found)
    left = (widest + 0.2) / WIDTH
    y = height - top
    for (kind, found), panel_height in zip(rows.items(), heights, strict=True):
        y -= panel_height
        axes = figure.add_axes((left, y / height, 0.955 - left, panel_height / height))
        compared = one_line(against(panels[kind]))
        title = f"{PANELS[kind]}: student − {compared}, points"
        figure.text(0.02, (y + panel_height + 0.1) / height, title, fontsize=9.5, fontweight="bold")
        _draw_rows(axes, found, kind)
        if kind == "general" and report.student.retention is not None:
            axes.axvline(-report.student.retention.margin, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        y -= gap
    return figure


def _rows(kind: Kind, tasks: Sequence[TaskLine], report: Report) -> Iterator[tuple[str, TaskLine | Estimate | None]]:
    """(label, task), (group, None) above its tasks, and for general tasks their macro-mean in points at the end."""
    by_group = groups(report)
    for group in dict.fromkeys(task.group for task in tasks):
        yield one_line(group), None
        yield from ((one_line(task.task), task) for task in by_group[group] if task.kind == kind)
    if kind == "general" and report.student.retention is not None:
        yield "macro-mean", report.student.retention.difference


def _inches(figure: Figure, label: str, is_task: bool) -> float:
    probe = figure.text(0, 0, label, fontweight="normal" if is_task else "bold")
    width = probe.get_window_extent().width / figure.dpi
    probe.remove()
    return width


def _fitted(figure: Figure, label: str, start: str | None) -> str:
    """A label that fits beside the plot: if needed without the common start of all tasks, then truncated inside.

    start: the common start; None if the label is not a task's.
    """
    is_task = start is not None
    if start and _inches(figure, label, is_task) > LABELS:
        label = f"…{label.removeprefix(start)}"
    letters, fitted = min(len(label), 60), label[:60]
    while _inches(figure, fitted, is_task) > LABELS and letters > 6:
        letters -= 1
        end = letters // 3
        fitted = f"{label[: letters - end]}…{label[-end:]}"
    return fitted


def _draw_rows(axes: Axes, rows: Sequence[tuple[str, TaskLine | Estimate | None]], kind: Kind) -> None:
    for y, (_, row) in enumerate(rows):
        colour, marker = {"domain": (BLUE, "o"), "general": (BLUE, "s"), "shown": (GREEN, "D")}[kind]
        if isinstance(row, TaskLine):
            ends = [100 * end for end in (row.difference.low, row.difference.high)]
            face = colour if is_significant(row) else PAPER
            if is_loss(row):
                colour, marker, face = LOST, "v", LOST
            axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
            axes.plot(
                100 * row.difference.value, y, marker, color=colour, markerfacecolor=face, markersize=5.5, zorder=4
            )
        elif row is not None:
            corners = ((row.low, y), (row.value, y - 0.3), (row.high, y), (row.value, y + 0.3))
            axes.fill(*zip(*corners, strict=True), facecolor=INK, edgecolor=INK, zorder=4)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=2)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    for text, (_, row) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("normal" if isinstance(row, TaskLine) else "bold")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=4))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)


def radar_plot(radar: Radar, report: Report, styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Scores by category on absolute axes from 0 to 100 %. Models with the same weights are one line."""
    room = LABEL_ALONG if len(radar.axes) > FEW_SPOKES else LABEL_ACROSS  # inches around the circle, for its labels
    circle, title, legend = WIDTH - 2 * max(room, LABEL_BESIDE), 0.35, 0.65
    height = title + 2 * room + circle + legend
    figure = _figure(height)
    place = ((1 - circle / WIDTH) / 2, (legend + room) / height, circle / WIDTH, circle / height)
    axes = figure.add_axes(place, projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * i / len(radar.axes) for i in range(len(radar.axes))]
    for model, label in _drawn_once(radar, report):
        closed = [100 * value for value in (*radar.values[model], radar.values[model][0])]
        axes.plot([*angles, angles[0]], closed, label=clipped(label, 24), **styles[model])
    axes.set_ylim(0, 100)
    outermost = "" if len(radar.axes) > FEW_SPOKES else "100 %"
    axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", outermost], fontsize=8, color=INK)
    axes.set_rlabel_position(180 / len(radar.axes))
    axes.set_xticks(angles, [""] * len(angles))
    names = [one_line(axis) for axis in radar.axes]
    _label_spokes(axes, [name.removeprefix(common_start(names)) for name in names], angles)
    axes.spines["polar"].set_color(FAINT)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="lower center", ncols=min(3, len(names)), frameon=False, handlelength=2.6, fontsize=8
    )
    figure.text(0.02, 1 - 0.2 / height, clipped(one_line(radar.title), 50), fontsize=9.5, fontweight="bold")
    return figure


def _drawn_once(radar: Radar, report: Report) -> Iterator[tuple[str, str]]:
    """(model, label) of the lines to draw: one for all roles with the same weights."""
    labels = {role: column.label for column in columns(report) for role in column.roles}
    drawn: set[str] = set()
    for model in radar.values:
        label = labels.get(model, one_line(model))
        if label not in drawn:
            drawn.add(label)
            yield model, label


def _shortened(label: str, limit: int) -> str:
    """A label of at most `limit` characters, shortened in the middle: labels often differ in their ends alone."""
    end = limit // 2
    return label if len(label) <= limit else f"{label[: limit - 1 - end]}…{label[-end:]}"


def _label_spokes(axes: Axes, labels: Sequence[str], angles: Sequence[float]) -> None:
    """Labels outside the circle: few are horizontal, in lines; many are along their spokes."""
    along = len(labels) > FEW_SPOKES
    for label, angle in zip(labels, angles, strict=True):
        right = math.sin(angle)
        text = _shortened(label, 16) if along else textwrap.fill(_shortened(label, 36), 13)
        side = "center" if abs(right) < 0.1 and not along else ("left" if right > 0 else "right")
        turn = 90 - math.degrees(angle) if right > 0 or (along and angle == 0) else 270 - math.degrees(angle)
        if along and angle == 0:
            side = "left"
        vertical = "center" if along or abs(math.cos(angle)) < 0.9 else ("bottom" if math.cos(angle) > 0 else "top")
        axes.text(
            angle, 106, text, ha=side, va=vertical, rotation=turn if along else 0, rotation_mode="anchor",
            fontsize=8 if along else 8.5, linespacing=1.0,
        )  # fmt: skip


def _by_quantity(curves: Sequence[Curve]) -> list[list[Curve]]:
    found: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if curve.steps:
            found.setdefault((curve.name, curve.unit), []).append(curve)
    return list(found.values())


def _course(curve: Curve) -> str:
    """`student from 0 (step 0) to 0.0107 (step 1000)`."""
    first, last = curve.values[0], curve.values[-1]
    return f"{one_line(curve.model)}: {first:.3g} at step {curve.steps[0]}, {last:.3g} at step {curve.steps[-1]}"


def curve_plot(curves: Sequence[Curve], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One quantity over the optimizer steps, one line per model."""
    figure = _figure(2.9)
    axes = figure.add_axes((0.14, 0.17, 0.83, 0.7))
    for curve in curves:
        style = styles[curve.model]
        every = max(1, len(curve.steps) // 12)
        axes.plot(curve.steps, curve.values, label=clipped(one_line(curve.model), 30), markevery=every, **style)
    axes.set_title(clipped(one_line(curves[0].name), 56))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(clipped(one_line(curves[0].unit), 40))
    finite = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if finite and min(finite) >= 0:
        axes.set_ylim(0, 1.08 * max(finite) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, handlelength=2.6, fontsize=8)
    return figure
