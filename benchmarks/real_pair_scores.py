"""Scores of any metric, bits too, and two numbers on documents that all models answered.

    python benchmarks/real_pair_scores.py CKPT FILE --tasks real_hetpqa real_stories    # scores one checkpoint

`dae report` takes scores on 0..1 only. One value per document: D documents of a task, M models, R resamples.
Intervals are two-sided 95 % percentile intervals of a paired bootstrap: the same documents are drawn, with replacement
within each task, for all models at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from dae_eval.benchmarks import load_tasks
from dae_eval.harness import Harness, name_of, run_task, version_of
from numpy.typing import NDArray
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.real_pair_tables import BIT_TASKS
from kd.errors import UserError
from kd.models.checkpoint_files import model_fingerprint
from kd.runs.files import write_text_durably

SHARED = Path("../shared")  # the model and the rows, as from the repository's root
TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Document:
    """One document's value of any metric, on 0..1 or not. (`id`, `hash`) is what two models are joined on."""

    id: int
    hash: str
    score: float


@dataclass(frozen=True)
class TaskScores:
    """A model's values on one task, document by document, in the task's order."""

    task: str
    version: str
    metric: str
    documents: tuple[Document, ...]

    @property
    def mean(self) -> float:
        """The task's score, in the metric's unit."""
        return sum(document.score for document in self.documents) / len(self.documents)


Scores = Mapping[str, NDArray[np.float64]]  # task -> [D]
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


def paired(*models: Mapping[str, TaskScores]) -> list[dict[str, NDArray[np.float64]]]:
    """Each model's scores by task, over the same documents in the same order. Raises UserError where those differ."""
    first = models[0]
    for other in models[1:]:
        if other.keys() != first.keys():
            raise UserError(f"scores of different tasks cannot be paired: {sorted(first.keys() ^ other.keys())}")
        for task, scores in first.items():
            if [(d.id, d.hash) for d in scores.documents] != [(d.id, d.hash) for d in other[task].documents]:
                raise UserError(f"task {task}: the models answered different documents; score all on the same files")
    return [{task: np.array([d.score for d in s.documents]) for task, s in model.items()} for model in models]


def gain(base: Scores, expert: Scores, *, seed: int = 0) -> Estimate:
    """sum over tasks of (expert - base), with its interval: the gap that a student can close."""
    means, resampled = _task_means((base, expert), seed)
    return _estimate(_gap(means), _gap(resampled))


def gap_closed(base: Scores, expert: Scores, student: Scores, *, seed: int = 0) -> Estimate | None:
    """sum over tasks of (student - base) / sum over tasks of (expert - base): 1 is all of the expert's gain.

    None ("undefined") where the expert's gain is not clearly above 0, that is, where its interval reaches 0 or below.
    """
    if gain(base, expert, seed=seed).low <= 0:
        return None
    means, resampled = _task_means((base, expert, student), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _gap(resampled[[0, 2]]) / _gap(resampled)
    return _estimate(_gap(means[[0, 2]]) / _gap(means), ratios)


def retention(reference: Scores, student: Scores, *, seed: int = 0) -> Estimate | None:
    """100 x macro-mean over tasks of student score / reference score. None where the reference scores 0 on a task."""
    means, resampled = _task_means((reference, student), seed)
    if (means[0] == 0).any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = 100 * (resampled[1] / resampled[0]).mean(axis=0)
    return _estimate(100 * (means[1] / means[0]).mean(axis=0), ratios)


def _gap(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2 or more models, tasks, R] -> [R]: by how much the second model's sum over tasks exceeds the first's."""
    difference: NDArray[np.float64] = (means[1] - means[0]).sum(axis=0)
    return difference


def _task_means(models: Sequence[Scores], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Task means on the documents as they are, [M, tasks, 1], and on joint resamples of them, [M, tasks, R]."""
    rng = np.random.default_rng(seed)
    means, resampled = [], []
    for task in models[0]:
        scores_MD = np.stack([model[task] for model in models])
        n = scores_MD.shape[1]
        drawn_RD = rng.integers(n, size=(RESAMPLES, n))
        means.append(scores_MD.mean(axis=1, keepdims=True))
        resampled.append(np.stack([scores[drawn_RD].mean(axis=1) for scores in scores_MD]))
    return np.stack(means, axis=1), np.stack(resampled, axis=1)


def _estimate(value: NDArray[np.float64], resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value[0]), float(low), float(high))


def score_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path,
    metadata: Mapping[str, Any] | None = None,
    metric: str = "acc",
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, TaskScores]:
    """Score `model` as it stands (active adapter, weights) by any metric, also one that is not on 0..1 (bits).

    `metadata` reaches the tasks' loading functions, `limit` takes only the first documents of each task. No chat
    template; global random state and the modules' training modes stay as they were.

    Raises:
        UserError: a task that is not there, or that has no such metric.
    """
    loaded = load_tasks(tasks, include_path, metadata or {})
    harness = Harness(model, tokenizer, batch_size=batch_size)
    return {name: _task_scores(task, metric, run_task(harness, task, limit, False)) for name, task in loaded.items()}


def _task_scores(task: Any, metric: str, samples: Sequence[Mapping[str, Any]]) -> TaskScores:
    if metric not in samples[0]:
        raise UserError(f"task {name_of(task)}: no metric {metric!r}; it has {', '.join(samples[0]['metrics'])}")
    documents = tuple(Document(int(s["doc_id"]), str(s["doc_hash"]), float(s[metric])) for s in samples)
    return TaskScores(name_of(task), version_of(task), metric, documents)


# -- documents and checkpoints of ../shared ----------------------------------------------------------------------------


def evaluate(checkpoint: str, shared: Path, tasks: Sequence[str], scores: Path, limit: int | None = None) -> None:
    """Score a checkpoint and write {"fingerprint", "tasks"}; leave scores of the same weights and tasks as they are."""
    fingerprint = model_fingerprint(Path(checkpoint))
    if scores.is_file():
        known = json.loads(scores.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint and set(tasks) <= known["tasks"].keys() and known["limit"] == limit:
            return
    found = score_checkpoint(checkpoint, shared, tasks, limit)
    scores.parent.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": fingerprint, "limit": limit, "tasks": {task: asdict(found[task]) for task in tasks}}
    write_text_durably(scores, json.dumps(record))  # whole or not at all: others read while this one writes


def score_checkpoint(
    checkpoint: str, shared: Path, tasks: Sequence[str], limit: int | None = None
) -> dict[str, TaskScores]:
    """lm-eval on a checkpoint as plain transformers and peft open it; an adapter is merged into its base."""
    torch.set_flush_denormal(True)
    if (Path(checkpoint) / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found: dict[str, TaskScores] = {}
    for metric in ("bits", "acc"):
        chosen = [task for task in tasks if (task in BIT_TASKS) == (metric == "bits")]
        if chosen:
            metadata = {"shared": str(shared)}
            found |= score_tasks(
                model, tokenizer, chosen, include_path=TASKS, metadata=metadata, metric=metric, limit=limit
            )
    return found


def completion_bytes(shared: Path, task: str) -> NDArray[np.float64]:
    """[D] bytes of what is scored in each document of a task in bits."""
    source = yaml.safe_load((TASKS / f"{task.removeprefix('real_')}.yaml").read_text(encoding="utf-8"))[
        "dataset_kwargs"
    ]
    lines = (shared / "data" / source["file"]).read_text(encoding="utf-8").splitlines()
    texts = [row.get("completion") or row["text"][: source["first_characters"]] for row in map(json.loads, lines)]
    return np.array([len(text.encode()) for text in texts], dtype=np.float64)


def new_evidence(shared: Path) -> NDArray[np.bool_]:
    """[D] the documents of hetPQA whose evidence text no training row has."""

    def evidence(file: str) -> list[str]:
        prompts = [
            json.loads(line)["prompt"] for line in (shared / "data" / file).read_text(encoding="utf-8").splitlines()
        ]
        return [next((part for part in prompt.split("\n") if part.startswith("Evidence: ")), "") for prompt in prompts]

    seen = set(evidence("ecom/train.jsonl")) - {""}
    return np.array([text not in seen for text in evidence("ecom/heldout_hetpqa.jsonl")])


def main() -> None:
    """Score one checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("scores", type=Path, help="the file to write")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="only the first documents of each task")
    given = parser.parse_args()
    evaluate(given.checkpoint, SHARED, given.tasks, given.scores, given.limit)


if __name__ == "__main__":
    main()
