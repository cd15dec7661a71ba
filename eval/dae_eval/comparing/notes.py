"""Notes of a report: significant losses first, then the limits of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dae_eval.comparing.curves import still_falling
from dae_eval.comparing.statistics import ALPHA, Estimate
from dae_eval.report import BenchmarkLine, LossLine, StudentSummary, TaskLine
from dae_eval.results import Evaluation, Unit
from dae_eval.units import FULL_SCALE, shown


def significant_losses(
    tasks: Sequence[TaskLine], benchmarks: Sequence[BenchmarkLine], losses: Sequence[LossLine]
) -> list[str]:
    """A sentence for each task, benchmark and loss that became significantly worse, in their order."""
    worse = [
        _lost(f"Task {line.task}", line.scores, line.against, line.difference, line.p_holm, line.unit)
        for line in tasks
        if line.p_holm < ALPHA and line.difference.value < 0
    ]
    worse += [
        _lost(f"Benchmark {line.benchmark}", line.scores, line.against, line.difference, line.p_holm, "points")
        for line in benchmarks
        if line.p_holm < ALPHA and line.difference.value < 0
    ]
    return worse + [_rose(line) for line in losses if line.p_holm < ALPHA and line.difference.value > 0]


def _rose(line: LossLine) -> str:
    before, after = (shown(line.values[role], line.unit) for role in (line.against, "student"))
    return (
        f"Task {line.task}: {line.unit} rose from {before:.4g} ({line.against}) to {after:.4g} (p {_p(line.p_holm)} "
        "after Holm's correction); lower is better."
    )


def _lost(what: str, scores: Mapping[str, float], other: str, change: Estimate, p: float, unit: Unit) -> str:
    scale, digits, name = FULL_SCALE[unit], 2 if unit == "rating" else 1, "rating" if unit == "rating" else "points"
    before, after = scale * scores[other], scale * scores["student"]
    return (
        f"{what} lost {-scale * change.value:.{digits}f} {name} against the {other}: from {before:.{digits}f} to "
        f"{after:.{digits}f} ({scale * change.low:+.{digits}f} to {scale * change.high:+.{digits}f}, p {_p(p)} after "
        "Holm's correction)."
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def limits(evaluations: Mapping[str, Evaluation], student: StudentSummary) -> list[str]:
    """What a reader must know to trust the numbers."""
    return [
        *_no_ratio(student),
        *_cut_requests(evaluations),
        *_training_rows(evaluations),
        *_held_out(evaluations),
        *(
            f"The expert's {sentence}"
            for role, one in evaluations.items()
            if role == "expert"
            for sentence in still_falling(one.training)
        ),
    ]


def _no_ratio(student: StudentSummary) -> Iterator[str]:
    if student.retention is not None and student.retention.ratio is None:
        yield (
            "Retention has no ratio to the reference: the reference scores about 0 on a general task, or there are too "
            "few documents to bound it."
        )


def _cut_requests(evaluations: Mapping[str, Evaluation]) -> Iterator[str]:
    counts: dict[str, dict[str, int]] = {}
    for role, one in evaluations.items():
        found = one.conditions.get("truncated", {})
        for truncated in found if isinstance(found, list) else [found]:
            for task, n in truncated.items():
                counts.setdefault(task, {})[role] = n
    for task, by_role in counts.items():
        listed = ", ".join(f"{n} of {role}" for role, n in by_role.items())
        yield f"Task {task}: requests were longer than the model's context and were cut at their start: {listed}."


def _training_rows(evaluations: Mapping[str, Evaluation]) -> Iterator[str]:
    problems = {rows.path: rows.problem for one in evaluations.values() for rows in one.training_rows if rows.problem}
    for path, why in problems.items():
        yield f"Training rows {path} could not be compared with the documents: {why}."
    if not any(one.training_rows for one in evaluations.values()):
        yield "No training rows are known, so no document could be checked for contamination."


def _held_out(evaluations: Mapping[str, Evaluation]) -> Iterator[str]:
    files: dict[str, set[str]] = {}
    for one in evaluations.values():
        for loss in one.held_out:
            files.setdefault(loss.route, set()).add(loss.sha256)
    for route in (route for route, hashes in files.items() if len(hashes) > 1):
        yield f"Held-out losses on route {route} are of different files and cannot be compared."
    apart = [role for role, one in evaluations.items() if any("reference" not in loss.kl for loss in one.held_out)]
    if apart and "reference" in evaluations:
        yield (
            f"KL(reference || model) is missing for {', '.join(apart)}: `dae report` measures it if both share one "
            "backbone (adapters); training with `data.eval` logs it for every student."
        )
