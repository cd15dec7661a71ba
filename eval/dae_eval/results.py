"""A finished evaluation: what one model answered, document by document, and under which conditions.

Every kind of evaluation (lm-eval tasks, MT-Bench) is written in this one form, so that a report needs no model.

    OUTPUT/
      evaluation.json             everything but the documents; written last, so its presence means finished
      documents/TASK-KEY.jsonl.gz one document a line; KEY names all that the scores depend on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["domain", "general", "shown"]


@dataclass(frozen=True)
class Document:
    """One scored document.

    id, hash: what answers of two models are joined on: the place in the task, and SHA-256 of the document.
    score: on 0..1, higher is better. prompt, target, answer: as text, for readers (target may be empty).
    cluster: documents with the same cluster share a source and are resampled together.
    seen: whether it stands in the rows that this model (or a teacher of its run) was trained on.
    category: the axis it belongs to in a radar plot; empty: none.
    """

    id: int
    hash: str
    score: float
    prompt: str
    target: str
    answer: str
    cluster: str
    seen: bool = False
    category: str = ""


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to one task, in the task's order.

    kind: `domain` counts in gap closed, `general` in retention, `shown` in neither. settings: what has to be equal for
    two models to be compared (shots, limit, template hash, generation settings, judge, ...); JSON values. chance,
    majority: scores of guessing and of always giving the most frequent answer, where they can be known.
    """

    task: str
    group: str
    kind: Kind
    metric: str
    version: str
    settings: Mapping[str, Any]
    documents: tuple[Document, ...]
    chance: float | None = None
    majority: float | None = None

    @property
    def mean(self) -> float:
        """The task's score on 0..1."""
        return sum(document.score for document in self.documents) / len(self.documents)


@dataclass(frozen=True)
class HeldOutLoss:
    """Teacher-forced figures on held-out responses of one route, in nats per response token.

    kl: KL(teacher || model) by the teacher's role (`reference`, `expert`), where the teachers were there to be asked.
    """

    route: str
    path: str
    sha256: str
    tokens: int
    loss: float
    kl: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRows:
    """Rows that a model was trained on, as its run folder tells; problem: why they could not be compared, or empty."""

    path: str
    sha256: str
    problem: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """Which model answered. inputs: fingerprint by role of the run that made it (base, reference, expert.NAME)."""

    path: str
    fingerprint: str
    base: str | None = None
    base_fingerprint: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that one model was asked. conditions: template hash, generation settings, versions, command, ... (JSON).

    training: lines of the metrics of the run that made the model.
    """

    model: ModelFacts
    tasks: Mapping[str, TaskResult]
    conditions: Mapping[str, Any]
    held_out: tuple[HeldOutLoss, ...] = ()
    training_rows: tuple[TrainingRows, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
