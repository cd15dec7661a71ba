"""Where a student starts, and what it is trained with: the base or the line to its expert, DAE or next-token loss.

    export OMP_NUM_THREADS=1
    python benchmarks/starts.py                                      # prints the commands that are still to be run
    python benchmarks/starts.py | xargs -d '\\n' -P 2 -n 1 sh -c     # runs them, two at a time
    python benchmarks/starts.py --write                              # writes the results from what is there

Call the second line again until the first one prints nothing: other seeds wait for the learning rates, which are chosen
on validation documents with the first seed. From the repository's root. Needs three demos (`dae demo --output
runs/demo_seeds/seed-N --seed N`), ../shared, and runs/real_pair/{category-lora-expert, questions-lora-expert,
general.jsonl} of recipes/real_pair.yaml. `--pair` prints or writes one pair alone; other pairs' results stay.

World: accuracy on the demo's four groups. Category: accuracy on titles, bits per byte on stories. Questions: bits per
byte on both. Every way has the rows, batch size and schedule of the pair's recipe; what differs is in the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from dae_eval.folders import EVALUATION

from benchmarks.real_pair_scores import SHARED, completion_bytes
from benchmarks.real_pair_tables import BIT_TASKS
from benchmarks.trade_off import DEMOS, LIMIT, VALIDATION_EVERY, mean_of, task_means
from dae.demo.world import ALIGNED_KINDS, ALIGNED_SKILLS, UNALIGNED_KINDS, UNALIGNED_SKILLS
from kd.runs.files import write_text_durably

WORK = Path("runs/starts")
SEEDS = (0, 1, 2)
GROUPS: Mapping[str, Sequence[str]] = {
    "shop, aligned": ALIGNED_KINDS,
    "shop, not aligned": UNALIGNED_KINDS,
    "general, aligned": ALIGNED_SKILLS,
    "general, not aligned": UNALIGNED_SKILLS,
}
REAL = {"category": "real_category", "questions": "real_hetpqa"}  # a real pair -> the task of its domain
UNITS: Mapping[str, Mapping[str, float]] = {
    "world": dict.fromkeys(GROUPS, 100.0),
    "category": {"category": 100.0, "stories": 1.0},
    "questions": {"questions": 1.0, "stories": 1.0},
}
TITLES = {
    "world": "The embedded world",
    "category": "stories260k, title to category",
    "questions": "stories260k, product questions",
}
LOSSES = {"dae": "DAE", "ntp": "next-token loss"}
LAMBDAS = {"dae": 1, "ntp": 0}


@dataclass(frozen=True)
class Way:
    """One line of the tables: a start (`base`, `auto` or a weight), a loss, the steps, the rates that are tried."""

    pair: str
    start: str
    loss: str
    steps: int
    rates: tuple[float, ...]
    budget: float | None = None


@dataclass(frozen=True)
class Run:
    """One student of a way."""

    way: Way
    rate: float
    seed: int

    @property
    def name(self) -> str:
        budget = "" if self.way.budget is None else f"-budget{self.way.budget:g}"
        return f"{self.way.start}-{self.way.loss}-{self.way.steps}{budget}-lr{self.rate:g}-{self.seed}"

    @property
    def folder(self) -> Path:
        if self.way.pair == "world":
            return DEMOS / f"seed-{self.seed}" / "starts" / self.name
        return WORK / f"{self.way.pair}-{self.name}"

    @property
    def student(self) -> Path:
        return self.folder / "student" if self.way.pair == "world" else self.folder

    @property
    def is_scored(self) -> bool:
        done = self.folder / "scores" / EVALUATION if self.way.pair == "world" else scores_file(self.folder.name)
        return done.is_file()


# The learning rates to try, the same for both losses.
COLD = {"world": (1.5e-3, 3e-3, 6e-3), "category": (1.5e-3, 5e-3), "questions": (1.5e-3, 5e-3)}
WARM = {"world": (3e-4, 1e-3, 3e-3), "category": (5e-4, 1.5e-3, 5e-3), "questions": (5e-4, 1.5e-3, 5e-3)}
WAYS = (
    *(Way("world", "base", loss, 900, COLD["world"]) for loss in ("dae", "ntp")),
    *(Way("world", "auto", loss, 900, WARM["world"]) for loss in ("dae", "ntp")),
    *(Way("world", "0.5", loss, 900, WARM["world"]) for loss in ("dae", "ntp")),
    *(Way("world", "auto", "dae", 450, WARM["world"], budget) for budget in (None, 0.02)),
    *(Way("world", "base", loss, 300, COLD["world"]) for loss in ("dae", "ntp")),
    *(Way("world", "auto", loss, 300, WARM["world"]) for loss in ("dae", "ntp")),
    *(Way("category", "base", loss, 300, COLD["category"]) for loss in LOSSES),
    *(Way("category", "auto", loss, 300, WARM["category"]) for loss in ("dae", "ntp")),
    Way("category", "base", "dae", 300, COLD["category"], 0.02),
    *(Way("category", "auto", "dae", 300, WARM["category"], budget) for budget in (0.02, 0.05)),
    Way("category", "auto", "dae", 600, WARM["category"]),
    *(Way("questions", "base", loss, 300, COLD["questions"]) for loss in LOSSES),
    *(Way("questions", "auto", loss, 300, WARM["questions"]) for loss in LOSSES),
)


def scores_file(name: str) -> Path:
    return WORK / "scores" / f"{name}.json"


# -- commands ----------------------------------------------------------------------------------------------------------


def command(run: Run) -> str:
    """What trains and scores a run, in one line of the shell."""
    way, expert = run.way, "shop" if run.way.pair == "world" else "domain"
    start = way.start if way.start in ("base", "auto") else f"{{{expert}: {way.start}}}"
    keys = [f"start={start}", f"lambda={LAMBDAS[way.loss]}", f"train.max_steps={way.steps}"]
    keys += [f"train.learning_rate={run.rate!r}", f"seed={run.seed}"]
    keys += [] if way.budget is None else [f"budget.general={way.budget!r}"]
    if way.pair == "world":
        words = ["dae", "run", "../../../benchmarks/recipes/trade_off/world_align.yaml", f"output=starts/{run.name}"]
        words += [f"stages.student.{key}" for key in keys]
        return f"(cd {DEMOS}/seed-{run.seed} && {shlex.join(words)})"
    recipe = f"benchmarks/recipes/starts_{way.pair}.yaml"
    words = ["dae", "align", "--recipe", recipe, "--output", str(run.folder), *keys]
    scoring = ["python", "benchmarks/real_pair_scores.py", str(run.folder), str(scores_file(run.folder.name))]
    scoring += ["--limit", str(LIMIT), "--tasks", REAL[way.pair], "real_stories", "real_story_endings"]
    return f"{shlex.join(words)} && {shlex.join(scoring)}"


def missing_commands(pairs: Sequence[str]) -> list[str]:
    """What is to be run: the learning rates of the first seed, then the other seeds at the chosen rate."""
    ways = [way for way in WAYS if way.pair in pairs]
    wanted = [Run(way, rate, SEEDS[0]) for way in ways for rate in way.rates]
    for way in ways:
        rate, complete = chosen(way)
        if rate is not None and complete:
            wanted += [Run(way, rate, seed) for seed in SEEDS[1:]]
    return [command(run) for run in wanted if not run.is_scored]


# -- figures -----------------------------------------------------------------------------------------------------------


def figures_of(run: Run) -> dict[str, float]:
    """On test documents. World: accuracy by group; else accuracy or bits per byte of the domain, bits of stories."""
    if run.way.pair == "world":
        means = task_means(run.folder / "scores")
        return {group: mean_of(means, names) for group, names in GROUPS.items()}
    return real_figures(run, is_validation=False)


def real_figures(run: Run, *, is_validation: bool) -> dict[str, float]:
    """Of the documents scored, every third is for validation."""
    tasks = json.loads(scores_file(run.folder.name).read_text(encoding="utf-8"))["tasks"]
    found = {}
    for name, task in ((run.way.pair, REAL[run.way.pair]), ("stories", "real_stories")):
        scores_D = np.array([each["score"] for each in tasks[task]["documents"]])
        kept_D = (np.arange(len(scores_D)) % VALIDATION_EVERY == VALIDATION_EVERY - 1) == is_validation
        if task in BIT_TASKS:
            bytes_D = completion_bytes(SHARED, task)[: len(scores_D)]
            found[name] = float(scores_D[kept_D].sum() / bytes_D[kept_D].sum())
        else:
            found[name] = float(scores_D[kept_D].mean())
    return found


def validation_score(run: Run) -> float | None:
    """One number, higher is better; None where the run is not scored yet.

    World: the mean of domain and general on the skills that rows ask. Category: accuracy minus bits per byte, so that a
    point is worth a hundredth of a bit. Questions: minus the bits per byte of both.
    """
    if not run.is_scored:
        return None
    if run.way.pair == "world":
        means = task_means(run.folder / "validation")
        skills = [skill for skill in ALIGNED_SKILLS if f"world_{skill}" in means]
        return (mean_of(means, ALIGNED_KINDS) + mean_of(means, skills)) / 2
    found = real_figures(run, is_validation=True)
    domain = found[run.way.pair]
    return (-domain if REAL[run.way.pair] in BIT_TASKS else domain) - found["stories"]


def chosen(way: Way) -> tuple[float | None, bool]:
    """The best rate of those that were tried with the first seed, and whether all were."""
    scores = {rate: validation_score(Run(way, rate, SEEDS[0])) for rate in way.rates}
    known = {rate: score for rate, score in scores.items() if score is not None}
    return (max(known, key=known.__getitem__) if known else None), len(known) == len(scores)


def results(pairs: Sequence[str], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All lines that have a student, with the figures of each seed; of other pairs, what an earlier record has."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    lines = [line for line in earlier["lines"] if line["pair"] not in pairs] if earlier else []
    for way in (way for way in WAYS if way.pair in pairs):
        rate, complete = chosen(way)
        if rate is None:
            continue
        runs = [run for run in (Run(way, rate, seed) for seed in SEEDS) if run.is_scored]
        line: dict[str, Any] = {"date": today, "pair": way.pair, "start": way.start, "loss": way.loss}
        line |= {"steps": way.steps, "budget": way.budget, "learning_rate": rate}
        line |= {"rates": list(way.rates), "all_rates_tried": complete}
        line["weights"] = {str(run.seed): weight_of(run) for run in runs}
        line["validation"] = {f"{r:g}": validation_score(Run(way, r, SEEDS[0])) for r in way.rates}
        line["budgets"] = {str(run.seed): facts_of(run)["budget"] for run in runs if way.budget is not None}
        lines.append(line | {"figures": {str(run.seed): figures_of(run) for run in runs}})
    its_ends = earlier["ends"] if earlier and "world" not in pairs else ends()
    return {"date": today, "ends": its_ends, "lines": lines}


def facts_of(run: Run) -> dict[str, Any]:
    """The summary of a run."""
    found: dict[str, Any] = json.loads((run.student / "run.json").read_text(encoding="utf-8"))["summary"]
    return found


def weight_of(run: Run) -> float:
    """How far towards the expert a student started."""
    return float(next(iter(facts_of(run).get("start", {}).get("weights", {"": 0.0}).values())))


def ends() -> dict[str, dict[str, dict[str, float]]]:
    """The world's base and expert by seed."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("base", "expert"):
        for seed in SEEDS:
            means = task_means(DEMOS / f"seed-{seed}" / "report" / "evaluations" / name)
            scores = {group: mean_of(means, names) for group, names in GROUPS.items()}
            found.setdefault(name, {})[str(seed)] = scores
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def markdown(record: Mapping[str, Any]) -> str:
    """A table for each pair."""
    parts = ["# Where a student starts\n\nCPU. Written by `benchmarks/starts.py`."]
    for pair, title in TITLES.items():
        units, lines = UNITS[pair], [line for line in record["lines"] if line["pair"] == pair]
        if not lines and pair != "world":
            continue
        head = ["start", "weight", "loss", "steps", "learning rate", "seeds", *units]
        rows = []
        if pair == "world":
            for name, by_seed in record["ends"].items():
                rows.append([name, "", "", "", "", str(len(by_seed)), *cells(by_seed, units)])
        for line in lines:
            budget = "" if line["budget"] is None else f", budget {line['budget']:g}"
            rate = f"{line['learning_rate']:g}" + ("" if line["all_rates_tried"] else " (search not complete)")
            weight = spread(list(line["weights"].values()), 2)
            names = [line["start"], weight, LOSSES[line["loss"]] + budget, str(line["steps"]), rate]
            rows.append([*names, str(len(line["figures"])), *cells(line["figures"], units)])
        dates = sorted({line["date"] for line in lines})
        parts.append("\n\n".join([f"## {title}", *dates, table(head, rows)]))
    return "\n\n".join([*parts, NOTES]) + "\n"


NOTES = """Mean over seeds, with the lowest and the highest. World: accuracy in per cent (chance 25); `not aligned`:
kinds of question that no alignment row asks. Category: accuracy in per cent on 400 documents (standard error 2.3
points), bits per byte of stories (lower is better). Questions: bits per byte of answers (hetPQA, 400 documents) and
stories. All lines of a pair have the same rows, batch size and schedule. Learning rate: the best of those tried with
the first seed, on validation documents. `Search not complete`: of the rates that are planned (benchmarks/starts.py),
not all were tried."""


def cells(by_seed: Mapping[str, Mapping[str, float]], units: Mapping[str, float]) -> list[str]:
    return [
        spread([unit * figures[name] for figures in by_seed.values()], 1 if unit > 1 else 3)
        for name, unit in units.items()
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """`93.1 (91.0 to 95.2)`; one value alone."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Print what is missing, or write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results from what is there")
    parser.add_argument("--pair", choices=TITLES, help="this one alone")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    given = parser.parse_args()
    pairs = [given.pair] if given.pair else list(TITLES)
    if not given.write:
        print("\n".join(missing_commands(pairs)))
        return
    earlier = given.output / "starts.json"
    record = results(pairs, json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None)
    write_text_durably(given.output / "starts.json", json.dumps(record, indent=1) + "\n")
    write_text_durably(given.output / "starts.md", markdown(record))


if __name__ == "__main__":
    main()
