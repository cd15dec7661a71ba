"""The report as data: what every format (terminal, Markdown, JSON, HTML) shows. Built by dae_eval.comparing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate, Word
from dae_eval.results import Kind

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class GapLine:
    """How much of the expert's gain the student has; all on 0..1 (1: all of it).

    gain: expert - base, summed over domain tasks. closed is None if gain is not clearly above 0 ("undefined").
    documents_needed: documents per task that would decide, if the word is INCONCLUSIVE and more would help.
    """

    word: Word
    gain: Estimate
    closed: Estimate | None
    minimum: float
    documents_needed: int | None


@dataclass(frozen=True)
class RetentionLine:
    """The loss on general tasks: macro-mean of student - reference, in points (100 x score).

    ratio: 100 x macro-mean of student / reference, None if the reference scores 0 on a task.
    """

    word: Word
    difference: Estimate
    margin: float
    documents_needed: int | None
    ratio: Estimate | None


@dataclass(frozen=True)
class StudentSummary:
    """The two lines of a student: the one of the verdict, or another one shown beside it."""

    name: str
    gap: GapLine | None
    retention: RetentionLine | None


@dataclass(frozen=True)
class TaskLine:
    """One task. Scores and differences are on 0..1, over the documents that all models answered.

    against: the model that the student is compared with (`base` on domain tasks, `reference` on general ones).
    n documents in `clusters` clusters; unpaired: documents that only some models answered; seen: documents that occur
    in training rows. p of `test`, p_holm corrected over all tasks. detectable: the smallest true difference that this n
    would have found with 80 % power at 5 %. wins and losses: documents on which the student is better or worse.
    unseen_*: the same without the seen documents, None if there are none (or nothing is left).
    """

    task: str
    group: str
    kind: Kind
    metric: str
    n: int
    clusters: int
    chance: float | None
    majority: float | None
    scores: Mapping[str, float]
    against: str
    difference: Estimate
    p: float
    p_holm: float
    test: str
    detectable: float | None
    wins: int
    losses: int
    unpaired: int
    seen: int
    unseen_scores: Mapping[str, float] | None
    unseen_difference: Estimate | None


@dataclass(frozen=True)
class Flip:
    """A document on which the student and the model it is compared with differ. change: student - other, on -1..1."""

    task: str
    group: str
    id: int
    prompt: str
    target: str
    answers: Mapping[str, str]
    scores: Mapping[str, float]
    against: str
    change: float
    seen: bool


@dataclass(frozen=True)
class Radar:
    """Scores on 0..1 by category, absolute axes: values[model][i] belongs to axes[i]."""

    title: str
    axes: tuple[str, ...]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Curve:
    """One quantity over the optimizer steps of a model's training, such as KL(reference || student) on general rows."""

    model: str
    name: str
    unit: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class HeldOutLine:
    """Held-out loss and KL per route and model, in nats per response token."""

    route: str
    model: str
    tokens: int
    loss: float
    kl: Mapping[str, float]


@dataclass(frozen=True)
class ModelLine:
    """A model of the report. role: base, expert, reference, student, or the name of another student.

    same_as: the role with the same weights that answered for it, or empty.
    """

    role: str
    path: str
    fingerprint: str
    same_as: str


@dataclass(frozen=True)
class Report:
    """A whole report. word: PASS only if every line of the verdict passes.

    notes: limits of the numbers (unpaired documents, training rows that could not be compared, ...). provenance: (what,
    value), in order. flips: worst regressions first.
    """

    word: Word
    student: StudentSummary
    others: tuple[StudentSummary, ...]
    models: tuple[ModelLine, ...]
    tasks: tuple[TaskLine, ...]
    flips: tuple[Flip, ...]
    held_out: tuple[HeldOutLine, ...]
    radars: tuple[Radar, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]
