"""The picture of benchmarks/trade_off.py: domain against general, one panel for each pair, from its record."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.trade_off_tables import mean, values_of
from kd.runs.files import write_bytes_durably

# way: (colour, marker, line). Colours after Okabe and Ito, for colour-blind readers; markers say the same again.
STYLES = {
    "base": ("#1b1f24", "P", ""),
    "expert": ("#1b1f24", "X", ""),
    "dae": ("#0072b2", "o", "-"),
    "ntp": ("#d55e00", "s", "-"),
    "sft": ("#b5558f", "D", ""),
    "linear": ("#009e73", "^", "--"),
    "slerp": ("#6b4c2a", "v", "--"),
    "ties": ("#b07a00", "<", ":"),
    "dare_ties": ("#6e7781", ">", ":"),
    "task_arithmetic": ("#009e73", "+", ""),
}
PANELS = {
    "world": ("The embedded world", "domain (shop), accuracy in %", "general, accuracy in %"),
    "real": ("stories260k, product questions", "domain, bits per byte", "stories, bits per byte"),
}
SETTINGS: dict[Any, Any] = {
    **{key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")},
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "trade_off",  # the same record gives the same bytes
    "text.parse_math": False,
}


def write_picture(record: Mapping[str, Any], folder: Path) -> None:
    """trade_off.svg and trade_off.png: up and right is better in both panels."""
    with mpl.rc_context(SETTINGS):
        figure = draw(record["results"])
        for name, facts in (("svg", {"Date": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=name, dpi=150, metadata=facts)
            write_bytes_durably(folder / f"trade_off.{name}", buffer.getvalue())


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel for each pair with any result; a way's seeds are faint, their mean is joined over its settings."""
    shown = [
        line for line in results if line["part"] == "alignment" and "domain" in next(iter(line["figures"].values()))
    ]
    pairs = [pair for pair in PANELS if any(line["pair"] == pair for line in shown)]
    figure = Figure(figsize=(5.6 * max(1, len(pairs)), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, pair in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), place + 1)
        panel(axes, pair, [line for line in shown if line["pair"] == pair])
    if pairs:
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def panel(axes: Axes, pair: str, lines: Sequence[Mapping[str, Any]]) -> None:
    title, across, up = PANELS[pair]
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(f"{across}  (right is better)")
    axes.set_ylabel(f"{up}  (up is better)")
    axes.grid(visible=True, alpha=0.3, linewidth=0.6)
    for way, (colour, marker, line_style) in STYLES.items():
        own = sorted((line for line in lines if line["way"] == way), key=lambda line: line["at"] or 0.0)
        if own:
            curve(axes, pair, own, colour=colour, marker=marker, line_style=line_style)
    if pair == "real":
        axes.invert_xaxis()
        axes.invert_yaxis()


def curve(
    axes: Axes, pair: str, lines: Sequence[Mapping[str, Any]], *, colour: str, marker: str, line_style: str
) -> None:
    """One way: its mean at each setting with the setting's number, and the seeds around it."""
    factor = 100.0 if pair == "world" else 1.0
    points = [tuple(factor * mean(values_of(line, name)) for name in ("domain", "general")) for line in lines]
    for line in lines:
        seeds = [
            tuple(factor * figures[name] for name in ("domain", "general")) for figures in line["figures"].values()
        ]
        if len(seeds) > 1:
            axes.plot(*zip(*seeds, strict=True), marker, color=colour, alpha=0.3, markersize=4, linestyle="")
    label = {"base": "base = reference"}.get(lines[0]["way"], lines[0]["title"])
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line_style, label=label, markersize=6)
    for line, point in zip(lines, points, strict=True):
        if line["at"] is not None:
            axes.annotate(
                f"{line['at']:g}", (point[0], point[1]), (4, 4), textcoords="offset points", fontsize=7, color=colour
            )
