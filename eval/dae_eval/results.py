"""A finished evaluation: the answers of one model, document by document, and their conditions.

All kinds of evaluations (lm-eval tasks, MT-Bench) are written in this form, so that a report needs no model.

    OUTPUT/
      evaluation.json             everything except the documents; written last, so it marks a finished evaluation
      documents/TASK-KEY.jsonl.gz one document per line; KEY is a digest of all that the scores depend on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["domain", "general", "shown"]
Unit = Literal["points", "rating", "bits per byte", "byte perplexity", "word perplexity", "Brier score"]
SCORES: tuple[Unit, ...] = ("points", "rating")  # on 0..1, higher is better; the other units are losses


@dataclass(frozen=True)
class Document:
    """One scored document.

    id, hash: the index in the task and SHA-256 of the document; answers of two models are joined on both.
    score: on 0..1, higher is better; of a loss (see `TaskResult.unit`): at least 0, lower is better.
    prompt, target, answer: text for readers (target may be empty).
    cluster: documents with the same cluster share a source and are resampled together.
    seen: contamination: it occurs in the rows that this model (or a teacher of its run) was trained on.
    category: its axis in a radar plot, or empty. weight: in the task's mean (bytes or words of a rolling loss).
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
    weight: float = 1.0


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to one task, in the task's order.

    kind: `domain` counts in gap closed, `general` in retention, `shown` in neither. settings: must be equal for two
    models to be compared (shots, limit, template hash, generation settings, judge, ...); JSON values. chance, majority:
    scores of guessing and of always giving the most frequent answer, if known.

    unit: what a reader is shown. "points" is 100 x score, "rating" 10 x score (a judge's scale from 1 to 10). The
    others are losses, which only a task of kind `shown` can have: documents have bits per byte, nats per byte ("byte
    perplexity") or per word ("word perplexity"; the exponential is shown), or a Brier score. total: documents that the
    benchmark has, if no limit were set; None: unknown. benchmark: the group of lm-eval that the task is a member of,
    which counts as one score; share: the task's weight in that score, 1 over all members.
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
    unit: Unit = "points"
    total: int | None = None
    benchmark: str = ""
    share: float = 1.0

    @property
    def is_loss(self) -> bool:
        return self.unit not in SCORES

    @property
    def mean(self) -> float:
        weights = [document.weight for document in self.documents]
        return sum(d.weight * d.score for d in self.documents) / sum(weights)


@dataclass(frozen=True)
class HeldOutLoss:
    """Teacher-forced figures on held-out responses of one route, in nats per response token.

    kl: KL(teacher || model) by the teacher's role (`reference`, `expert`), for the teachers that were measured.
    """

    route: str
    path: str
    sha256: str
    tokens: int
    loss: float
    kl: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRows:
    """Rows recorded in a model's run folder; problem: why documents could not be compared with them, or empty."""

    path: str
    sha256: str
    problem: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """The model. inputs: fingerprints of the inputs of its run by role (base, reference, expert.NAME)."""

    path: str
    fingerprint: str
    base: str | None = None
    base_fingerprint: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str | None]:
        """Equal for the same model: SHA-256 of its weights and of its base's (None: no adapter)."""
        return self.fingerprint, self.base_fingerprint


@dataclass(frozen=True)
class Evaluation:
    """All tasks of one model. conditions: template hash, generation settings, versions, command, ... (JSON).

    training: the metrics lines of the model's run.
    """

    model: ModelFacts
    tasks: Mapping[str, TaskResult]
    conditions: Mapping[str, Any]
    held_out: tuple[HeldOutLoss, ...] = ()
    training_rows: tuple[TrainingRows, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
