"""What a cache of the teachers costs and saves, and what its kinds do to the student.

    export OMP_NUM_THREADS=1
    python benchmarks/cached.py                                      # prints the commands that are still to be run
    python benchmarks/cached.py | xargs -d '\\n' -P 2 -n 1 sh -c     # runs them, two at a time
    python benchmarks/cached.py --costs                              # measures CPU seconds and bytes, a few minutes
    python benchmarks/cached.py --write                              # writes the results from what is there

From the repository's root. Needs what benchmarks/starts.py needs, and its runs of live teachers (start auto, DAE).

Costs are those of titles to categories: CPU seconds of `dae cache`, and of a training step, the difference between two
runs of unlike length.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import starts
from benchmarks.starts_tables import UNITS, cells, table
from benchmarks.starts_ways import WAYS, Run, Way, figures_of

RESULTS = Path("benchmarks/results")
COSTS = Path("runs/starts/cached-costs.json")
LIVE = "live"
KINDS: dict[str, tuple[str, ...]] = {
    "hidden": (),
    "int8": ("cache.dtype=int8",),
    "topk16": ("cache.kind=topk", "cache.top_k=16"),
    "sampled12": ("cache.kind=sampled",),
}
TITLES = {
    LIVE: "live teachers",
    "hidden": "`kind: hidden`, float32",
    "int8": "`kind: hidden, dtype: int8`",
    "topk16": "`kind: topk, top_k: 16`",
    "sampled12": "`kind: sampled, samples: 12`",
}
RATES = {"world": 1e-3, "category": 1.5e-3}
STEPS = {"world": 900, "category": 300}
SEEDS = {"world": (0, 1, 2), "category": (0, 1, 2)}
NOTES = """\
Students: mean over seeds, with the lowest and the highest; differences seed by seed. World: accuracy in per cent.
Category: accuracy in per cent on test documents (standard error of one accuracy 2.3 points), bits per byte of stories
(lower is better). Start auto, DAE, the same rows and learning rate.
"""
COST_NOTES = "One thread, start base, medians over repeats: {}. Filling includes the start of the command.\n"
SHORT, LONG = 10, 40  # steps of the runs whose difference is a step's cost


@dataclass(frozen=True)
class CachedRun(Run):
    """A run of benchmarks/starts.py whose teachers are cached."""

    kind: str

    @property
    def name(self) -> str:
        prefix = f"cached-{self.kind}"
        pair = "" if self.way.pair == "world" else f"{self.way.pair}-{self.way.start}-"
        return f"{prefix}-{pair}{self.way.loss}-{self.way.steps}-lr{self.rate:g}-{self.seed}"

    @property
    def folder(self) -> Path:
        return super().folder if self.way.pair == "world" else Path("runs/starts") / self.name


def way_of(pair: str) -> Way:
    """The run of live teachers that the others are compared with."""
    wanted = ("auto", "dae", STEPS[pair], None)
    return next(way for way in WAYS if way.pair == pair and (way.start, way.loss, way.steps, way.budget) == wanted)


def run_of(pair: str, kind: str, seed: int) -> Run:
    if kind == LIVE:
        return Run(way_of(pair), RATES[pair], seed)
    return CachedRun(way_of(pair), RATES[pair], seed, kind)


def cache_keys(pair: str, kind: str) -> list[str]:
    """Of a recipe; the cache lies beside the runs."""
    return [f"cache.path={'cache' if pair == 'world' else 'runs/starts/cache'}", *KINDS[kind]]


def command(pair: str, kind: str, seed: int) -> str:
    """What trains and scores a run, in one line of the shell."""
    run = run_of(pair, kind, seed)
    keys = cache_keys(pair, kind)
    if pair == "world":
        text = starts.command(run)
        return f"{text.removesuffix(')')} {shlex.join(f'stages.student.{key}' for key in keys)})"
    training, scoring = starts.command(run).split(" && ")
    return f"{training} {shlex.join(keys)} && {scoring}"


def missing_commands() -> list[str]:
    return [
        command(pair, kind, seed)
        for pair, seeds in SEEDS.items()
        for kind in KINDS
        for seed in seeds
        if not run_of(pair, kind, seed).is_scored
    ]


def results() -> dict[str, Any]:
    """Figures by pair, kind and seed of the runs that are there; costs where they were measured."""
    found: dict[str, Any] = {}
    for pair, seeds in SEEDS.items():
        runs = {kind: [run_of(pair, kind, seed) for seed in seeds] for kind in (LIVE, *KINDS)}
        found[pair] = {
            kind: {str(run.seed): figures_of(run) for run in several if run.is_scored} for kind, several in runs.items()
        }
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    return {"date": dt.date.today().isoformat(), "results": found, "costs": costs}


def measured_costs(repeats: int) -> dict[str, dict[str, float]]:
    """By kind: CPU seconds to fill, bytes on disk, and CPU seconds of a step; medians over alternating repeats."""
    seconds: dict[str, dict[str, list[float]]] = {kind: {"fill": [], "step": []} for kind in (LIVE, *KINDS)}
    sizes: dict[str, float] = {}
    recipe = ["--recipe", "benchmarks/recipes/starts_category.yaml"]
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            for kind in (LIVE, *KINDS):
                keys = [f"cache.path={name}/{kind}", *KINDS[kind]] if kind != LIVE else []
                common = [*recipe, "start=base", "train.learning_rate=1e-3", *keys]
                if kind != LIVE:
                    output = ["--output", f"{name}/none"]
                    filling = ["dae", "cache", "align", *common, *output, f"train.max_steps={LONG}"]
                    seconds[kind]["fill"].append(cpu_seconds(filling))
                    sizes[kind] = sum(file.stat().st_size for file in Path(name, kind).rglob("part-*"))
                lengths = [
                    cpu_seconds(
                        ["dae", "align", *common, "--output", f"{name}/{kind}-{steps}", f"train.max_steps={steps}"]
                    )
                    for steps in (SHORT, LONG)
                ]
                seconds[kind]["step"].append((lengths[1] - lengths[0]) / (LONG - SHORT))
    return {
        kind: {what: statistics.median(values) for what, values in of.items() if values} | {"bytes": sizes.get(kind, 0)}
        for kind, of in seconds.items()
    }


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and its children. Raises CalledProcessError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a page."""
    parts = [f"# A cache of the teachers\n\n{record['date']}, CPU. Written by `benchmarks/cached.py`.\n"]
    names = {"world": "The embedded world, 900 steps", "category": "stories260k, title to category, 300 steps"}
    for pair, by_kind in record["results"].items():
        head = ["teachers", "seeds", *UNITS[pair]]
        live = by_kind[LIVE]
        rows = [[TITLES[LIVE], str(len(live)), *cells(live, UNITS[pair])]]
        for kind, of in by_kind.items():
            if kind != LIVE and of:
                rows.append([f"{TITLES[kind]}, minus live", str(len(of)), *cells(differences(of, live), UNITS[pair])])
        parts.append(f"## {names[pair]}\n\n{table(head, rows)}\n")
    if costs := record["costs"]:
        live = costs["kinds"][LIVE]["step"]
        head = ["teachers", "MB on disk", "CPU seconds to fill", "CPU seconds of a step", "of a live step"]
        rows = [
            [
                TITLES[kind],
                f"{of['bytes'] / 1e6:.2f}" if of["bytes"] else "",
                f"{of['fill']:.0f}" if "fill" in of else "",
                f"{of['step']:.2f}",
                f"{of['step'] / live:.2f}",
            ]
            for kind, of in costs["kinds"].items()
        ]
        title = f"## Costs, title to category, the rows of {LONG} steps"
        parts.append(f"{title}\n\n{table(head, rows)}\n\n{COST_NOTES.format(costs['repeats'])}")
    parts.append(NOTES)
    return "\n".join(parts)


def differences(
    of: Mapping[str, Mapping[str, float]], live: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """By seed, for the seeds that both have."""
    return {seed: {name: value - live[seed][name] for name, value in of[seed].items()} for seed in of if seed in live}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results from what is there")
    parser.add_argument("--costs", action="store_true", help="measure CPU seconds and bytes")
    parser.add_argument("--repeats", type=int, default=3, help="of --costs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args()
    if arguments.costs:
        COSTS.parent.mkdir(parents=True, exist_ok=True)
        costs = {"repeats": arguments.repeats, "kinds": measured_costs(arguments.repeats)}
        COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    elif arguments.write:
        record = results()
        (arguments.output / "cached.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output / "cached.md").write_text(markdown(record))
        print(markdown(record))
    else:
        print("\n".join(missing_commands()))


if __name__ == "__main__":
    main()
