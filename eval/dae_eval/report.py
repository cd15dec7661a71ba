"""The report as data: what every format (terminal, Markdown, JSON, HTML) shows. Built by dae_eval.comparing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dae_eval.comparing.statistics import Estimate, Word
from dae_eval.results import Kind, Unit

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class GapLine:
    """How much of the expert's gain the student has; all on 0..1 (1: all of it).

    gain: expert - base, summed over domain tasks. closed is None if gain is not clearly above 0 ("undefined").
    documents_needed: documents per task that would decide, if the word is INCONCLUSIVE and more would help. exhausted:
    more would help, but the tasks do not have so many. same_weights: base and expert are one model. reasons: why the
    line cannot pass whatever its figures (missing tasks, too few documents).
    """

    word: Word
    gain: Estimate
    closed: Estimate | None
    minimum: float
    documents_needed: int | None
    exhausted: bool = False
    same_weights: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class RetentionLine:
    """The loss on general tasks: macro-mean of student - reference, in points (100 x score).

    ratio: 100 x macro-mean of student / reference, None if the reference scores 0 on a task or the interval has no
    upper bound. unit: "rating" if all tasks are ratings, which are shown as 1 rating = 10 points. documents_needed,
    exhausted, reasons: as for `GapLine`.
    """

    word: Word
    difference: Estimate
    margin: float
    documents_needed: int | None
    ratio: Estimate | None
    exhausted: bool = False
    unit: Unit = "points"
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskLoss:
    """A task's difference to the model that the student is compared with, in points.

    documents: independent ones. p: one-sided, of a loss beyond the limit. unit: of the task. documents_needed,
    exhausted: as for `GapLine`.
    """

    task: str
    against: str
    documents: int
    difference: Estimate
    p: float
    documents_needed: int | None
    exhausted: bool = False
    unit: Unit = "points"


@dataclass(frozen=True)
class FloorLine:
    """No general task may lose more than `limit` points against the reference, no domain task against the base.

    worst: the largest loss of a task, or of a benchmark as a whole. lost: tasks, benchmarks and members of benchmarks
    whose loss is significantly larger than the limit (one-sided at 2.5 %, Holm over all). undecided: tasks and
    benchmarks for which a larger loss cannot be ruled out, and members whose whole interval is beyond the limit.
    """

    word: Word
    limit: float
    worst: TaskLoss
    lost: tuple[TaskLoss, ...]
    undecided: tuple[TaskLoss, ...]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudentSummary:
    """The lines of a student: the one of the verdict, or another one shown beside it."""

    name: str
    gap: GapLine | None
    retention: RetentionLine | None
    floor: FloorLine | None


@dataclass(frozen=True)
class StudentDifference:
    """The student against another student on the same documents: student - other.

    gap: of the gap closed, on 0..1; None if undefined, without an expert, or on too few documents. retention: in
    points; unit: for showing, as of `RetentionLine`. left_out: tasks that one of the models lacks.
    """

    other: str
    gap: Estimate | None
    retention: Estimate | None
    unit: Unit = "points"
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskLine:
    """One task. Scores and differences are on 0..1, over the documents that the models it needs answered.

    against: the model that the student is compared with (`base` on domain tasks, `reference` on general ones).
    n documents in `clusters` clusters; unpaired: documents that only some models answered; seen: documents that occur
    in training rows. p of `test`, p_holm corrected over all tasks. detectable: the smallest true difference that this n
    would have found with 80 % power at 5 %. wins and losses: documents on which the student is better or worse.
    unchanged: part of the documents with the same score. unseen_*: the same without the seen documents, None if there
    are none (or nothing is left). unit: as in `TaskResult`. benchmark: the line it is a member of, or empty.
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
    unchanged: float
    unpaired: int
    seen: int
    unseen_scores: Mapping[str, float] | None
    unseen_difference: Estimate | None
    unit: Unit = "points"
    benchmark: str = ""


@dataclass(frozen=True)
class BenchmarkLine:
    """A group of lm-eval: the score that its members give together, weighted as lm-eval does. Figures as of a task.

    p_holm: two-sided, of no difference, after Holm's correction over the benchmarks.
    """

    benchmark: str
    group: str
    kind: Kind
    members: int
    n: int
    scores: Mapping[str, float]
    against: str
    difference: Estimate
    p_holm: float


@dataclass(frozen=True)
class LossLine:
    """A task that is a loss: lower is better. values and difference (student - other) are means in `unit`.

    Perplexities are given as the logarithm that is averaged: nats per byte or word. p: two-sided, of no difference;
    p_holm: after Holm's correction over the losses.
    """

    task: str
    group: str
    metric: str
    unit: Unit
    n: int
    clusters: int
    values: Mapping[str, float]
    against: str
    difference: Estimate
    p: float
    p_holm: float


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
    unit: Unit = "points"


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

    same_as: the role with the same weights that answered for it, or empty. base: of an adapter, else empty.
    """

    role: str
    path: str
    fingerprint: str
    same_as: str
    base: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report. word: PASS only if every line of the verdict passes.

    date: of the report, as YYYY-MM-DD. notes: significant losses, then the limits of the numbers (unpaired documents,
    training rows that could not be compared, ...). provenance: (what, value), in order. flips: worst regressions first.
    """

    word: Word
    date: str
    student: StudentSummary
    others: tuple[StudentSummary, ...]
    compared: tuple[StudentDifference, ...]
    models: tuple[ModelLine, ...]
    tasks: tuple[TaskLine, ...]
    benchmarks: tuple[BenchmarkLine, ...]
    losses: tuple[LossLine, ...]
    flips: tuple[Flip, ...]
    held_out: tuple[HeldOutLine, ...]
    radars: tuple[Radar, ...]
    curves: tuple[Curve, ...]
    notes: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]
