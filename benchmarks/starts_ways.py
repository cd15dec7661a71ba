"""The ways of benchmarks/starts.py: what is trained or merged, where it lies, what it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from dae_eval.folders import EVALUATION

from benchmarks.real_pair_scores import SHARED, completion_bytes
from benchmarks.real_pair_tables import BIT_TASKS
from benchmarks.trade_off import DEMOS, VALIDATION_EVERY, mean_of, task_means
from dae.demo.world import ALIGNED_KINDS, ALIGNED_SKILLS, UNALIGNED_KINDS, UNALIGNED_SKILLS

WORK = Path("runs/starts")
SEEDS = (0, 1, 2)
GROUPS: Mapping[str, Sequence[str]] = {
    "shop, aligned": ALIGNED_KINDS,
    "shop, not aligned": UNALIGNED_KINDS,
    "general, aligned": ALIGNED_SKILLS,
    "general, not aligned": UNALIGNED_SKILLS,
}
# Fields by which a line of starts.json is matched to its way.
WAY_FIELDS = ("pair", "start", "loss", "steps", "budget", "all_weights", "merge", "searched")
REAL = {"category": "real_category", "questions": "real_hetpqa"}  # a real pair -> the task of its domain
LOSSES = {"dae": "DAE", "ntp": "next-token loss"}


@dataclass(frozen=True)
class Way:
    """One line of the tables: a start (`base`, `auto` or a weight), a loss, the steps, the rates that are tried.

    rate_of: the way whose rate it takes instead of a search of its own. merge: the method of a merge; then `rates` are
    its coefficients, and nothing is trained. searched: its rate is the best of several on validation documents.
    """

    pair: str
    start: str
    loss: str
    steps: int
    rates: tuple[float, ...]
    budget: float | None = None
    rate_of: Way | None = None
    all_weights: bool = False
    merge: str = ""
    searched: bool = True

    @property
    def seeds(self) -> tuple[int, ...]:
        """A merge of the real pair is the same for every seed: its expert is."""
        return SEEDS[:1] if self.merge and self.pair != "world" else SEEDS


@dataclass(frozen=True)
class Run:
    """One student of a way."""

    way: Way
    rate: float
    seed: int

    @property
    def name(self) -> str:
        way = self.way
        if way.merge:
            return f"merge-{way.merge}-{self.rate:g}-{self.seed}"
        which = ("-full" if way.all_weights else "") + ("" if way.budget is None else f"-budget{way.budget:g}")
        return f"{way.start}-{way.loss}-{way.steps}{which}-lr{self.rate:g}-{self.seed}"

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

    @property
    def kl_file(self) -> Path:
        return WORK / "kl" / f"{self.way.pair}-{self.name}.json"


# The learning rates to try, the same for both losses.
COLD = {"world": (1.5e-3, 3e-3, 6e-3), "category": (1.5e-3, 5e-3), "questions": (1.5e-3, 5e-3)}
WARM = {"world": (3e-4, 1e-3, 3e-3), "category": (5e-4, 1.5e-3, 5e-3), "questions": (5e-4, 1.5e-3, 5e-3)}
RATES = {"base": COLD, "auto": WARM, "0.5": WARM}
LOW = {"base": (1e-3,), "auto": (3e-4,)}  # of the world: a third of what the search chose (arXiv 2509.20758)
RATES_OF_ALL_WEIGHTS = {"world": (1e-3,), "category": (1e-3, 3e-3), "questions": (1e-3, 3e-3)}
STEPS = {"world": 900, "category": 300, "questions": 300}
COEFFICIENTS = {
    "linear": (0.3, 0.5, 0.7),
    "slerp": (0.3, 0.5, 0.7),
    "ties": (0.5, 1.0, 1.5),
    "dare_ties": (0.3, 0.5, 0.7),
    "task_arithmetic": (0.5,),
}


def both_losses(pair: str, start: str, steps: int) -> list[Way]:
    return [Way(pair, start, loss, steps, RATES[start][pair]) for loss in LOSSES]


def all_weights(pair: str) -> list[Way]:
    """Of both starts and losses; the world's one rate was not searched."""
    searched = len(RATES_OF_ALL_WEIGHTS[pair]) > 1
    return [
        Way(pair, start, loss, STEPS[pair], RATES_OF_ALL_WEIGHTS[pair], all_weights=True, searched=searched)
        for start in ("base", "auto")
        for loss in LOSSES
    ]


def longer(way: Way) -> Way:
    """In twice the steps, at the same rate."""
    return replace(way, steps=2 * way.steps, rates=(), rate_of=way)


def halfway(way: Way) -> Way:
    """From the middle of the line, at the same rate."""
    return replace(way, start="0.5", rates=(), rate_of=way)


def within(way: Way, budget: float) -> Way:
    """With a budget, at the same rate."""
    return replace(way, budget=budget, rates=(), rate_of=way)


def merges(pair: str) -> list[Way]:
    return [Way(pair, "", "", 0, coefficients, merge=method) for method, coefficients in COEFFICIENTS.items()]


WORLD_450 = Way("world", "auto", "dae", 450, WARM["world"])
CATEGORY = {start: both_losses("category", start, 300) for start in ("base", "auto")}
QUESTIONS = {start: both_losses("questions", start, 300) for start in ("base", "auto")}
WAYS = (
    *both_losses("world", "base", 900),
    *both_losses("world", "auto", 900),
    *both_losses("world", "0.5", 900),
    WORLD_450,
    within(WORLD_450, 0.02),
    *both_losses("world", "base", 300),
    *both_losses("world", "auto", 300),
    *(Way("world", s, loss, 900, rates, searched=False) for s, rates in LOW.items() for loss in LOSSES),
    *all_weights("world"),
    *merges("world"),
    *CATEGORY["base"],
    *CATEGORY["auto"],
    *(halfway(way) for way in CATEGORY["auto"]),
    *map(longer, CATEGORY["base"] + CATEGORY["auto"]),
    within(CATEGORY["base"][0], 0.02),
    *(within(CATEGORY["auto"][0], budget) for budget in (0.02, 0.05)),
    *all_weights("category"),
    *merges("category"),
    *QUESTIONS["base"],
    *QUESTIONS["auto"],
    *(halfway(way) for way in QUESTIONS["auto"]),
    longer(QUESTIONS["base"][0]),
    *all_weights("questions"),
    *merges("questions"),
)


def with_rates_of(record: Mapping[str, Any], ways: Sequence[Way]) -> list[Way]:
    """The ways, each at the one rate that a record's search chose; what was not searched there stays as it is."""
    lines = [line for line in record["lines"] if line["all_rates_tried"]]
    known = {tuple(line[name] for name in WAY_FIELDS): line["learning_rate"] for line in lines}

    def at_known_rate(way: Way) -> Way:
        rate = known.get(tuple(getattr(way.rate_of or way, name) for name in WAY_FIELDS))
        return way if rate is None else replace(way, rates=(rate,), rate_of=None)

    return [at_known_rate(way) for way in ways]


def ways_at_rates_of(file: Path | None) -> list[Way]:
    """All ways: at the rates of an earlier starts.json, or with a search of their own."""
    return with_rates_of(json.loads(file.read_text(encoding="utf-8")), WAYS) if file else list(WAYS)


def scores_file(name: str) -> Path:
    return WORK / "scores" / f"{name}.json"


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
    """The best rate of those that were tried with the first seed, and whether all were; one alone needs no trial."""
    if way.rate_of is not None:
        return chosen(way.rate_of)
    if len(way.rates) == 1:
        return way.rates[0], True
    scores = {rate: validation_score(Run(way, rate, SEEDS[0])) for rate in way.rates}
    known = {rate: score for rate, score in scores.items() if score is not None}
    return (max(known, key=known.__getitem__) if known else None), len(known) == len(scores)


def facts_of(run: Run) -> dict[str, Any]:
    """The summary of a run that was trained."""
    found: dict[str, Any] = json.loads((run.student / "run.json").read_text(encoding="utf-8"))["summary"]
    return found


def weight_of(run: Run) -> float:
    """How far towards the expert a student started."""
    return float(next(iter(facts_of(run).get("start", {}).get("weights", {"": 0.0}).values())))
