"""The tables and the picture of benchmarks/peers.py, from its record.

python benchmarks/peer_tables.py               # writes them anew from results/peers.json
python benchmarks/peer_tables.py MORE.json     # after taking in another record's parts, measured on the same machine
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.peer_setting import WAYS
from kd.runs.files import write_bytes_durably, write_text_durably

RESULTS = Path(__file__).parent / "results"

Run = Mapping[str, Any]
Result = Mapping[str, Any]


def step_cpu(run: Run) -> float:
    """CPU seconds of a step: the median of the run's."""
    return statistics.median(run["step_cpu"])


def step_wall(run: Run) -> float:
    return statistics.median(run["step_wall"])


def memory(run: Run) -> float:
    """Peak MiB above that after imports."""
    return float(run["peak_mib"] - run["imports_mib"])


def steps_memory(run: Run) -> float:
    """The same, after the first step: loading a checkpoint can take more than training."""
    return float(run["steps_mib"] - run["imports_mib"])


def total_memory(run: Run) -> float:
    return float(run["peak_mib"])


def first_cpu(run: Run) -> float:
    return float(run["first_cpu"])


def first_wall(run: Run) -> float:
    return float(run["first_wall"])


Measure = Callable[[Run], float]


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def of_way(result: Result, way: str, measure: Measure) -> Spread:
    return spread([measure(run) for run in result["runs"][way]])


def ratio(result: Result, way: str, other: str, measure: Measure) -> Spread | None:
    """Way over the other, repeat by repeat (neighbours in time); None where one of them was not run.

    A way that was run once is compared with the other's first run.
    """
    runs = result["runs"]
    if way not in runs or other not in runs:
        return None
    return spread([measure(a) / measure(b) for a, b in zip(runs[way], runs[other], strict=False)])


def beyond_weights(result: Result, way: str) -> float:
    """Median of peak MiB of the steps above imports, less what the way's weights take."""
    return of_way(result, way, steps_memory).median - float(result["weights_mib"][way])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shape_words(setting: Mapping[str, Any]) -> str:
    rows = f"{setting['rows']} rows of {setting['tokens']} tokens ({setting['prompt']} of them prompt)"
    layers = f"{setting['layers']} layers, d {setting['width']}, V {setting['vocabulary']:,}"
    return f"{layers}; {rows}, LoRA r {setting['lora_rank']}"


def shape_table(result: Result) -> str:
    """One shape: what each way takes, and as a multiple of fine-tuning's."""
    rows = []
    for way, runs in result["runs"].items():
        cpu, wall, mib = (of_way(result, way, measure) for measure in (step_cpu, step_wall, memory))
        ratios = [
            ratio(result, way, other, measure)
            for measure in (step_cpu, memory)
            for other in ("trl-sft", "trainer-sft", "three-models")
        ]
        cells = [f"{way}: {WAYS[way].what}", str(cpu), f"{wall.median:.2f}", f"{mib.median:.0f}"]
        cells += [f"{of_way(result, way, total_memory).median:.0f}", f"{result['weights_mib'][way]:.0f}"]
        rows.append([*cells, *("" if one is None else str(one) for one in ratios), str(len(runs))])
    names = ("TRL SFT", "Trainer", "three models")
    header = ["way", "CPU s a step", "wall", "MiB", "with imports", "weights"]
    header += [f"CPU / {name}" for name in names] + [f"MiB / {name}" for name in names] + ["runs"]
    differences = result["largest_relative_differences"]
    words = ", ".join(f"{what.replace('_', ' ')} {value:.0e}" for what, value in differences.items())
    filled = (
        f" Filling the cache took {result['fill_seconds']:.0f} s, with start-up." if "fill_seconds" in result else ""
    )
    setting = result["setting"]
    title = f"## {setting['name']}: {shape_words(setting)}; {result['threads']} thread(s)"
    return (
        f"{title}\n\n{table(header, rows)}\n\nLargest relative difference between ways of one loss: {words}.{filled}\n"
    )


@dataclass(frozen=True)
class Wish:
    """`way` over `other` shall be at most `limit`."""

    words: str
    way: str
    other: str
    measure: Measure
    limit: float


STEP_WISHES = (
    Wish("live: a step's CPU time, of TRL SFT's", "dae-align", "trl-sft", step_cpu, 1.0),
    Wish("cached: a step's CPU time, of TRL SFT's", "dae-align-cached", "trl-sft", step_cpu, 0.8),
    Wish("live: a step's CPU time, of GKD's", "dae-align", "trl-gkd", step_cpu, 0.5),
    Wish("live: memory, of GKD's", "dae-align", "trl-gkd", memory, 0.5),
)
PLAIN = (
    Wish("live: a step's CPU time, of the plain Trainer's", "dae-align", "trainer-sft", step_cpu, 1.0),
    Wish("cached: a step's CPU time, of the plain Trainer's", "dae-align-cached", "trainer-sft", step_cpu, 0.8),
)
FIRST_WISHES = (
    Wish("live: wall time from the command to the first step, of TRL SFT's", "dae-align", "trl-sft", first_wall, 1.3),
    Wish("cached: the same", "dae-align-cached", "trl-sft", first_wall, 1.3),
)
GROWTH_LIMIT = 1.1


def wish_table(record: Mapping[str, Any]) -> str:
    """What was asked for, beside what was measured; `holds` goes by the median."""
    rows = []
    for result in record["shapes"]:
        rows += wish_rows(result, STEP_WISHES)
    if "first_step" in record:
        rows += wish_rows(record["first_step"], FIRST_WISHES)
    for what, results in record.get("growth", {}).items():
        if what in ("vocabulary", "experts"):
            value = beyond_weights(results[-1], "dae-align") / beyond_weights(results[0], "dae-align")
            first, last = (f"{result['setting'][what]:,}" for result in (results[0], results[-1]))
            words = f"live: memory beyond the weights, {what} {last} over {first}"
            rows.append(["growth", words, f"{GROWTH_LIMIT}", f"{value:.2f}", "yes" if value < GROWTH_LIMIT else "no"])
    if not rows:
        return ""
    asked = table(["shape", "asked for", "at most", "measured", "holds"], rows)
    plain = table(["shape", "not asked for", "at most", "measured", "holds"],
                  [row for result in record["shapes"] for row in wish_rows(result, PLAIN)])  # fmt: skip
    return f"## What was asked for\n\n{asked}\n\nThe same against fine-tuning at its best on a CPU:\n\n{plain}\n"


def wish_rows(result: Result, wishes: Sequence[Wish]) -> list[list[str]]:
    rows = []
    for wish in wishes:
        measured = ratio(result, wish.way, wish.other, wish.measure)
        if measured is not None:
            holds = "yes" if measured.median <= wish.limit else "no"
            rows.append([result["setting"]["name"], wish.words, f"{wish.limit}", str(measured), holds])
    return rows


def first_table(result: Result) -> str:
    """Time from the command to the first step's end."""
    rows = []
    for way in result["runs"]:
        cpu, wall = of_way(result, way, first_cpu), of_way(result, way, first_wall)
        ratios = [ratio(result, way, "trl-sft", measure) for measure in (first_cpu, first_wall)]
        rows.append([way, str(cpu), str(wall), *("" if one is None else str(one) for one in ratios)])
    setting = result["setting"]
    title = f"## From the command to the first step's end: {shape_words(setting)}, {setting['file_rows']:,} rows a file"
    return f"{title}\n\n{table(['way', 'CPU s', 'wall s', 'CPU / TRL SFT', 'wall / TRL SFT'], rows)}\n"


def growth_table(what: str, results: Sequence[Result]) -> str:
    rows = []
    for way in results[0]["runs"]:
        first = beyond_weights(results[0], way)
        for result in results:
            cpu, mib = of_way(result, way, step_cpu), of_way(result, way, steps_memory)
            beyond = beyond_weights(result, way)
            value = f"{result['setting'][what]:,}"
            rows.append(
                [way, value, f"{cpu.median:.2f}", f"{mib.median:.0f}", f"{beyond:.0f}", f"{beyond / first:.2f}"]
            )
    header = ["way", what, "CPU s a step", "MiB of the steps", "beyond the weights", "of the first"]
    return f"## Growth with {what}: {shape_words(results[0]['setting'])}\n\n{table(header, rows)}\n"


def introduction(record: Mapping[str, Any]) -> str:
    host, calls = record["machine"], record.get("calls", 1)
    joined_words = f" The parts come from {calls} calls of the script on this machine." if calls > 1 else ""
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    return f"""{host["cores"]} CPU cores ({host["cpu"]}), fp32, {versions}.
Load of the machine when it began: {host["load"]:.1f}. Median (min to max) over the runs; ratios are taken repeat by
repeat. MiB: peak memory above that after imports.{joined_words}

![CPU time and memory of each way](peers.svg)
"""


def page(record: Mapping[str, Any]) -> str:
    """All tables as a Markdown page."""
    parts = [
        f"# `dae align` beside the trainers that people use, {record['date']}\n",
        introduction(record),
        wish_table(record),
        *(shape_table(result) for result in record["shapes"]),
        *([first_table(record["first_step"])] if "first_step" in record else []),
        *(growth_table(what, results) for what, results in record.get("growth", {}).items()),
        NOTES,
    ]
    return "\n".join(part for part in parts if part)


NOTES = """## How it was done

- **Same work.** All ways start from one checkpoint and one adapter (same seed), and see the same rows in the same
  steps. Ways of one loss (`benchmarks/peers.py` lists them) agree at every step in loss and gradient norm, else nothing
  is written. All divide by the response tokens of the whole step, so nothing had to be converted.
- **TRL SFT on a CPU.** TRL 1.16 takes its loss in chunks that are computed again in the backward pass, with Triton
  kernels for them. A CPU has no Triton: there it scores every position, those of the prompt too, in plain torch. It
  also computes entropy and accuracy for its log, which cannot be turned off. On a GPU it stands better. `trainer-sft`
  (transformers.Trainer and peft, the model's own loss) is what fine-tuning costs here without it.
- **TRL's settings.** No recomputation of activations (its default is on), fp32 (its default is bf16), no packing (rows
  are of equal length). GKD: `lmbda=0`, `beta=0`, and a collator for rows that are tokenized already; its own reads
  conversations only.
- **GKD has one teacher.** `dae-align` has two, and each row passes one of them; `dae-align-one-teacher` computes what
  GKD computes.
- **three-models** is written with care: each row passes its own teacher alone, softmax at response positions only. What
  is usually written costs more ([step_cost.md](step_cost.md)).
- **First step.** Before it trains, `dae align` measures the KL of a few rows of each file (at most 64, about 4,096
  tokens); the others do not.
  `dae-align` has `start=base`. `dae-align-auto` has the default `start=auto`, which measures that sample at several
  starts. Data set caches are empty at each start.
- **Rows** are random letters, one token each, without padding; weights are random.
"""


COLOURS = {"dae": "#1b6ca8", "trainer": "#7a7a7a", "three": "#b8b8b8", "trl": "#c8553d"}


def colour(way: str) -> str:
    return COLOURS[way.partition("-")[0]]


def draw(record: Mapping[str, Any], file: Path) -> None:
    """CPU time and memory of each way at each shape, and what memory grows with; nothing where there is neither."""
    shapes, growth = record["shapes"], record.get("growth", {})
    heights = [3.1 * len(shapes), 3.0 * bool(growth)]
    if not any(heights):
        return
    with mpl.rc_context({"svg.hashsalt": "peers", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        filled = [height for height in heights if height]
        parts = list(figure.subfigures(len(filled), 1, height_ratios=filled, squeeze=False)[:, 0])
        if shapes:
            for row, result in zip(parts.pop(0).subplots(len(shapes), 2, squeeze=False), shapes, strict=True):
                bars(row[0], result, step_cpu, "CPU seconds a step")
                bars(row[1], result, memory, "peak MiB above imports")
        if growth:
            axes = parts.pop().subplots(1, len(growth), squeeze=False)[0]
            for ax, (what, results) in zip(axes, growth.items(), strict=True):
                lines(ax, what, results)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_bytes_durably(file, drawn.getvalue())


def bars(ax: Axes, result: Result, measure: Measure, words: str) -> None:
    """A bar for each way: the median, with the range as a line."""
    ways = list(result["runs"])[::-1]
    found = [of_way(result, way, measure) for way in ways]
    ranges = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
    ax.barh(ways, [one.median for one in found], color=[colour(way) for way in ways], xerr=ranges, ecolor="#333333")
    for place, one in enumerate(found):
        ax.text(
            one.high,
            place,
            f"  {one.median:.3g}" if one.median < 100 else f"  {one.median:.0f}",
            va="center",
            fontsize=8,
        )
    ax.set_xlim(0, 1.18 * max(one.high for one in found))
    ax.set_title(f"{result['setting']['name']}: {words}", fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def lines(ax: Axes, what: str, results: Sequence[Result]) -> None:
    """Memory beyond the weights over the value that is varied."""
    values = [result["setting"][what] for result in results]
    for way in results[0]["runs"]:
        beyond = [beyond_weights(result, way) for result in results]
        style = "s--" if way == "trl-gkd" else "o-"
        ax.plot(values, beyond, style, color=colour(way), label=way)
    ax.set_xticks(values, [f"{value // 1000}k" if value >= 10_000 else str(value) for value in values])
    ax.set_ylim(0, 1.15 * max(beyond_weights(result, way) for result in results for way in result["runs"]))
    ax.set_xlabel({"rows": "rows a step", "tokens": "tokens a row"}.get(what, what))
    ax.set_title("MiB beyond the weights", fontsize=9, loc="left")
    ax.legend(fontsize=7, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def write(record: Mapping[str, Any], folder: Path) -> None:
    """peers.md and peers.svg into `folder`."""
    write_text_durably(folder / "peers.md", page(record))
    draw(record, folder / "peers.svg")


def joined(record: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the parts of another: a shape, the first step, growths. Raises ValueError for other versions."""
    if record["machine"]["versions"] != more["machine"]["versions"]:
        raise ValueError(f"measured with {more['machine']['versions']}, not {record['machine']['versions']}")
    shapes = {result["setting"]["name"]: result for result in [*record["shapes"], *more["shapes"]]}
    parts = {"first_step": more["first_step"]} if "first_step" in more else {}
    if "growth" in more:
        parts["growth"] = record.get("growth", {}) | more["growth"]
    calls = record.get("calls", 1) + more.get("calls", 1)
    return {**record, **parts, "shapes": list(shapes.values()), "calls": calls}


def main() -> None:
    """Write tables and picture from results/peers.json and the records that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="peers.json of other calls, whose parts are added")
    record = json.loads((RESULTS / "peers.json").read_text())
    for file in parser.parse_args().records:
        record = joined(record, json.loads(file.read_text()))
    write_text_durably(RESULTS / "peers.json", json.dumps(record, indent=1) + "\n")
    write(record, RESULTS)


if __name__ == "__main__":
    main()
