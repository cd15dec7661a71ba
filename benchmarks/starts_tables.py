"""The tables of benchmarks/starts.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.starts_differences import difference_rows, differences, summary_rows
from benchmarks.starts_ways import (
    GROUPS,
    LOSSES,
    SEEDS,
    Run,
    Way,
    chosen,
    facts_of,
    figures_of,
    validation_score,
    weight_of,
)
from benchmarks.trade_off import DEMOS, mean_of, task_means

TITLES = {
    "world": "The embedded world",
    "category": "stories260k, title to category",
    "questions": "stories260k, product questions",
}
UNITS: Mapping[str, Mapping[str, float]] = {
    "world": dict.fromkeys(GROUPS, 100.0),
    "category": {"category": 100.0, "stories": 1.0},
    "questions": {"questions": 1.0, "stories": 1.0},
}
KL = {"general KL": 1.0, "domain KL": 1.0}


def results(ways: Sequence[Way], earlier: Mapping[str, Any] | None = None, rates_from: str = "") -> dict[str, Any]:
    """All lines that have a student, with the figures of each seed; of other pairs, what an earlier record has.

    rates_from: the name of the record that the rates of `ways` were taken from.
    """
    pairs = {way.pair for way in ways}
    sources = {pair: name for pair, name in (earlier or {}).get("rates", {}).items() if pair not in pairs}
    sources |= dict.fromkeys(sorted(pairs), rates_from) if rates_from else {}
    lines = [line for line in earlier["lines"] if line["pair"] not in pairs] if earlier else []
    found = [line_of(way) for way in ways]
    its_ends = earlier["ends"] if earlier and "world" not in pairs else ends()
    compared = [one for one in earlier.get("differences", ()) if one["pair"] not in pairs] if earlier else []
    lines += [line for line in found if line is not None]
    return {"rates": sources, "ends": its_ends, "lines": lines, "differences": compared + differences(ways)}


def line_of(way: Way) -> dict[str, Any] | None:
    """What is known of a way; None before its first student."""
    rate, complete = chosen(way)
    runs = [] if rate is None else [run for run in (Run(way, rate, seed) for seed in way.seeds) if run.is_scored]
    if not runs:
        return None
    line: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "pair": way.pair, "start": way.start}
    line |= {"loss": way.loss, "merge": way.merge, "all_weights": way.all_weights, "steps": way.steps}
    line["searched"] = way.searched
    line |= {"budget": way.budget, "learning_rate": rate, "all_rates_tried": complete}
    line["validation"] = {f"{each:g}": validation_score(Run(way, each, SEEDS[0])) for each in way.rates}
    line["weights"] = {} if way.merge else {str(run.seed): weight_of(run) for run in runs}
    line["budgets"] = {str(run.seed): facts_of(run)["budget"] for run in runs if way.budget is not None}
    measured = {run.seed: json.loads(run.kl_file.read_text(encoding="utf-8")) for run in runs if run.kl_file.is_file()}
    return line | {"figures": {str(run.seed): figures_of(run) | measured.get(run.seed, {}) for run in runs}}


def ends() -> dict[str, dict[str, dict[str, float]]]:
    """The world's base and expert by seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("base", "expert"):
        for seed in SEEDS:
            means = task_means(DEMOS / f"seed-{seed}" / "report" / "evaluations" / name)
            scores = {group: mean_of(means, names) for group, names in GROUPS.items()}
            found.setdefault(name, {})[str(seed)] = scores
    return found


# -- markdown ----------------------------------------------------------------------------------------------------------


def markdown(record: Mapping[str, Any]) -> str:
    """A table for each pair."""
    parts = ["# Where a student starts\n\nCPU. Written by `benchmarks/starts.py`."]
    for pair, title in TITLES.items():
        units, lines = UNITS[pair] | KL, [line for line in record["lines"] if line["pair"] == pair]
        if not lines and pair != "world":
            continue
        head = ["start", "loss", "steps", "learning rate", "runs", *units]
        rows = []
        if pair == "world":
            for name, by_seed in record["ends"].items():
                rows.append([name, "", "", "", str(len(by_seed)), *cells(by_seed, units)])
        rows += [[*names(line), str(len(line["figures"])), *cells(line["figures"], units)] for line in lines]
        dates = sorted({line["date"] for line in lines})
        source = record.get("rates", {}).get(pair)
        if source:
            dates.append(f"Students of {source} and, at the rates that were chosen there, of another machine.")
        parts.append("\n\n".join([f"## {title}", *dates, table(head, rows)]))
        compared = [one for one in record.get("differences", ()) if one["pair"] == pair]
        if compared:
            head = ["the same documents", *UNITS[pair]]
            parts.append(table(head, summary_rows(compared, UNITS[pair])))
            parts.append(table(["the same documents", "seed", *UNITS[pair]], difference_rows(compared, UNITS[pair])))
    return "\n\n".join([*parts, NOTES]) + "\n"


def names(line: Mapping[str, Any]) -> list[str]:
    """Start, loss, steps and learning rate, as the table has them."""
    remark = "" if line["all_rates_tried"] else " (search not complete)"
    rate = f"{line['learning_rate']:g}" + (remark if line["searched"] else " (not searched)")
    if line["merge"]:
        return ["merge", f"{line['merge'].replace('_', ' ')}, coefficient {rate}", "", ""]
    weights = sorted({f"{weight:.2f}" for weight in line["weights"].values()})
    start = f"auto ({' to '.join(weights[:: len(weights) - 1 or 1])})" if line["start"] == "auto" else line["start"]
    loss = LOSSES[line["loss"]] + (", all weights" if line["all_weights"] else "")
    return [start, loss + ("" if line["budget"] is None else f", budget {line['budget']:g}"), str(line["steps"]), rate]


NOTES = """Mean over runs, with the lowest and the highest. World: accuracy in per cent (chance 25); `not aligned`:
kinds of question that no alignment row asks. Category: accuracy in per cent on 400 documents (standard error 2.3
points), bits per byte of stories (lower is better). Questions: bits per byte of answers (hetPQA, 400 documents) and
stories. KL: of KL(base || student) in nats a response token, on held-out documents of the general model and of the
domain. All lines of a pair have the same rows, batch size and schedule. `auto`: with the weights it chose.

Differences: points or bits, with 95 % intervals over documents. `3 above 0`: the intervals of 3 runs lie above 0.

Learning rates and coefficients: the best of those tried with the first seed, on validation documents. With a budget:
the rate of the same way without one; in 600 steps: that of 300; titles and questions from 0.5: that of auto. `Not
searched`: one rate, with all weights that of the adapters from auto, else a third of what the search chose. `Search
not complete`: of the rates that are planned (benchmarks/starts_ways.py), not all were tried."""


def cells(by_seed: Mapping[str, Mapping[str, float]], units: Mapping[str, float]) -> list[str]:
    """A cell for each figure, empty where no seed has it."""
    found = []
    for name, unit in units.items():
        values = [unit * figures[name] for figures in by_seed.values() if name in figures]
        found.append(spread(values, 1 if unit > 1 else 3) if values else "")
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """`93.1 (91.0 to 95.2)`; one value alone."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
