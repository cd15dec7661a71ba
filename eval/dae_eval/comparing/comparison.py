"""From finished evaluations to the report: roles, comparable tasks, verdicts. Loads no model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from dae_eval.comparing.curves import still_falling, training_curves
from dae_eval.comparing.pairing import PairedTask, pair_tasks, same_weights
from dae_eval.comparing.verdicts import flips, overall, summarise, task_lines
from dae_eval.report import Curve, HeldOutLine, ModelLine, Radar, Report, StudentSummary
from dae_eval.results import Evaluation, TaskResult
from kd.errors import UserError

ROLES = ("base", "expert", "reference", "student")
Found = tuple[str | None, Evaluation]
Value = TypeVar("Value")


def compare(
    evaluations: Mapping[str, Evaluation],
    *,
    margin: float = 1.0,
    min_gap: float = 0.0,
    retention_only: bool = False,
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
        retention_only: omit the gap line.
        others: names of other students, shown beside the one of the verdict.
        seed: of the resampling.
        command: as typed, for the provenance.

    Raises:
        UserError: a role is missing, a task was run with different settings, or there are no domain or general tasks.
    """
    wanted = ("reference", "student") if retention_only else ROLES
    for role in (*wanted, *others):
        if role not in evaluations:
            without = " Or compare without an expert (--retention-only)." if role in ("base", "expert") else ""
            raise UserError(f"no evaluation of the {role}; add it (--from {role}=FOLDER).{without}")
    chosen = {role: evaluations[role] for role in (*ROLES, *others) if role in evaluations}
    tasks, notes = pair_tasks(chosen)
    _check_kinds(tasks, retention_only, notes)
    asked: dict[str, Any] = {"margin": margin, "min_gap": min_gap, "retention_only": retention_only, "seed": seed}
    student, *beside = (summarise(tasks, name, **asked) for name in ("student", *others))
    return Report(
        word=overall(student),
        student=student,
        others=tuple(beside),
        models=tuple(_models(chosen)),
        tasks=tuple(task_lines(tasks, seed=seed)),
        flips=tuple(flips(tasks)),
        held_out=tuple(_held_out(chosen)),
        radars=tuple(_radars(tasks)),
        curves=tuple(_curves(chosen, others)),
        notes=(*notes, *_notes(chosen, student)),
        provenance=tuple(_provenance(chosen, asked, command)),
    )


def _check_kinds(tasks: Sequence[PairedTask], retention_only: bool, notes: Sequence[str]) -> None:
    kinds = {task.result.kind for task in tasks}
    why = "".join(f" {note}" for note in notes if "left out:" in note)
    if "domain" not in kinds and not retention_only:
        raise UserError(
            "no domain task was answered by all models, so the gap is unknown; evaluate them on a suite with a "
            f"`domain` group, or compare without an expert (--retention-only).{why}"
        )
    if "general" not in kinds:
        raise UserError(
            "no general task was answered by all models, so retention is unknown; evaluate them on a suite with a "
            f"`general` group.{why}"
        )


def _notes(evaluations: Mapping[str, Evaluation], student: StudentSummary) -> list[str]:
    notes = []
    if student.gap is not None and student.gap.closed is None:
        notes.append("The expert's gain over the base is not clearly above 0, so the gap closed is undefined.")
    if student.retention is not None and student.retention.ratio is None:
        notes.append("The reference scores about 0 on a general task, so retention has no ratio.")
    problems = {rows.path: rows.problem for one in evaluations.values() for rows in one.training_rows if rows.problem}
    notes += [
        f"Training rows {path} could not be compared with the documents: {why}." for path, why in problems.items()
    ]
    if not any(one.training_rows for one in evaluations.values()):
        notes.append("No training rows are known, so no document could be checked for contamination.")
    files: dict[str, set[str]] = {}
    for one in evaluations.values():
        for loss in one.held_out:
            files.setdefault(loss.route, set()).add(loss.sha256)
    notes += [
        f"Held-out losses on route {route} are of different files and cannot be compared."
        for route, hashes in files.items()
        if len(hashes) > 1
    ]
    apart = [role for role, one in evaluations.items() if any("reference" not in loss.kl for loss in one.held_out)]
    if apart and "reference" in evaluations:
        notes.append(
            f"KL(reference || model) is missing for {', '.join(apart)}: `dae report` measures it if both share one "
            "backbone (adapters); training with `data.eval` logs it for every student."
        )
    if "expert" in evaluations:
        notes += [f"The expert's {sentence}" for sentence in still_falling(evaluations["expert"].training)]
    return notes


def _models(evaluations: Mapping[str, Evaluation]) -> list[ModelLine]:
    same = same_weights(evaluations)
    return [
        ModelLine(role, one.model.path, one.model.fingerprint, same[role] if same[role] != role else "")
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
    for title, kind in (("General tasks", "general"), ("Domain tasks", "domain"), ("Tasks in neither line", "shown")):
        shown = sorted((task for task in tasks if task.result.kind == kind), key=lambda task: task.result.group)
        if shown:
            means = {role: tuple(float(task.scores[role].mean()) for task in shown) for role in shown[0].scores}
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


def _provenance(evaluations: Mapping[str, Evaluation], asked: Mapping[str, Any], command: str) -> list[tuple[str, str]]:
    """The comparison, in order: models, tasks, conditions (once if equal for all), files, options."""
    lines = [(role, f"{one.model.path}, SHA-256 {one.model.fingerprint}") for role, one in evaluations.items()]
    lines += [
        (f"base of {role}", f"{one.model.base}, SHA-256 {one.model.base_fingerprint}")
        for role, one in evaluations.items()
        if one.model.base is not None
    ]
    lines += _by_value(
        {task: _task_conditions(result) for task, result in evaluations["student"].tasks.items()}, "task"
    )
    conditions = {role: _flat(one.conditions) for role, one in evaluations.items()}
    for key in dict.fromkeys(key for found in conditions.values() for key in found):
        by_role = {role: found[key] for role, found in conditions.items() if key in found}
        if len(set(by_role.values())) == 1 and len(by_role) == len(evaluations):
            lines.append((key, next(iter(by_role.values()))))
        else:
            lines += _by_value(by_role, f"{key}:")
    for role, one in evaluations.items():
        lines += [(f"training rows of {role}", f"{rows.path}, SHA-256 {rows.sha256}") for rows in one.training_rows]
    held_out = {(loss.route, loss.path, loss.sha256) for one in evaluations.values() for loss in one.held_out}
    lines += [(f"held-out rows of {route}", f"{path}, SHA-256 {sha256}") for route, path, sha256 in sorted(held_out)]
    lines += [(key.replace("_", " "), json.dumps(value)) for key, value in asked.items()]
    if command and ("command", command) not in lines:  # the conditions of this command's own evaluations have it
        lines.append(("command of the report", command))
    return lines


def _by_value(values: Mapping[str, str], what: str) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return [(f"{what} {', '.join(found)}", value) for value, found in names.items()]


def _task_conditions(result: TaskResult) -> str:
    settings = "; ".join(f"{key} {value}" for key, value in _flat(result.settings).items())
    return f"version {result.version}; {result.metric}" + (f"; {settings}" if settings else "")


def _flat(conditions: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `outer.inner`; values as text."""
    found: dict[str, str] = {}
    for key, value in conditions.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _as_text(key, value)
    return found


def _as_text(key: str, value: Any) -> str:
    if key == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def merge(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Merge evaluations of one model (tasks, MT-Bench); a condition with different values becomes their list.

    Raises:
        UserError: the weights differ, or two evaluations answered a task differently.
    """
    first = evaluations[0]
    tasks: dict[str, TaskResult] = {}
    conditions: dict[str, list[Any]] = {}
    for one in evaluations:
        if one.model.fingerprint != first.model.fingerprint:
            raise UserError(
                f"{first.model.path} and {one.model.path} have different weights; their evaluations cannot be merged."
            )
        for name, result in one.tasks.items():
            if tasks.setdefault(name, result) != result:
                raise UserError(
                    f"task {name}: two evaluations of {one.model.path} answered it differently; give only one of them."
                )
        for key, value in one.conditions.items():
            if value not in conditions.setdefault(key, []):
                conditions[key].append(value)
    return Evaluation(
        model=next((one.model for one in evaluations if one.model.inputs), first.model),
        tasks=tasks,
        conditions={key: values[0] if len(values) == 1 else values for key, values in conditions.items()},
        held_out=_each_once([loss for one in evaluations for loss in one.held_out]),
        training_rows=_each_once([rows for one in evaluations for rows in one.training_rows]),
        training=next((one.training for one in evaluations if one.training), ()),
    )


def _each_once(values: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(value for index, value in enumerate(values) if value not in values[:index])


def assign_roles(found: Sequence[Found]) -> dict[str, Evaluation]:
    """Evaluations by role, from (role or None, evaluation) as given.

    Given roles are kept. The others follow from the fingerprints in the student's run, which names its base, reference
    and expert. The student is the only model whose run names another of the models and that no other run names. A model
    may have several roles; several evaluations of one model are merged.

    Raises:
        UserError: a role is ambiguous, or two models have the same one.
    """
    given: dict[str, list[Evaluation]] = {}
    for role, one in found:
        if role is not None:
            given.setdefault(role, []).append(one)
    roles = {role: merge(several) for role, several in given.items()}
    known = {one.model.fingerprint: role for role, one in roles.items()}
    nameless: dict[str, list[Evaluation]] = {}
    for role, one in found:
        if role is None:
            nameless.setdefault(one.model.fingerprint, []).append(one)
    models = {fingerprint: merge(several) for fingerprint, several in nameless.items()}
    for fingerprint in known.keys() & models.keys():
        more = models.pop(fingerprint)
        roles |= {r: merge([one, more]) for r, one in roles.items() if one.model.fingerprint == fingerprint}
    if "student" not in roles:
        student = _student_among(models, roles)
        roles["student"] = models.pop(student)
    _fill_from_inputs(roles, models)
    if models:
        left = next(iter(models.values())).model.path
        raise UserError(
            f"{left}: the role of this model is unknown; write --from ROLE=FOLDER ({', '.join(ROLES)} or a name)."
        )
    return roles


def _student_among(models: Mapping[str, Evaluation], roles: Mapping[str, Evaluation]) -> str:
    """Fingerprint of the only model whose run names another one and that no other run names."""
    everyone = {**models, **{one.model.fingerprint: one for one in roles.values()}}
    named = {
        fingerprint for own, one in everyone.items() for fingerprint in one.model.inputs.values() if fingerprint != own
    }
    candidates = [
        fingerprint
        for fingerprint, one in models.items()
        if fingerprint not in named and any(f != fingerprint and f in everyone for f in one.model.inputs.values())
    ]
    if len(candidates) == 1:
        return candidates[0]
    paths = ", ".join(models[fingerprint].model.path for fingerprint in candidates)
    why = f"it may be any of {paths}" if candidates else "no model's run names another of them as its input"
    raise UserError(f"the student is ambiguous: {why}; write --from student=FOLDER.")


def _fill_from_inputs(roles: dict[str, Evaluation], models: dict[str, Evaluation]) -> None:
    """Fill missing roles with the models that the student's run names."""
    everyone = {**models, **{one.model.fingerprint: one for one in roles.values()}}
    inputs = roles["student"].model.inputs
    for role in ROLES[:3]:
        names = [name for name in inputs if name == role or name.startswith(f"{role}.")]
        fitting = list(dict.fromkeys(inputs[name] for name in names if inputs[name] in everyone))
        if role in roles:
            continue
        if len(fitting) > 1:
            raise UserError(f"the student's run has several experts ({', '.join(names)}); write --from expert=FOLDER.")
        if fitting:
            roles[role] = everyone[fitting[0]]
            models.pop(fitting[0], None)
