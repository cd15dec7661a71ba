"""Pair the documents that the models of a comparison answered under the same conditions; only these are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dae_eval.comparing.statistics import Floats, Ints
from dae_eval.results import Document, Evaluation, Kind, TaskResult
from kd.errors import UserError

MOST_UNPAIRED = 0.01  # part of a task's documents that only some models answered: with more, the task is incomplete
_ABSENT = object()
_COMPARED = ("kind", "group", "metric", "version", "unit", "benchmark")


@dataclass(frozen=True)
class PairedTask:
    """One task on the D documents that the `needed` models answered, in the same order for all.

    result: of the first model. needed: the roles whose documents were paired. same: by role, the first role with the
    same weights, whose answers count for both. documents, scores: of the needed models and of others that answered all
    D documents. weights_D: of the documents in the task's mean. unpaired: documents that only some of the needed models
    answered. disagreeing: documents on which needed models of the same weights have different scores. seen_D: documents
    that occur in any model's training rows.
    """

    result: TaskResult
    needed: tuple[str, ...]
    same: Mapping[str, str]
    documents: Mapping[str, tuple[Document, ...]]
    scores: Mapping[str, Floats]
    weights_D: Floats
    clusters_D: Ints
    seen_D: NDArray[np.bool_]
    unpaired: int
    disagreeing: int

    @property
    def too_few(self) -> bool:
        """Whether more documents are unpaired than a verdict allows."""
        return self.unpaired > MOST_UNPAIRED * (len(self.clusters_D) + self.unpaired)

    @property
    def contradictory(self) -> bool:
        """Whether models with the same weights disagree on more documents than a verdict allows."""
        return self.disagreeing > MOST_UNPAIRED * len(self.clusters_D)


@dataclass(frozen=True)
class Missing:
    """A task of which a needed model has no evaluation. roles: those models."""

    task: str
    kind: Kind
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Paired:
    """The tasks of one comparison, those that could not be compared, and notes on what was left out."""

    tasks: tuple[PairedTask, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    def of(self, kind: Kind) -> tuple[PairedTask, ...]:
        return tuple(task for task in self.tasks if task.result.kind == kind and not task.result.is_loss)


def same_weights(evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    """By role: the first role whose model has the same weights and base (often the role itself)."""
    first: dict[tuple[str, str | None], str] = {}
    return {role: first.setdefault(one.model.identity, role) for role, one in evaluations.items()}


def needed_for(kind: Kind, student: str, roles: Collection[str], *, with_expert: bool) -> tuple[str, ...]:
    """The models whose answers a task of this kind needs."""
    if kind != "domain":
        return ("reference", student)
    other = "base" if "base" in roles else "reference"
    return (other, "expert", student) if with_expert else (other, student)


def pair_tasks(
    evaluations: Mapping[str, Evaluation], student: str, *, with_expert: bool = False, also: Sequence[str] = ()
) -> Paired:
    """The tasks of any model, each paired over the models that it needs: the student, and what it is compared with.

    with_expert: domain tasks also need the expert, as the gap closed does. also: other models that each task needs.

    Raises:
        UserError: models answered a task with different settings, or no document is common to the needed ones.
    """
    names = list(dict.fromkeys(task for one in evaluations.values() for task in one.tasks))
    same, paired, missing, notes = same_weights(evaluations), [], [], []
    for name in names:
        results = {role: one.tasks[name] for role, one in evaluations.items() if name in one.tasks}
        kind = next(iter(results.values())).kind
        needed = (*needed_for(kind, student, evaluations, with_expert=with_expert), *also)
        _check_conditions(name, results)
        if absent := tuple(role for role in needed if role not in results):
            missing.append(Missing(name, kind, absent))
            where = "does not count in gap closed" if with_expert else "is left out"
            notes.append(f"Task {name} {where}: {_listed(absent)} did not answer it.")
            continue
        task = _pair(results, needed, same)
        paired.append(task)
        notes += _notes_on(task, results)
    return Paired(tuple(paired), tuple(missing), tuple(notes))


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
            *((field, getattr(one, field), getattr(other, field)) for field in _COMPARED),
            *(
                (f"settings.{key}", one.settings.get(key, _ABSENT), other.settings.get(key, _ABSENT))
                for key in sorted({*one.settings, *other.settings})
            ),
        )
        if before != now
    ]


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)


def _pair(results: Mapping[str, TaskResult], needed: Sequence[str], same: Mapping[str, str]) -> PairedTask:
    first = results[needed[0]]
    owners = {role: same[role] if same[role] in results else role for role in results}
    by_key = {role: _by_key(results[role], role) for role in dict.fromkeys(owners.values())}
    asked = [by_key[owners[role]] for role in needed]
    everywhere = [key for key in asked[0] if all(key in found for found in asked)]
    if not everywhere:
        raise UserError(
            f"task {first.task}: no document was answered by {_listed(needed)}; evaluate them on the same files."
        )
    complete = [role for role in results if role in needed or all(key in by_key[owners[role]] for key in everywhere)]
    documents = {role: tuple(by_key[owners[role]][key] for key in everywhere) for role in complete}
    seen = {(d.id, d.hash) for result in results.values() for d in result.documents if d.seen}
    clusters = [document.cluster for document in documents[needed[0]]]
    return PairedTask(
        result=first,
        needed=tuple(needed),
        same=owners,
        documents=documents,
        scores={role: np.array([d.score for d in found], dtype=np.float64) for role, found in documents.items()},
        weights_D=np.array([d.weight for d in documents[needed[0]]], dtype=np.float64),
        clusters_D=np.unique(clusters, return_inverse=True)[1].astype(np.int64),
        seen_D=np.array([key in seen for key in everywhere], dtype=np.bool_),
        unpaired=len({key for found in asked for key in found}) - len(everywhere),
        disagreeing=max(_differing(results[role], results[owners[role]]) for role in needed),
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
        notes.append(
            f"Task {name}: {_documents(task.unpaired)} left out, answered by only some of {_listed(task.needed)}."
        )
    if partial := [role for role in results if role not in task.documents]:
        notes.append(f"Task {name}: {_listed(partial)} did not answer all documents, so no score of it is shown.")
    if seen := int(task.seen_D.sum()):
        beside = "; scores without them are shown beside" if seen < len(task.seen_D) else ""
        notes.append(f"Task {name}: {seen} of {_documents(len(task.seen_D))} also in training rows{beside}.")
    if task.clusters_D.max() == 0:
        notes.append(f"Task {name}: all documents share one source, so the variance is unknown.")
    for role, other in task.same.items():
        if other != role and role in task.documents and (differing := _differing(results[role], results[other])):
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
