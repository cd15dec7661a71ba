"""Pair the documents that all models answered under the same conditions; only these are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dae_eval.comparing.statistics import Floats, Ints
from dae_eval.results import Document, Evaluation, TaskResult
from kd.errors import UserError

_ABSENT = object()


@dataclass(frozen=True)
class PairedTask:
    """One task on the D documents that all models answered, in the same order for all.

    result: of the first model. same: by role, the first role with the same weights, whose answers count for both.
    unpaired: documents that only some models answered. seen_D: documents that occur in any model's training rows.
    """

    result: TaskResult
    same: Mapping[str, str]
    documents: Mapping[str, tuple[Document, ...]]
    scores: Mapping[str, Floats]
    clusters_D: Ints
    seen_D: NDArray[np.bool_]
    unpaired: int


def same_weights(evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    """By role: the first role whose model has the same fingerprint (often the role itself)."""
    first: dict[str, str] = {}
    return {role: first.setdefault(one.model.fingerprint, role) for role, one in evaluations.items()}


def pair_tasks(evaluations: Mapping[str, Evaluation]) -> tuple[list[PairedTask], list[str]]:
    """The tasks that all models answered, paired by document, and notes on what was left out.

    Raises:
        UserError: models answered a task with different settings, or no document is common to all.
    """
    names = list(dict.fromkeys(task for one in evaluations.values() for task in one.tasks))
    paired, notes = [], []
    for name in names:
        results = {role: one.tasks[name] for role, one in evaluations.items() if name in one.tasks}
        if missing := [role for role in evaluations if role not in results]:
            notes.append(f"Task {name} is left out: {_listed(missing)} did not answer it.")
            continue
        _check_conditions(name, results)
        same = same_weights(evaluations)
        task = _pair(results, same)
        paired.append(task)
        notes += _notes_on(task, results)
    return paired, notes


def _check_conditions(name: str, results: Mapping[str, TaskResult]) -> None:
    first, *others = results
    for other in others:
        if differing := _differences(results[first], results[other]):
            raise UserError(
                f"task {name}: {first} and {other} cannot be compared, they differ in {'; '.join(differing)}. "
                "Evaluate both with the same suite and settings."
            )


def _differences(one: TaskResult, other: TaskResult) -> list[str]:
    return [
        f"{what} ({_shown(before)} against {_shown(now)})"
        for what, before, now in (
            *((field, getattr(one, field), getattr(other, field)) for field in ("kind", "group", "metric", "version")),
            *(
                (f"settings.{key}", one.settings.get(key, _ABSENT), other.settings.get(key, _ABSENT))
                for key in sorted({*one.settings, *other.settings})
            ),
        )
        if before != now
    ]


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)


def _pair(results: Mapping[str, TaskResult], same: Mapping[str, str]) -> PairedTask:
    first = next(iter(results.values()))
    by_key = {role: _by_key(results[role], role) for role in dict.fromkeys(same.values())}
    everywhere = [key for key in by_key[same[next(iter(results))]] if all(key in found for found in by_key.values())]
    if not everywhere:
        raise UserError(f"task {first.task}: no document was answered by all models; evaluate them on the same files.")
    documents = {role: tuple(by_key[same[role]][key] for key in everywhere) for role in results}
    seen = {(d.id, d.hash) for result in results.values() for d in result.documents if d.seen}
    clusters = [document.cluster for document in documents[next(iter(results))]]
    return PairedTask(
        result=first,
        same=same,
        documents=documents,
        scores={role: np.array([d.score for d in found], dtype=np.float64) for role, found in documents.items()},
        clusters_D=np.unique(clusters, return_inverse=True)[1].astype(np.int64),
        seen_D=np.array([key in seen for key in everywhere], dtype=np.bool_),
        unpaired=len({key for found in by_key.values() for key in found}) - len(everywhere),
    )


def _by_key(result: TaskResult, role: str) -> dict[tuple[int, str], Document]:
    found = {(document.id, document.hash): document for document in result.documents}
    if len(found) < len(result.documents):
        raise UserError(f"task {result.task}: {role} answered a document more than once; evaluate it again.")
    return found


def _notes_on(task: PairedTask, results: Mapping[str, TaskResult]) -> list[str]:
    name = task.result.task
    notes = []
    if task.unpaired:
        notes.append(f"Task {name}: {_documents(task.unpaired)} left out, answered by only some of the models.")
    if seen := int(task.seen_D.sum()):
        notes.append(
            f"Task {name}: {seen} of {_documents(len(task.seen_D))} also in training rows; "
            "scores without them are shown beside."
        )
    if task.clusters_D.max() == 0:
        notes.append(f"Task {name}: all documents share one source, so the variance is unknown.")
    for role, other in task.same.items():
        if other != role and (differing := _differing(results[role], results[other])):
            notes.append(
                f"Task {name}: {role} and {other} have the same weights, but their scores differ on "
                f"{_documents(differing)}; those of {other} count for both."
            )
    return notes


def _differing(one: TaskResult, other: TaskResult) -> int:
    scores = {(document.id, document.hash): document.score for document in other.documents}
    return sum(scores.get((d.id, d.hash), d.score) != d.score for d in one.documents)


def _documents(count: int) -> str:
    return f"{count} document{'s' if count != 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
