"""Notes of a report: significant losses first, then the limits of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dae_eval.comparing.curves import still_falling
from dae_eval.comparing.statistics import ALPHA
from dae_eval.report import StudentSummary, TaskLine
from dae_eval.results import Evaluation


def significant_losses(lines: Sequence[TaskLine]) -> list[str]:
    """A sentence for each task that lost significantly, in the lines' order (Holm over all tasks)."""
    return [
        f"Task {line.task} lost {-100 * line.difference.value:.1f} points against the {line.against}: from "
        f"{100 * line.scores[line.against]:.1f} to {100 * line.scores['student']:.1f} "
        f"({100 * line.difference.low:+.1f} to {100 * line.difference.high:+.1f}, p {_p(line.p_holm)} after Holm's "
        "correction)."
        for line in lines
        if line.p_holm < ALPHA and line.difference.value < 0
    ]


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
