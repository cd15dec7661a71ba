"""What different ways to a student give on the domain and cost elsewhere: the trade-off, in miniature.

    export OMP_NUM_THREADS=1
    python benchmarks/trade_off.py                                      # prints the commands that are still to be run
    python benchmarks/trade_off.py | xargs -d '\\n' -P 2 -n 1 sh -c     # runs them, two at a time

Call the second line again until the first one prints nothing: students wait for what they start from, and other seeds
and settings for the learning rates, which are chosen on validation documents with the first seed. Then the first line
writes trade_off.json, .md, .svg and .png. Each command is `dae run` with a recipe of recipes/trade_off, so a stopped
one goes on. From the repository's root; the real pair needs ../shared.

- alignment: DAE against next-token loss on the same mixed rows and on domain rows alone, and against merges, over the
  share or weight of domain rows or the merge's coefficient;
- distillation: KD from a larger teacher against next-token loss on the same rows, with and without attention loss;
- mixture: the mixture of base and expert against the dense base, as the student of `dae align`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from dae_eval.folders import EVALUATION, read_evaluation

from benchmarks.real_pair_scores import SHARED, completion_bytes, new_evidence
from benchmarks.trade_off_tables import ENDS, write_tables
from dae.demo.world import ALIGNED_KINDS, ALIGNED_SKILLS, GENERAL_SKILLS, UNALIGNED_KINDS, UNALIGNED_SKILLS

RECIPES = Path("benchmarks/recipes/trade_off")
WORK, DEMOS, REAL_PAIR = Path("runs/trade_off"), Path("runs/demo_seeds"), Path("runs/real_pair")
SEEDS = (0, 1, 2)
LIMIT = 600  # first documents of each task of the real pair
VALIDATION_EVERY = 3  # of those of hetPQA and of stories
PACKAGES = ("torch", "transformers", "peft", "mergekit", "lm-eval")


@dataclass(frozen=True)
class Way:
    """One way to a student on one pair of a general model and an expert.

    recipe: its file, without the pair; keys: what is changed in it for this way. rates: the learning rates that are
    tried; none where nothing is trained. settings: places on its curve, the first one where its rate is chosen.
    """

    title: str
    part: str
    recipe: str
    keys: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    setting: str = ""
    settings: tuple[float | None, ...] = (None,)


def merge(title: str, method: str, *coefficients: float) -> Way:
    return Way(title, "alignment", "merge", (f"method={method}",), (), "coefficient", coefficients)


MERGES = {
    "linear": merge("merge, linear", "linear", 0.3, 0.5, 0.7),
    "slerp": merge("merge, SLERP", "slerp", 0.3, 0.5, 0.7),
    "ties": merge("merge, TIES", "ties", 0.5, 1.0, 1.5),
    "dare_ties": merge("merge, DARE-TIES", "dare_ties", 0.3, 0.5, 0.7),
    "task_arithmetic": merge("merge, task arithmetic", "task_arithmetic", 0.5),
}
MIXED, DOMAIN = "next-token loss, same mixed rows", "next-token loss, domain rows alone"
SHARE = ("share of domain rows", (0.7, 0.3, 0.1))
WEIGHT = ("weight of domain rows", (1.0, 0.25))
ATTENTION = "attention.weight=1.0"
# Each grid began as 0.0015, 0.003, 0.006 and grew by factors of two until the best rate lay between two worse ones.
WAYS: Mapping[str, Mapping[str, Way]] = {
    "world": {
        "dae": Way("DAE", "alignment", "align", (), (0.0015, 0.003, 0.006), *SHARE),
        "ntp": Way(MIXED, "alignment", "align", ("lambda=0",), (0.0015, 0.003, 0.006), *SHARE),
        "sft": Way(DOMAIN, "alignment", "sft", (), (0.000375, 0.00075, 0.0015, 0.003, 0.006)),
        **MERGES,
        "small_sft": Way("next-token loss", "distillation", "small_sft", (), (0.0015, 0.003, 0.006, 0.012)),
        "small_kd": Way("KD", "distillation", "small_kd", (), (0.0015, 0.003, 0.006, 0.012)),
        "small_attention": Way(
            "KD and attention loss", "distillation", "small_kd", (ATTENTION,), (0.0015, 0.003, 0.006, 0.012)
        ),
        "moe": Way("DAE, mixture of base and expert", "mixture", "mixture", (), (0.00075, 0.0015, 0.003, 0.006)),
        "dense": Way("DAE, dense", "mixture", "mixture", ("base=base",), (0.0015, 0.003, 0.006)),
        "merged": Way(
            "DAE, dense, from their linear merge at 0.5",
            "mixture",
            "mixture",
            ('base="@merged"',),
            (0.0001875, 0.000375, 0.00075, 0.0015, 0.003, 0.006),
        ),
    },
    "real": {
        "dae": Way("DAE", "alignment", "align", (), (0.00075, 0.0015, 0.003, 0.006), *WEIGHT),
        "ntp": Way(MIXED, "alignment", "align", ("lambda=0",), (0.00075, 0.0015, 0.003, 0.006), *WEIGHT),
        "sft": Way(DOMAIN, "alignment", "sft", (), (0.0001875, 0.000375, 0.00075, 0.0015, 0.003, 0.006)),
        **MERGES,
        "small_sft": Way("next-token loss", "distillation", "small_sft", (), (0.0015, 0.003, 0.006)),
        "small_kd": Way("KD", "distillation", "small_kd", (), (0.0015, 0.003, 0.006, 0.012)),
        "small_attention": Way(
            "KD and attention loss",
            "distillation",
            "small_kd",
            (ATTENTION, "attention.layers=[[0, 0], [1, 2], [2, 4]]"),
            (0.0015, 0.003, 0.006, 0.012),
        ),
        "moe": Way(
            "DAE, mixture of base and expert", "mixture", "mixture", (), (0.000375, 0.00075, 0.0015, 0.003, 0.006)
        ),
    },
}


@dataclass(frozen=True)
class Run:
    """One model to be scored. at: its setting; rate: its learning rate, None where nothing is trained here."""

    pair: str
    way: str
    at: float | None
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        at = "" if self.at is None else f"-{self.at:g}"
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.way}{at}{rate}-{self.seed}"

    @property
    def part(self) -> str:
        return "alignment" if self.way in ENDS else WAYS[self.pair][self.way].part

    @property
    def folder(self) -> Path:
        """What `dae run` writes: `student`, and for the world the evaluations `validation` and `scores`."""
        return DEMOS / f"seed-{self.seed}" / "trade_off" / self.name if self.pair == "world" else WORK / self.name

    @property
    def scores(self) -> Path:
        """Where its answers to the test documents lie: a folder for the world, a file for the real pair."""
        if self.way in ENDS and self.pair == "world":
            return DEMOS / f"seed-{self.seed}" / "report" / "evaluations" / self.way
        if self.way in ENDS:
            return REAL_PAIR / "scores" / ("base.json" if self.way == "base" else "questions-full-expert.json")
        return self.folder / ("scores" if self.pair == "world" else "scores.json")

    @property
    def is_scored(self) -> bool:
        return (self.scores / EVALUATION if self.pair == "world" else self.scores).is_file()


# -- which runs, and their commands ------------------------------------------------------------------------------------


def seeds_of(pair: str, way: str) -> tuple[int, ...]:
    """The real pair has one base and one expert, so merges of them differ only where they draw at random."""
    is_single = pair == "real" and (way in ENDS or (way in MERGES and way != "dare_ties"))
    return SEEDS[:1] if is_single else SEEDS


def grid_runs(pair: str, way: str) -> list[Run]:
    """The runs that a way's learning rate is chosen from: the first seed's, at its first setting."""
    settings = WAYS[pair][way]
    return [Run(pair, way, settings.settings[0], SEEDS[0], rate) for rate in settings.rates]


def planned_runs(rates: Mapping[tuple[str, str], float]) -> list[Run]:
    """Everything that is to be in the results, as far as its learning rate is chosen."""
    found = []
    for pair, ways in WAYS.items():
        found += [Run(pair, way, None, seed, None) for way in ENDS for seed in seeds_of(pair, way)]
        for name, way in ways.items():
            if not way.rates or (pair, name) in rates:
                rate = rates.get((pair, name))
                found += [Run(pair, name, at, seed, rate) for at in way.settings for seed in seeds_of(pair, name)]
    return found


def command(run: Run) -> str:
    """What makes and scores a run, in one line of the shell."""
    words = ["dae", "run", str(RECIPES / f"{run.pair}_{WAYS[run.pair][run.way].recipe}.yaml"), *assignments(run)]
    if run.pair == "world":  # inside the demo's folder
        words[2] = f"../../../{words[2]}"
        return f"(cd {DEMOS}/seed-{run.seed} && {shlex.join(words)})"
    tasks = ["real_stories", "real_story_endings"]
    tasks += [] if run.part == "distillation" else ["real_hetpqa", "real_epqa"]
    scoring = ["python", "benchmarks/real_pair_scores.py", str(run.folder / "student"), str(run.scores)]
    return f"{shlex.join(words)} && {shlex.join([*scoring, '--limit', str(LIMIT), '--tasks', *tasks])}"


def assignments(run: Run) -> list[str]:
    """key=value of a run's recipe."""
    way = WAYS[run.pair][run.way]
    keys = list(way.keys)
    if run.way in MERGES:
        keys.append(f"weight={run.at!r}")
    elif run.at is not None and run.pair == "world":
        keys += [f"data.shop.0.share={run.at!r}", f"data.general.0.share={round(1 - run.at, 9)!r}"]
    elif run.at not in (None, 1.0):
        keys.append(f"weights={{domain: {run.at!r}, general: 1.0}}")
    if run.rate is not None:
        keys.append(f"train.learning_rate={run.rate!r}")
    if run.rate is not None or run.way == "dare_ties":
        keys.append(f"seed={run.seed}")
    output = f"trade_off/{run.name}" if run.pair == "world" else str(run.folder)
    return [f"output={output}", *(f"stages.student.{key}" for key in keys)]


def missing_commands() -> list[str]:
    """What can be run now: what all start from; then what learning rates are chosen from, and merges; then the rest."""
    first = []
    for seed in SEEDS:
        demo = DEMOS / f"seed-{seed}"
        if not (demo / "report" / "report.json").is_file():
            first.append(f"dae demo --output {demo} --seed {seed}")
        elif not (demo / "small" / "config.json").is_file():
            first.append(f"python benchmarks/trade_off_inputs.py world {demo} --seed {seed}")
    if not (WORK / "small" / "config.json").is_file():
        first.append(f"python benchmarks/trade_off_inputs.py real {WORK / 'small'}")
    if not all(run.is_scored for run in planned_runs({}) if run.pair == "real" and run.way in ENDS):
        first.append("dae run benchmarks/recipes/real_pair.yaml && python benchmarks/real_pair.py")
    if first:
        return first
    grids = [run for pair in WAYS for way in WAYS[pair] for run in grid_runs(pair, way)]
    wanted = dict.fromkeys([*planned_runs(chosen_rates(tuning())), *grids])
    return [command(run) for run in wanted if run.way not in ENDS and not run.is_scored]


# -- figures -----------------------------------------------------------------------------------------------------------
# Embedded world: accuracy on 0..1, a mean over tasks. Real pair: bits per byte, lower is better. Of its documents every
# third product question and every third story is for validation; product questions whose evidence text is that of a
# training row are left out of both.


def figures_of(run: Run) -> dict[str, float]:
    """A run's figures on test documents."""
    if run.pair == "real":
        return real_figures(run.scores, is_validation=False)
    means = task_means(run.scores)
    if run.part == "distillation":  # students that know no shop: all nine general skills
        return {"general": mean_of(means, GENERAL_SKILLS)}
    groups = {"domain": ALIGNED_KINDS, "general": ALIGNED_SKILLS}
    groups |= {"domain, not aligned": UNALIGNED_KINDS, "general, not aligned": UNALIGNED_SKILLS}
    return {name: mean_of(means, names) for name, names in groups.items()}


def validation_score(run: Run) -> float | None:
    """One number, higher is better, on validation documents: the mean of domain and general. None: not scored yet."""
    if not run.is_scored:
        return None
    if run.pair == "world":
        means = task_means(run.folder / "validation")
        skills = GENERAL_SKILLS if run.part == "distillation" else ALIGNED_SKILLS
        general = mean_of(means, [skill for skill in skills if f"world_{skill}" in means])
        return general if run.part == "distillation" else (mean_of(means, ALIGNED_KINDS) + general) / 2
    found = real_figures(run.scores, is_validation=True)
    named = [found[name] for name in ("hetPQA", "general") if name in found]
    return -sum(named) / len(named)


@cache  # a finished evaluation does not change
def task_means(folder: Path) -> dict[str, float]:
    return {name: task.mean for name, task in read_evaluation(folder).tasks.items()}


def mean_of(means: Mapping[str, float], names: Any) -> float:
    return float(np.mean([means[f"world_{name}"] for name in names]))


@cache
def real_figures(path: Path, *, is_validation: bool, shared: Path = SHARED) -> dict[str, float]:
    """Bits per byte on product questions and stories, accuracy on story endings, of the first LIMIT documents."""
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    scores = {task: np.array([each["score"] for each in of["documents"][:LIMIT]]) for task, of in tasks.items()}
    found = {}
    for name, task in (("hetPQA", "real_hetpqa"), ("ePQA", "real_epqa"), ("general", "real_stories")):
        if task in scores and not (task == "real_epqa" and is_validation):
            bits_D = scores[task]
            kept_D = np.arange(len(bits_D)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
            kept_D = np.full(len(bits_D), True) if task == "real_epqa" else kept_D == is_validation
            if task == "real_hetpqa":
                kept_D &= new_evidence(shared)[: len(bits_D)]
            found[name] = float(bits_D[kept_D].sum() / completion_bytes(shared, task)[: len(bits_D)][kept_D].sum())
    if is_validation:
        return found
    if "hetPQA" in found:
        found["domain"] = (found["hetPQA"] + found["ePQA"]) / 2
    return {**found, "story endings": float(scores["real_story_endings"].mean())}


# -- learning rates and results ----------------------------------------------------------------------------------------


def tuning() -> list[dict[str, Any]]:
    """Every way that trains: its validation score by learning rate, and the best one, or the lower of equals.

    `chosen` is None until all have been scored. Where it stands at an end of the grid, the table says so: add a rate.
    """
    found = []
    for pair, ways in WAYS.items():
        for name in (name for name, way in ways.items() if way.rates):
            scores = {run.rate: validation_score(run) for run in grid_runs(pair, name)}
            known = {rate: score for rate, score in scores.items() if score is not None}
            chosen = max(known, key=known.__getitem__) if len(known) == len(scores) else None
            by_rate = {str(rate): score for rate, score in scores.items()}
            found.append({"pair": pair, "way": name, "scores": by_rate, "chosen": chosen})
    return found


def chosen_rates(tuned: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(line["pair"], line["way"]): line["chosen"] for line in tuned if line["chosen"] is not None}


def results() -> dict[str, Any]:
    """What tables and picture are made from."""
    tuned = tuning()
    runs = planned_runs(chosen_rates(tuned))
    lines: dict[tuple[str, str, float | None], dict[str, Any]] = {}
    for run in runs:
        way = WAYS[run.pair].get(run.way)
        line: dict[str, Any] = {"pair": run.pair, "way": run.way, "part": run.part}
        line |= {"title": way.title if way else run.way, "setting": way.setting if way else ""}
        line |= {"at": run.at, "learning_rate": run.rate, "figures": {}}
        lines.setdefault((run.pair, run.way, run.at), line)["figures"][str(run.seed)] = figures_of(run)
    examples = {(run.pair, run.way): command(run) for run in reversed(runs) if run.way not in ENDS}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seeds": list(SEEDS),
        "tuning": tuned,
        "results": list(lines.values()),
        "commands": list(examples.values()),
    }


def main() -> None:
    """Print what is missing; write the results where nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    output = parser.parse_args().output
    missing = missing_commands()
    if missing:
        print("\n".join(missing))
    else:
        write_tables(results(), output)


if __name__ == "__main__":
    main()
