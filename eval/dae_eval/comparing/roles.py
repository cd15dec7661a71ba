"""Which evaluation has which role, from flags and from the fingerprints in the student's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dae_eval.results import Evaluation, TaskResult
from kd.errors import UserError

ROLES = ("base", "expert", "reference", "student")
Found = tuple[str | None, Evaluation]
Value = TypeVar("Value")


def merge(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Merge evaluations of one model (tasks, MT-Bench); a condition with different values becomes their list.

    Raises:
        UserError: the weights differ, or two evaluations answered a task differently.
    """
    first = evaluations[0]
    tasks: dict[str, TaskResult] = {}
    conditions: dict[str, list[Any]] = {}
    for one in evaluations:
        if one.model.identity != first.model.identity:
            raise UserError(
                f"{first.model.path} and {one.model.path} have different weights or bases; their evaluations cannot be "
                "merged."
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
