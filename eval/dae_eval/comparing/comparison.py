"""From finished evaluations to the report: paired tasks, verdicts, notes. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from dae_eval.comparing.curves import training_curves
from dae_eval.comparing.notes import limits, significant_losses
from dae_eval.comparing.pairing import Paired, PairedTask, pair_tasks, same_weights
from dae_eval.comparing.provenance import provenance
from dae_eval.comparing.roles import ROLES
from dae_eval.comparing.task_lines import benchmark_lines, flips, loss_lines, task_lines
from dae_eval.comparing.verdicts import Criteria, overall, student_difference, summarise
from dae_eval.report import Curve, HeldOutLine, ModelLine, Radar, Report, StudentDifference
from dae_eval.results import Evaluation
from kd.config.problems import suggestion
from kd.errors import UserError


def compare(
    evaluations: Mapping[str, Evaluation],
    *,
    margin: float = 1.0,
    min_gap: float = 0.0,
    max_task_loss: float = 5.0,
    retention_only: bool = False,
    allow_missing: Sequence[str] = (),
    others: Sequence[str] = (),
    seed: int = 0,
    command: str = "",
) -> Report:
    """The report on `evaluations["student"]`.

    Args:
        evaluations: by role: base, expert, reference, student, and names of other students. With `retention_only`
            base and expert may be absent.
        margin: largest accepted loss of retention, in points (100 x score).
        min_gap: smallest accepted part of the gap closed, on 0..1.
        max_task_loss: largest accepted loss of a single task, in points.
        retention_only: omit the gap line.
        allow_missing: tasks that a model, or some of its documents, may lack without the verdict being INCONCLUSIVE.
        others: names of other students, shown beside the one of the verdict.
        seed: of the resampling.
        command: as typed, for the provenance.

    Raises:
        UserError: a role is missing, a task was run with different settings, or there are no domain or general tasks.
    """
    _check_roles(evaluations, (*(("reference", "student") if retention_only else ROLES), *others))
    chosen = {role: evaluations[role] for role in (*ROLES, *others) if role in evaluations}
    _check_allowed(chosen, allow_missing)
    criteria = Criteria(margin, min_gap, max_task_loss, retention_only, tuple(allow_missing), seed)
    answered, with_expert = _paired(chosen, "student", criteria)
    _check_kinds(answered, with_expert)
    student = summarise(answered, with_expert, "student", criteria)
    lines, benchmarks = task_lines(answered.tasks, seed=seed), benchmark_lines(answered.tasks)
    losses = loss_lines(answered.tasks)
    notes = (*answered.notes, *(with_expert.notes if with_expert else ()))
    return Report(
        word=overall(student),
        date=datetime.now(UTC).date().isoformat(),
        student=student,
        others=tuple(summarise(*_paired(chosen, name, criteria), name, criteria) for name in others),
        compared=tuple(_compared(chosen, name, criteria) for name in others),
        models=tuple(_models(chosen)),
        tasks=tuple(lines),
        benchmarks=tuple(benchmarks),
        losses=tuple(losses),
        flips=tuple(flips(answered.tasks)),
        held_out=tuple(_held_out(chosen)),
        radars=tuple(_radars([task for task in answered.tasks if not task.result.is_loss])),
        curves=tuple(_curves(chosen, others)),
        notes=(*significant_losses(lines, benchmarks, losses), *dict.fromkeys(notes), *limits(chosen, student)),
        provenance=tuple(provenance(chosen, criteria, command)),
    )


def _check_roles(evaluations: Mapping[str, Evaluation], wanted: Sequence[str]) -> None:
    for role in wanted:
        if role not in evaluations:
            without = " Or compare without an expert (--retention-only)." if role in ("base", "expert") else ""
            raise UserError(f"no evaluation of the {role}; add it (--from {role}=FOLDER).{without}")


def _check_allowed(evaluations: Mapping[str, Evaluation], allowed: Sequence[str]) -> None:
    known = [task for one in evaluations.values() for task in one.tasks]
    if unknown := [name for name in allowed if name not in known]:
        name = unknown[0]
        raise UserError(f"--allow-missing {name}: no model answered a task of this name{suggestion(name, known)}")


def _paired(evaluations: Mapping[str, Evaluation], name: str, criteria: Criteria) -> tuple[Paired, Paired | None]:
    """A student's tasks, paired with what each is compared with; domain tasks also as the gap closed needs them."""
    with_expert = None if criteria.retention_only else pair_tasks(evaluations, name, with_expert=True)
    return pair_tasks(evaluations, name), with_expert


def _check_kinds(answered: Paired, with_expert: Paired | None) -> None:
    if with_expert is not None and not with_expert.of("domain"):
        raise UserError(
            "no domain task was answered by base, expert and student, so the gap is unknown; evaluate them on a suite "
            f"with a `domain` group, or compare without an expert (--retention-only).{_left_out(with_expert)}"
        )
    if not answered.of("general"):
        raise UserError(
            "no general task was answered by reference and student, so retention is unknown; evaluate them on a suite "
            f"with a `general` group.{_left_out(answered)}"
        )


def _left_out(paired: Paired) -> str:
    return "".join(f" {one.task} was not answered by {' and '.join(one.roles)}." for one in paired.missing)


def _compared(evaluations: Mapping[str, Evaluation], name: str, criteria: Criteria) -> StudentDifference:
    """The student against another one."""
    answered = pair_tasks(evaluations, "student", also=(name,))
    domain = None if criteria.retention_only else pair_tasks(evaluations, "student", with_expert=True, also=(name,))
    return student_difference(answered, domain, name, seed=criteria.seed)


def _models(evaluations: Mapping[str, Evaluation]) -> list[ModelLine]:
    same = same_weights(evaluations)
    return [
        ModelLine(
            role, one.model.path, one.model.fingerprint, same[role] if same[role] != role else "", one.model.base or ""
        )
        for role, one in evaluations.items()
    ]


def _held_out(evaluations: Mapping[str, Evaluation]) -> list[HeldOutLine]:
    return [
        HeldOutLine(loss.route, role, loss.tokens, loss.loss, loss.kl)
        for role, one in evaluations.items()
        for loss in one.held_out
    ]


def _curves(evaluations: Mapping[str, Evaluation], others: Sequence[str]) -> list[Curve]:
    return [
        curve
        for role in ("student", *others, "expert")
        if role in evaluations
        for curve in training_curves(role, evaluations[role].training, own_loss=role == "expert")
    ]


def _radars(tasks: Sequence[PairedTask]) -> list[Radar]:
    """A radar of the tasks of each kind, and one of the categories of each task that has them."""
    found = []
    for title, kind in (("General tasks", "general"), ("Domain tasks", "domain"), ("Tasks in no line", "shown")):
        shown = sorted((task for task in tasks if task.result.kind == kind), key=lambda task: task.result.group)
        if shown:
            roles = [role for role in shown[0].scores if all(role in task.scores for task in shown)]
            means = {role: tuple(float(task.scores[role].mean()) for task in shown) for role in roles}
            found.append(Radar(title, tuple(task.result.task for task in shown), means))
    for task in tasks:
        of_D = np.array([document.category for document in task.documents["student"]])
        if axes := tuple(dict.fromkeys(str(category) for category in of_D if category)):
            values = {
                role: tuple(float(scores_D[of_D == axis].mean()) for axis in axes)
                for role, scores_D in task.scores.items()
            }
            found.append(Radar(f"{task.result.task}: categories", axes, values))
    return found
