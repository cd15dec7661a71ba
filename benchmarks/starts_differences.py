"""Two ways of benchmarks/starts.py on the same documents, seed by seed, with 95 % intervals.

Intervals are two-sided percentile intervals of a paired bootstrap: documents that share a source are drawn together,
with replacement within each task, for both students at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from dae_eval.folders import read_evaluation
from numpy.typing import NDArray

from benchmarks.real_pair_scores import LEVEL, RESAMPLES, SHARED, completion_bytes
from benchmarks.real_pair_tables import BIT_TASKS
from benchmarks.starts_ways import GROUPS, LOSSES, REAL, Run, Way, chosen, scores_file
from benchmarks.trade_off import VALIDATION_EVERY

# Pair, then the first way and the one that is taken from it: start, loss, steps, and ALL_WEIGHTS where these train.
ALL_WEIGHTS = "all weights"
Name = tuple[str, str, int] | tuple[str, str, int, str]
COMPARED: Sequence[tuple[str, Name, Name]] = (
    ("world", ("auto", "dae", 900), ("base", "dae", 900)),
    ("world", ("auto", "dae", 450), ("base", "dae", 900)),
    ("world", ("auto", "dae", 900), ("auto", "ntp", 900)),
    ("world", ("base", "dae", 900), ("base", "ntp", 900)),
    ("category", ("auto", "dae", 300), ("base", "dae", 300)),
    ("category", ("auto", "dae", 300), ("base", "dae", 600)),
    ("category", ("auto", "dae", 300), ("auto", "ntp", 300)),
    ("questions", ("auto", "dae", 300), ("base", "dae", 300)),
    ("questions", ("auto", "dae", 300), ("base", "dae", 600)),
    ("questions", ("auto", "dae", 300), ("auto", "ntp", 300)),
    *(
        (pair, ("auto", "dae", 300, ALL_WEIGHTS), (start, loss, 300, ALL_WEIGHTS))
        for pair in REAL
        for start, loss in (("base", "dae"), ("auto", "ntp"))
    ),
)
Floats = NDArray[np.float64]


def differences(ways: Sequence[Way]) -> list[dict[str, Any]]:
    """For each comparison and seed that both have a student of: value, low and high of each figure.

    Ways with a searched rate and no budget.
    """
    plain = [way for way in ways if way.budget is None and way.searched and not way.merge]
    by_name = {(way.pair, *name_of(way)): way for way in plain}
    found = []
    for pair, *names in COMPARED:
        if any((pair, *name) not in by_name for name in names):
            continue
        first, second = (by_name[(pair, *name)] for name in names)
        for seed in first.seeds:
            runs = [Run(way, rate, seed) for way in (first, second) if (rate := chosen(way)[0]) is not None]
            if len(runs) == 2 and all(run.is_scored for run in runs):
                figures = {name: [float(x) for x in of] for name, of in difference(*runs).items()}
                found.append({"pair": pair, "first": names[0], "second": names[1], "seed": seed, "figures": figures})
    return found


def name_of(way: Way) -> Name:
    name = (way.start, way.loss, way.steps)
    return (*name, ALL_WEIGHTS) if way.all_weights else name


def difference(first: Run, second: Run) -> dict[str, tuple[float, float, float]]:
    """First minus second, and the ends of its interval."""
    compare = world_samples if first.way.pair == "world" else real_samples
    both = [compare(run) for run in (first, second)]
    found = {}
    for name in both[0]:
        drawn = [one[name](np.random.default_rng(0)) for one in both]  # the same documents for both
        values_R = drawn[0] - drawn[1]
        low, high = np.quantile(values_R[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = (values_R[0], low, high)
    return found


Samples = Callable[[np.random.Generator], Floats]  # [1 + R]: the figure itself, then of resampled documents


def world_samples(run: Run) -> dict[str, Samples]:
    tasks = read_evaluation(run.folder / "scores").tasks

    def of_group(names: Sequence[str]) -> Samples:
        def draw(rng: np.random.Generator) -> Floats:
            means = [task_samples(tasks[f"world_{name}"].documents, rng) for name in names]
            return np.asarray(np.mean(means, axis=0))

        return draw

    return {group: of_group(names) for group, names in GROUPS.items()}


def task_samples(documents: Sequence[Any], rng: np.random.Generator) -> Floats:
    """Means of clusters of equal size: the means of their means."""
    clusters = np.unique([document.cluster for document in documents], return_inverse=True)[1]
    scores_D = np.array([document.score for document in documents])
    sums_C, sizes_C = np.bincount(clusters, scores_D), np.bincount(clusters).astype(np.float64)
    return ratio_samples(sums_C, sizes_C, rng)


def real_samples(run: Run) -> dict[str, Samples]:
    """Of the documents that no choice was made on."""
    tasks = json.loads(scores_file(run.folder.name).read_text(encoding="utf-8"))["tasks"]

    def of_task(task: str) -> Samples:
        scores_D = np.array([each["score"] for each in tasks[task]["documents"]])
        sizes_D = np.ones_like(scores_D)
        if task in BIT_TASKS:
            sizes_D = completion_bytes(SHARED, task)[: len(scores_D)]
        kept_D = np.arange(len(scores_D)) % VALIDATION_EVERY != VALIDATION_EVERY - 1
        return lambda rng: ratio_samples(scores_D[kept_D], sizes_D[kept_D], rng)

    return {run.way.pair: of_task(REAL[run.way.pair]), "stories": of_task("real_stories")}


def ratio_samples(sums_C: Floats, sizes_C: Floats, rng: np.random.Generator) -> Floats:
    """[1 + R] sum of the sums over sum of the sizes: of all, and of R resamples."""
    drawn_RC = rng.integers(len(sums_C), size=(RESAMPLES, len(sums_C)))
    resampled_R = sums_C[drawn_RC].sum(axis=1) / sizes_C[drawn_RC].sum(axis=1)
    return np.concatenate([[sums_C.sum() / sizes_C.sum()], resampled_R])


def summary_rows(found: Sequence[Mapping[str, Any]], units: Mapping[str, float]) -> list[list[str]]:
    """A row for each comparison: the mean over its runs, the lowest and the highest, and where intervals exclude 0."""
    rows = []
    for title in dict.fromkeys(map(title_of, found)):
        same = [one["figures"] for one in found if title_of(one) == title]
        rows.append([f"{title} ({len(same)} runs)", *(summary(same, name, unit) for name, unit in units.items())])
    return rows


def summary(figures: Sequence[Mapping[str, Any]], name: str, unit: float) -> str:
    """`+2.1 (-0.3 to +4.6); 2 above 0`"""
    values = [unit * one[name][0] for one in figures]
    above, below = sum(one[name][1] > 0 for one in figures), sum(one[name][2] < 0 for one in figures)
    counts = [f"{count} {side} 0" for count, side in ((above, "above"), (below, "below")) if count]
    return "; ".join([signed(sum(values) / len(values), min(values), max(values), unit), *counts])


def signed(value: float, low: float, high: float, unit: float) -> str:
    """`+2.1 (-0.3 to +4.6)`"""
    digits = 1 if unit > 1 else 3
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def difference_rows(found: Sequence[Mapping[str, Any]], units: Mapping[str, float]) -> list[list[str]]:
    """A row for each comparison and seed."""
    titles = list(dict.fromkeys(map(title_of, found)))
    rows = []
    for one in sorted(found, key=lambda one: titles.index(title_of(one))):
        cells = [signed(*(unit * x for x in one["figures"][name]), unit) for name, unit in units.items()]
        rows.append([title_of(one), str(one["seed"]), *cells])
    return rows


def title_of(one: Mapping[str, Any]) -> str:
    """`auto, DAE, 300; minus base, DAE, 600`"""
    return "; minus ".join(
        ", ".join([start, LOSSES[loss], str(steps), *rest])
        for start, loss, steps, *rest in (one["first"], one["second"])
    )
