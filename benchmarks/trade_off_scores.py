"""The figures of benchmarks/trade_off.py: what each run answered, as a few numbers, and the learning rates they choose.

Embedded world: accuracy on 0..1, a mean over tasks. Real pair: bits per byte, lower is better. Of its documents every
third product question and every third story is for validation; product questions whose evidence text is that of a
training row are left out of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from dae_eval.folders import EVALUATION, read_evaluation
from numpy.typing import NDArray

from benchmarks.real_pair import completion_bytes, new_evidence
from benchmarks.trade_off_plan import (
    GRID,
    WAYS,
    Pair,
    Plan,
    Run,
    grid_runs,
    planned_runs,
    seeds_of,
    test_scores,
    tuned_ways,
    validation_scores,
    widened,
)
from dae.demo.world import ALIGNED_KINDS, ALIGNED_SKILLS, GENERAL_SKILLS, UNALIGNED_KINDS, UNALIGNED_SKILLS

Figures = Mapping[str, float]

WORLD_FIGURES = {
    "domain": ALIGNED_KINDS,
    "general": ALIGNED_SKILLS,
    "domain, not aligned": UNALIGNED_KINDS,
    "general, not aligned": UNALIGNED_SKILLS,
}
HIGHER_IS_BETTER: Mapping[Pair, bool] = {"world": True, "real": False}
VALIDATION_EVERY = 3


# -- one run -----------------------------------------------------------------------------------------------------------


def test_figures(plan: Plan, run: Run) -> Figures | None:
    """A run's figures on test documents; None where it has not been scored yet."""
    path = test_scores(plan, run)
    if run.pair == "world":
        return world_figures(path, run.part == "distillation") if (path / EVALUATION).is_file() else None
    return real_figures(path, plan.shared, plan.limit, is_validation=False) if path.is_file() else None


def validation_score(plan: Plan, run: Run) -> float | None:
    """One number, higher is better, on validation documents: the mean of domain and general figures."""
    path = validation_scores(plan, run)
    if run.pair == "world":
        if not (path / EVALUATION).is_file():
            return None
        means = task_means(path)
        if run.part == "distillation":
            return mean_of(means, [skill for skill in GENERAL_SKILLS if f"world_{skill}" in means])
        aligned = [skill for skill in ALIGNED_SKILLS if f"world_{skill}" in means]
        return (mean_of(means, ALIGNED_KINDS) + mean_of(means, aligned)) / 2
    if not path.is_file():
        return None
    found = real_figures(path, plan.shared, plan.limit, is_validation=True)
    named = [found[name] for name in ("hetPQA", "general") if name in found]
    return -sum(named) / len(named)


@cache  # a finished evaluation does not change
def task_means(folder: Path) -> dict[str, float]:
    return {name: task.mean for name, task in read_evaluation(folder).tasks.items()}


def mean_of(means: Mapping[str, float], names: Any) -> float:
    return float(np.mean([means[f"world_{name}"] for name in names]))


def world_figures(folder: Path, general_alone: bool) -> Figures:
    """Means over the tasks of each group; for students that know no shop over all nine general skills."""
    means = task_means(folder)
    if general_alone:
        return {"general": mean_of(means, GENERAL_SKILLS)}
    return {name: mean_of(means, names) for name, names in WORLD_FIGURES.items()}


@cache
def real_figures(path: Path, shared: Path, limit: int, *, is_validation: bool) -> dict[str, float]:
    """Bits per byte on product questions and stories, accuracy on story endings, of the first `limit` documents."""
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    found = {}
    for name, task in (("hetPQA", "real_hetpqa"), ("ePQA", "real_epqa"), ("general", "real_stories")):
        if task in tasks:
            bits_D = np.array([document["score"] for document in tasks[task]["documents"][:limit]])
            kept_D = kept_documents(shared, task, is_validation)[: len(bits_D)]
            if kept_D.any():
                found[name] = float(bits_D[kept_D].sum() / completion_bytes(shared, task)[: len(bits_D)][kept_D].sum())
    if is_validation:
        return found
    if "hetPQA" in found:
        found["domain"] = (found["hetPQA"] + found["ePQA"]) / 2
    found["story endings"] = float(np.mean([d["score"] for d in tasks["real_story_endings"]["documents"][:limit]]))
    return found


@cache
def kept_documents(shared: Path, task: str, is_validation: bool) -> NDArray[np.bool_]:
    """[D] which documents of a task in bits are test documents, or validation documents."""
    documents = len(completion_bytes(shared, task))
    if task == "real_epqa":
        return np.full(documents, not is_validation)
    is_third_D = np.arange(documents) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    kept_D: NDArray[np.bool_] = is_third_D == is_validation
    return kept_D & new_evidence(shared) if task == "real_hetpqa" else kept_D


# -- learning rates ----------------------------------------------------------------------------------------------------


def tuning(plan: Plan) -> list[dict[str, Any]]:
    """For every way that trains: its score on validation documents by learning rate, None where that run is missing,
    and the one chosen: the best once it lies between two worse ones (or at the limits), the lower one of equals.
    """
    found = []
    for pair, way in tuned_ways(plan):
        scores, chosen = search(plan, pair, way)
        found.append(
            {"pair": pair, "way": way, "scores": {str(rate): scores[rate] for rate in scores}, "chosen": chosen}
        )
    return found


def search(plan: Plan, pair: Pair, way: str) -> tuple[dict[float, float | None], float | None]:
    """(score by learning rate over the grid as far as it is known to go, the rate chosen or None)."""
    rates: tuple[float, ...] = GRID
    while True:
        runs = grid_runs(plan, pair, way, rates)
        scores = {rate: validation_score(plan, run) for rate, run in zip(rates, runs, strict=True)}
        known = {rate: score for rate, score in scores.items() if score is not None}
        if len(known) < len(scores):
            return scores, None
        best = max(known, key=lambda rate: known[rate])  # the first, so the lowest of equals
        if widened(rates, best) == rates:
            return scores, best
        rates = widened(rates, best)


def grids(tuned: list[dict[str, Any]]) -> dict[tuple[Pair, str], tuple[float, ...]]:
    """The learning rates that are to be tried, as far as they are known."""
    return {(line["pair"], line["way"]): tuple(map(float, line["scores"])) for line in tuned}


def chosen_rates(tuned: list[dict[str, Any]]) -> dict[tuple[Pair, str], float]:
    return {(line["pair"], line["way"]): line["chosen"] for line in tuned if line["chosen"] is not None}


# -- all runs ----------------------------------------------------------------------------------------------------------


def collect(plan: Plan) -> dict[str, Any]:
    """What is finished, as the record that tables and picture are made from.

    results: pair, way, part, title, setting, at, learning_rate (and whether it has been chosen), planned seeds, and
    figures by seed. planned: every model that is to be scored, and whether it has been.
    """
    tuned = tuning(plan)
    rates = chosen_rates(tuned)
    results: dict[tuple[Pair, str, float | None], dict[str, Any]] = {}
    planned = []
    for run in planned_runs(plan, rates):
        figures = test_figures(plan, run)
        setting = "" if run.at is None else f" {run.at:g}"
        name = f"{run.way}{setting}"
        planned.append(
            {"pair": run.pair, "part": run.part, "name": name, "seed": run.seed, "scored": figures is not None}
        )
        if figures is not None:
            line = results.setdefault((run.pair, run.way, run.at), line_of(plan, run, (run.pair, run.way) in rates))
            line["figures"][str(run.seed)] = figures
    return {"seeds": list(plan.seeds), "tuning": tuned, "results": list(results.values()), "planned": planned}


def line_of(plan: Plan, run: Run, is_chosen: bool) -> dict[str, Any]:
    way = WAYS[run.pair].get(run.way)
    return {
        "pair": run.pair,
        "way": run.way,
        "part": run.part,
        "title": run.way if way is None else way.title,
        "setting": "" if way is None else way.setting,
        "at": run.at,
        "learning_rate": run.rate,
        "is_rate_chosen": is_chosen,
        "planned_seeds": len(seeds_of(plan, run.pair, run.way)),
        "figures": {},
    }
