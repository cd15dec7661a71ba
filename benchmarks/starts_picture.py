"""The picture of results/starts.md: what a start gains beyond the rows, and what it costs there.

    python benchmarks/starts_picture.py [--results benchmarks/results]

reads starts.json, and the record that its rates come from, and writes starts.svg. Points are means over runs, lines
reach from the lowest to the highest, numbers are steps. Students with LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.starts_pooled import read_pooled
from benchmarks.starts_ways import LOSSES

COLOURS = {"DAE": "#1f6aa5", "next-token loss": "#c8553d", "DAE with a budget": "#8a8a8a", "merge": "#b8a13a"}
LABEL_AT = {"DAE": (2, 8), "next-token loss": (2, -13), "DAE with a budget": (6, 4), "merge": (8, 4)}  # in points
CROWDED = {  # of the world, without a budget
    ("auto", "dae", 300): (8, 1),
    ("auto", "dae", 450): (-21, 6),
    ("auto", "ntp", 300): (-19, -14),
    ("0.5", "dae", 900): (8, -9),
}
MERGES = (("world", "linear"), ("world", "ties"))  # that are drawn
MARKERS = {"base": "o", "auto": "^", "0.5": "s", "": "x"}
PANELS = {
    "world": ("shop, not aligned", "general, not aligned", 100.0, "The demo's world: accuracy in %"),
    "category": ("category", "stories", 1.0, "Titles to categories: accuracy in %, bits per byte"),
}


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Both pairs side by side: the domain to the right, what should not be lost upwards."""
    figure = Figure(figsize=(10.5, 4.2))
    for panel, pair in zip(figure.subplots(1, 2), PANELS, strict=True):
        lines = [line for line in record["lines"] if line["pair"] == pair and is_drawn(line)]
        draw_pair(panel, pair, lines)
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in COLOURS.items()]
    used = {line["start"] for line in record["lines"]}
    handles += [
        Line2D([], [], color="black", marker=marker, linestyle="", fillstyle="none", label=f"start {name}")
        for name, marker in MARKERS.items()
        if name and name in used
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    with rc_context({"svg.hashsalt": "starts"}):  # else every run writes another file
        figure.savefig(file, metadata={"Date": None})


def is_drawn(line: Mapping[str, Any]) -> bool:
    """All weights have no mark of their own. Merges of titles lose so much that the rest would be one point."""
    if line["all_weights"]:
        return False
    return line["searched"] and (not line["merge"] or (line["pair"], line["merge"]) in MERGES)


def draw_pair(panel: Axes, pair: str, lines: Sequence[Mapping[str, Any]]) -> None:
    across, up, unit_up, title = PANELS[pair]
    for line in lines:
        points = list(line["figures"].values())
        x, y = [100 * point[across] for point in points], [unit_up * point[up] for point in points]
        middle = sum(x) / len(x), sum(y) / len(y)
        name = name_of(line)
        spread = {"xerr": ranges(x), "yerr": ranges(y)} if len(points) > 1 else {}
        colour, marker = COLOURS[name], MARKERS[line["start"]]
        panel.errorbar(*middle, **spread, color=colour, marker=marker, markersize=7, elinewidth=0.8)
        panel.annotate(
            f"{line['merge']} {line['learning_rate']:g}" if line["merge"] else str(line["steps"]),
            middle,
            label_at(line, name),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    panel.margins(0.12)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(across)
    panel.set_ylabel(f"{up} (lower is better)" if up == "stories" else up)
    if up == "stories":
        panel.invert_yaxis()
    panel.grid(color="#e5e5e5")
    panel.set_axisbelow(True)


def label_at(line: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Where the number stands beside its point, so that none covers another."""
    is_crowded = line["pair"] == "world" and line["budget"] is None
    place = CROWDED.get((line["start"], line["loss"], line["steps"])) if is_crowded else None
    return place or LABEL_AT[name]


def name_of(line: Mapping[str, Any]) -> str:
    """What the legend has."""
    if line["merge"]:
        return "merge"
    if line["budget"] is not None:
        return "DAE with a budget"
    return LOSSES[line["loss"]]


def ranges(values: Sequence[float]) -> list[list[float]]:
    """From the mean to the lowest and to the highest, as matplotlib takes them."""
    mean = sum(values) / len(values)
    return [[mean - min(values)], [max(values) - mean]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    folder = parser.parse_args().results
    draw(read_pooled(folder), folder / "starts.svg")


if __name__ == "__main__":
    main()
