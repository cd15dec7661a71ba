"""The tables and the picture of benchmarks/trade_off.py, from its record.

python benchmarks/trade_off_tables.py    # writes them anew from results/trade_off.json
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kd.runs.files import write_bytes_durably, write_text_durably

Line = Mapping[str, Any]

PAIRS = {"world": "The embedded world", "real": "stories260k with product questions"}
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "world": {
        "domain": "domain, %",
        "general": "general, %",
        "domain, not aligned": "domain without rows, %",
        "general, not aligned": "general without rows, %",
    },
    "real": {
        "domain": "domain, bits per byte",
        "general": "stories, bits per byte",
        "hetPQA": "hetPQA",
        "ePQA": "ePQA",
        "story endings": "story endings, accuracy",
    },
}
PERCENT = {"world"}
ENDS = ("base", "expert")
DIFFERENCES = {  # (one way, minus another)
    "alignment": (("dae", "ntp"),),
    "distillation": (("small_kd", "small_sft"), ("small_attention", "small_kd")),
    "mixture": (("moe", "dense"), ("moe", "dae"), ("moe", "merged")),
}

NOTES = """## How it was done

- **Sides.** `DAE`: `dae align`. `Same mixed rows`: the same command with `lambda=0`. `Domain rows alone`: `dae sft`
  from the base, as many rows and steps. `expert`: the teacher; on the world a longer list of rows (also the kinds of
  question that no student's rows ask), on the real pair 543 steps of 16 rows. Merges are between base (= reference) and
  expert, by `dae merge weights` at its default densities (TIES 0.2, DARE-TIES 0.5). With the base as reference, task
  arithmetic at a coefficient up to 1 is the linear merge at the same one, by its formula; it was run once to see so.
- **Rows and steps.** World: 900 steps of 64 rows, LoRA of rank 32 (recipes/demo/align.yaml). Real pair: 600 steps of 8
  domain and 4 general rows (12 domain rows where there are no others), all weights. On the world the setting is the
  share of domain rows, both routes at equal weight in the loss; on the real pair it is the weight of the domain route.
- **Distillation.** World: a Llama of 2 layers of width 64 from random weights, the demo's base (3 layers of width 128)
  as its teacher, 600 steps of 64 general rows. Real pair: layers 0, 2 and 4 of stories260k as the student, all five as
  its teacher (../shared has no larger model of this tokenizer), 250 steps of 8 of its own samples, so next-token loss
  on these rows is itself a distillation by samples. `lambda=1`; the attention loss has weight 1, which was not tuned;
  layers are mapped evenly on the world, and each to the one it was cut from on the real pair.
- **Mixture.** `dae merge moe` of base and expert, gate `hidden`, both experts for every token. World: all weights, 300
  steps of 64 rows, share 0.7, for the mixture and the dense base alike. Real pair: as the dense student above. Equal
  rows and steps: the mixture has more weights and takes longer. It also starts with the expert's weights in it, which
  the dense base does not; on the world a dense student from their linear merge starts from both, too.
- **Learning rates.** Every side that trains has its own, the best on validation documents by one score, with the first
  seed at the first setting; it is kept for other seeds and settings. All begin with the same three rates, and go on by
  factors of two until the best lies between two worse ones, or an eighth of the lowest or eight times the highest is
  reached (`edge`). `Not chosen yet`: its search is not at its end. The world's share of 0.7, schedule and 0.003 as the
  middle of the three are those of the demo, where they were chosen by DAE's own training divergence (CHANGELOG); the
  other sides inherit share and schedule. Nothing else was tuned; all settings are shown.
- **Documents.** World, test: the demo's. Validation: of shop questions, the same facts in the phrasing that the test
  does not use; of skills, new instances (sums and differences also stand in training rows, there are too few); towns
  have none. Real pair: of the first documents of each task (see `--limit`), every third of hetPQA and of stories is for
  validation, the rest and ePQA for the test; hetPQA without questions whose evidence is that of a training row.
  `Domain` is the mean of hetPQA and ePQA.
- **Seeds.** Mean, and in parentheses the lowest and the highest seed. World: another base, expert, order of rows and
  adapter. Real pair: one base and one expert; seeds differ in the order of rows (DARE-TIES: in what is kept; other
  merges have nothing to vary). Differences are by seed. `Front`: no other line's mean is better in both domain and
  general; it knows nothing of the spread."""


def markdown(record: Mapping[str, Any]) -> str:
    """All tables, how it was done, and commands."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = ["# The trade-off: ways to a student, in miniature"]
    parts.append(f"{record['date']}, CPU, {versions}. Written by `benchmarks/trade_off.py`.")
    models, seeds = sum(len(line["figures"]) for line in record["results"]), ", ".join(map(str, record["seeds"]))
    parts += [f"Complete: all {models} planned models are scored, seeds {seeds}."]
    parts += ["![domain against general](trade_off.svg)"]
    parts.append("Means over seeds, joined over the settings that stand beside them; faint: the seeds.")
    for part, title in (
        ("alignment", "Alignment: domain against general"),
        ("distillation", "Distillation: a larger teacher, attention loss"),
        ("mixture", "Mixture of base and expert as the student"),
    ):
        tables = [part_tables(record["results"], part, pair) for pair in PAIRS]
        if any(tables):
            parts += [f"## {title}", *filter(None, tables)]
    parts += [tuning_table(record), NOTES]
    parts += ["## Commands", "One of each kind, with the first seed and default folders.", ""]
    return "\n\n".join(filter(None, parts)) + "\n".join(["\n\n```", *record["commands"], "```"]) + "\n"


# -- one part on one pair ----------------------------------------------------------------------------------------------


def part_tables(results: Sequence[Line], part: str, pair: str) -> str:
    """The lines of one part on one pair, and the differences that the part is about; empty without any."""
    own = [line for line in results if line["pair"] == pair and line["part"] == part and line["way"] not in ENDS]
    if not own:
        return ""
    lines = [line for line in results if line in own or is_compared(line, part, pair)]
    differences = [row for one, other in DIFFERENCES[part] for row in difference_rows(lines, one, other)]
    parts = [f"### {PAIRS[pair]}", figures_table(lines, part, pair)]
    if differences:
        names = shown_figures(lines, pair)
        head = ["by seed", "setting", "seeds", *(COLUMNS[pair][name] for name in names)]
        rows = [
            [title, at, str(len(values[names[0]])), *(cell(pair, values[name], "+") for name in names)]
            for title, at, values in differences
        ]
        parts.append(table([head, *rows]))
    return "\n\n".join(parts)


def is_compared(line: Line, part: str, pair: str) -> bool:
    """Lines of another part that belong beside this one: base and expert, and the real pair's dense student."""
    if line["pair"] != pair:
        return False
    if part == "distillation":
        return bool(line["way"] == "base")
    is_dense = part == "mixture" and pair == "real" and line["way"] == "dae" and line["at"] == 1.0
    return line["way"] in ENDS or is_dense


def figures_table(lines: Sequence[Line], part: str, pair: str) -> str:
    names = shown_figures([line for line in lines if line["way"] not in ENDS], pair)
    best = front(lines, pair) if part == "alignment" else set()
    head = ["way", "setting", "learning rate", "seeds", *(COLUMNS[pair][name] for name in names)]
    rows = [head + (["front"] if best else [])]
    for place, line in enumerate(lines):
        rate = "" if line["learning_rate"] is None else f"{line['learning_rate']:g}"
        cells = [title_of(line, part), setting_of(line), rate, str(len(line["figures"]))]
        cells += [cell(pair, values_of(line, name)) for name in names]
        rows.append(cells + (["yes" if place in best else ""] if best else []))
    return table(rows)


def shown_figures(lines: Sequence[Line], pair: str) -> list[str]:
    """The figures that all lines have, in the order of the columns."""
    known = [set(figures) for line in lines for figures in line["figures"].values()]
    return [name for name in COLUMNS[pair] if all(name in names for names in known)]


def title_of(line: Line, part: str) -> str:
    if line["way"] == "base":
        return "teacher" if part == "distillation" else "base = reference"
    return str(line["title"])


def setting_of(line: Line) -> str:
    return "" if line["at"] is None else f"{line['setting']} {line['at']:g}"


def values_of(line: Line, name: str) -> list[float]:
    """A figure over the seeds; empty where the line does not have it."""
    return [figures[name] for figures in line["figures"].values() if name in figures]


def front(lines: Sequence[Line], pair: str) -> set[int]:
    """Places of the lines whose means no other line betters in both domain and general."""
    sign = 1 if pair in PERCENT else -1
    means = [[sign * mean(values_of(line, name)) for name in ("domain", "general")] for line in lines]

    def is_beaten(place: int) -> bool:
        here = means[place]
        return any(other != here and all(a >= b for a, b in zip(other, here, strict=True)) for other in means)

    return {place for place in range(len(lines)) if not is_beaten(place)}


def difference_rows(lines: Sequence[Line], one: str, other: str) -> list[tuple[str, str, dict[str, list[float]]]]:
    """(title, setting, figure -> differences by seed) of two ways at equal settings."""
    found = []
    for first in (line for line in lines if line["way"] == one):
        for second in (line for line in lines if line["way"] == other):
            if first["at"] == second["at"] or None in (first["at"], second["at"]):
                pairs = [(figures, second["figures"][seed]) for seed, figures in first["figures"].items()]
                names = pairs[0][0].keys() & pairs[0][1].keys()
                values = {name: [ours[name] - theirs[name] for ours, theirs in pairs] for name in names}
                found.append((f"{first['title']} minus {second['title']}", setting_of(first), values))
    return found


# -- cells -------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cell(pair: str, values: Sequence[float], sign: str = "") -> str:
    """`93.1 (91.0 to 95.2)`: mean, lowest and highest; sign `+`: of differences."""
    factor, digits = (100, 1) if pair in PERCENT else (1, 3)
    shown = [f"{factor * value:{sign}.{digits}f}" for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


# -- learning rates ----------------------------------------------------------------------------------------------------


def tuning_table(record: Mapping[str, Any]) -> str:
    """Validation scores by learning rate; what stands at the edge of what was tried is said."""
    rates = sorted({rate for line in record["tuning"] for rate in line["scores"]}, key=float)
    rows = [["pair", "way", *rates, "chosen"]]
    for line in record["tuning"]:
        scores = [line["scores"].get(rate) for rate in rates]
        shown = ["" if score is None else validation_cell(line["pair"], score) for score in scores]
        tried = [*map(float, line["scores"])]
        edge = " (edge)" if line["chosen"] in (min(tried), max(tried)) else ""
        rows.append([line["pair"], f"`{line['way']}`", *shown, f"{line['chosen']:g}{edge}"])
    what = (
        "On validation documents, first seed. World: accuracy in %, mean of domain and general (distillation: general)."
    )
    what += " Real pair: bits per byte, mean of hetPQA and stories (distillation: stories)."
    return "\n\n".join(["## Learning rates", what, table(rows)])


def validation_cell(pair: str, score: float) -> str:
    return f"{100 * score:.1f}" if pair in PERCENT else f"{-score:.3f}"


# -- picture -----------------------------------------------------------------------------------------------------------

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


def write_tables(record: Mapping[str, Any], folder: Path) -> None:
    """Write trade_off.json, .md, .svg and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_picture(record, folder)
    write_text_durably(folder / "trade_off.json", json.dumps(record, indent=1) + "\n")
    write_text_durably(folder / "trade_off.md", markdown(record))


if __name__ == "__main__":
    RESULTS = Path(__file__).parent / "results"
    write_tables(json.loads((RESULTS / "trade_off.json").read_text(encoding="utf-8")), RESULTS)
