"""The main job on a real pretrained model and real rows: scores of recipes/real_pair.yaml's models, and the tables.

    dae run benchmarks/recipes/real_pair.yaml    # from the repository's root; needs ../shared
    python benchmarks/real_pair.py

Scores every model that the recipe has finished and that has no scores yet, and writes real_pair.json and real_pair.md
from what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_pair_scores import (
    SHARED,
    Document,
    Estimate,
    Scores,
    TaskScores,
    completion_bytes,
    evaluate,
    gain,
    gap_closed,
    new_evidence,
    paired,
    retention,
)
from benchmarks.real_pair_tables import BIT_TASKS, ENDINGS, STORIES, markdown

WORK = Path("runs/real_pair")  # where the recipe writes; scores lie in WORK/scores
TASKS = {"questions": ("real_hetpqa", "real_epqa"), "category": ("real_category",)}  # of each set of rows
STUDENTS = ("lora", "full")
SEEDS = (0, 1, 2)
COMMANDS = ("dae run benchmarks/recipes/real_pair.yaml", "python benchmarks/real_pair.py")


def run_name(set_name: str, student: str, role: str, seed: int | None = None) -> str:
    """A stage of the recipe: `category-lora-expert`, `category-lora-dae-0`, ..."""
    return f"{set_name}-{student}-{role}" + ("" if seed is None else f"-{seed}")


def score_all(work: Path, shared: Path) -> None:
    """Score the base and every finished run on its set's tasks and on both general ones."""
    everything = [task for tasks in TASKS.values() for task in tasks]
    evaluate(str(shared / "models/stories260k"), shared, [*everything, STORIES, ENDINGS], scores_file(work, "base"))
    for folder in sorted(work.iterdir()):
        set_name = folder.name.split("-")[0]
        if set_name in TASKS and any(folder.glob("*.safetensors")):
            evaluate(str(folder), shared, [*TASKS[set_name], STORIES, ENDINGS], scores_file(work, folder.name))


def scores_file(work: Path, name: str) -> Path:
    return work / "scores" / f"{name}.json"


def read_scores(work: Path, shared: Path, name: str) -> dict[str, TaskScores] | None:
    """A run's scores, all of them such that higher is better; None where it has not been scored yet.

    Tasks in bits become minus bits per byte over the whole task: a document counts as -bits / (mean bytes).
    """
    if not scores_file(work, name).is_file():
        return None
    found = {}
    for task, record in json.loads(scores_file(work, name).read_text(encoding="utf-8"))["tasks"].items():
        documents = [Document(**document) for document in record["documents"]]
        found[task] = TaskScores(**{**record, "documents": tuple(documents)})
        if task not in BIT_TASKS:
            continue
        bytes_D = completion_bytes(shared, task)[: len(documents)]
        found[task] = per_byte(found[task], np.ones(len(documents), dtype=np.bool_), bytes_D)
        if task == "real_hetpqa":
            kept_D = new_evidence(shared)[: len(documents)]
            found[f"{task}_unshared"] = per_byte(
                TaskScores(**{**record, "documents": tuple(documents)}), kept_D, bytes_D
            )
    return found


def per_byte(bits: TaskScores, kept_D: NDArray[np.bool_], bytes_D: NDArray[np.float64]) -> TaskScores:
    """Scores in bits as parts of minus bits per byte over the documents kept: their mean is that figure."""
    mean_bytes = float(bytes_D[kept_D].mean())
    kept = [document for document, keep in zip(bits.documents, kept_D, strict=True) if keep]
    documents = tuple(Document(document.id, document.hash, -document.score / mean_bytes) for document in kept)
    return TaskScores(bits.task, bits.version, "minus bits per byte", documents)


def summarise(work: Path, shared: Path, set_name: str, student: str) -> dict[str, Any] | None:
    """Figures of one set and kind of student, from the runs that have been scored; None without base and expert."""
    seeds = {
        role: [s for s in SEEDS if scores_file(work, run_name(set_name, student, role, s)).is_file()]
        for role in ("dae", "ntp")
    }
    runs = {role: [run_name(set_name, student, role, seed) for seed in seeds[role]] for role in seeds}
    names = ["base", run_name(set_name, student, "expert"), *runs["dae"], *runs["ntp"]]
    found = [read_scores(work, shared, name) for name in names]
    if found[0] is None or found[1] is None:
        return None
    tasks = list(found[1])
    arrays = dict(zip(names, paired(*({t: f[t] for t in tasks} for f in found if f is not None)), strict=True))
    base, expert = arrays["base"], arrays[names[1]]
    rows: dict[str, Any] = {"base": figures(set_name, base, expert, [base])}
    rows["expert"] = figures(set_name, base, expert, [expert])
    for role in seeds:
        if runs[role]:
            rows[role] = figures(set_name, base, expert, [arrays[name] for name in runs[role]])
    result = {"set": set_name, "student": student, "runs": runs, "rows": rows}
    both = [seed for seed in seeds["dae"] if seed in seeds["ntp"]]
    if both:
        dae, ntp = (mean_of([arrays[run_name(set_name, student, role, s)] for s in both]) for role in seeds)
        result["dae_minus_ntp"] = {task: asdict(gain({task: ntp[task]}, {task: dae[task]})) for task in tasks}
    return result


def mean_of(models: Sequence[Scores]) -> dict[str, NDArray[np.float64]]:
    """Each document's mean score over models that differ in the seed only: [D] by task."""
    return {task: np.mean([model[task] for model in models], axis=0) for task in models[0]}


def figures(set_name: str, base: Scores, expert: Scores, models: Sequence[Scores]) -> dict[str, Any]:
    """Scores by seed; gap closed, retention, loss difference of the seeds' mean with intervals over documents."""
    mean, domain = mean_of(models), TASKS[set_name]

    def of(tasks: Sequence[str], scores: Scores) -> dict[str, NDArray[np.float64]]:
        return {task: scores[task] for task in tasks}

    return {
        "scores": {task: [float(model[task].mean()) for model in models] for task in mean},
        "gap_closed": as_record(gap_closed(of(domain, base), of(domain, expert), of(domain, mean))),
        "gap_closed_by_seed": [
            as_record(gap_closed(of(domain, base), of(domain, expert), of(domain, model))) for model in models
        ],
        "stories_bits_per_byte_over_reference": as_record(gain(of([STORIES], mean), of([STORIES], base))),
        "story_endings_retention": as_record(retention(of([ENDINGS], base), of([ENDINGS], mean))),
    }


def as_record(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)


def write_results(work: Path, shared: Path, output: Path) -> None:
    """Write real_pair.json and real_pair.md from the scores that are there."""
    summaries = [summarise(work, shared, name, student) for name in TASKS for student in STUDENTS]
    results = [summary for summary in summaries if summary is not None]
    if not results:
        return
    packages = ("torch", "transformers", "peft", "lm-eval")
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "results": results,
        "commands": COMMANDS,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "real_pair.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "real_pair.md").write_text(markdown(record), encoding="utf-8")


def main() -> None:
    """Score what is there and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    output = parser.parse_args().output
    score_all(WORK, SHARED)
    write_results(WORK, SHARED, output)


if __name__ == "__main__":
    main()
