"""lm-eval tasks on a model that is already in memory, document by document."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Document:
    """One scored document. (`id`, `hash`) is what scores of two models are joined on; `score` is on 0..1."""

    id: int
    hash: str
    score: float


@dataclass(frozen=True)
class TaskScores:
    """A model's scores on one task, document by document, in the task's order."""

    task: str
    version: str
    metric: str
    documents: tuple[Document, ...]

    @property
    def mean(self) -> float:
        """The task's score on 0..1."""
        return sum(document.score for document in self.documents) / len(self.documents)


def score_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path = TASKS,
    metadata: Mapping[str, Any] | None = None,
    metric: str = "acc",
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, TaskScores]:
    """Score `model` as it stands (active adapter, weights) with lm-eval on tasks defined in the folder `include_path`.

    `metadata` reaches the tasks' loading functions (for the embedded world: `{"world": folder}`). No chat template, no
    cache (lm-eval's ignores which model ran); global random state and the modules' training modes stay as they were.
    `metric` names the per-document metric that is read, `limit` takes only the first documents of each task.

    Raises UserError for a task that the folder does not define or that has no such metric.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path), include_defaults=False, metadata=dict(metadata or {}))
    unknown = sorted(set(tasks) - set(manager.all_subtasks))
    if unknown:
        raise UserError(f"{include_path}: no task {', '.join(unknown)}; there are {', '.join(manager.all_subtasks)}")
    with _as_it_was(model), _no_bars():
        with _no_loading_advice():
            loaded = manager.load(list(tasks))
            wrapped: Any = {"pretrained": model, "tokenizer": tokenizer}  # narrower types are declared than are taken
            harness = HFLM(**wrapped, batch_size=batch_size)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
        # Not simple_evaluate: it asks git, pip and the hub about the surroundings, and prints what they answer.
        results = evaluate(harness, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return {task: _task_scores(task, metric, results) for task in tasks}


def _task_scores(task: str, metric: str, results: Mapping[str, Any]) -> TaskScores:
    samples = sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))
    if metric not in samples[0]:
        raise UserError(f"task {task}: no metric {metric!r}; it has {', '.join(samples[0]['metrics'])}")
    documents = tuple(Document(int(s["doc_id"]), str(s["doc_hash"]), float(s[metric])) for s in samples)
    return TaskScores(task, str(results["versions"][task]), metric, documents)


@contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Put back afterwards each module's training mode (lm-eval calls `eval()`) and the global random states."""
    import numpy as np
    import torch

    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in modes:
            module.training = training


@contextmanager
def _no_loading_advice() -> Iterator[None]:
    """lm-eval advises, once per task, how to pass metadata on its command line; warnings while scoring are kept."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """lm-eval has no switch for its progress bars, which would break into the display of whoever calls."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    tqdm = modules[0].tqdm

    def silent(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **{**options, "disable": True})

    for module in modules:
        module.tqdm = silent
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
