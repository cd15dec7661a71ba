"""Domain Alignment from Expert (arXiv 2406.19112), from recipe to finished run. The page to read first.

Every training row belongs to a route, and every route has one teacher: the expert on a domain's rows, the frozen
reference on `general`. The student matches its row's teacher, token by token:

    l_t = (1 - lambda) * NTP_t + lambda * T^2 * KL( p_teacher(route) || p_student )_t      per response token t
    L   = sum_r w_r sum_{t in r} l_t  /  sum_r w_r N_r                                     per optimizer step

Where to look next: kd/losses/token_loss.py (l_t), kd/training/objective.py (L), kd/models/roles.py (three roles on one
backbone), kd/data/mixing.py (which rows), kd/training/run_stage.py (what every stage does around its objective),
dae_eval/drift.py (what the student forgets).
"""

from __future__ import annotations

from collections.abc import Mapping

from dae_eval.drift import DriftCallback

from dae.earlier_student import with_lora_of_student
from dae.recipe import AlignRecipe
from dae.routing import GENERAL, default_route_shares, teachers_by_route
from dae.templates import chosen_template, remedy, templates_of_roles, warn_of_other_templates
from kd.data.drafts import NoChatTemplateError
from kd.data.stage_data import StageData, load_stage_data
from kd.errors import UserError
from kd.losses.token_loss import TokenLoss
from kd.models.adapter_files import is_adapter, refuse_adapter
from kd.models.checkpoint_files import model_fingerprint
from kd.models.compatibility import check_adapter, check_complete, check_tokenizers
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    add_frozen_adapter,
    add_student_adapter,
    load_model,
    trainable_model,
    vocabulary_rows,
)
from kd.training.objective import Objective, Route
from kd.training.run_stage import RunResult, StageRoles, run_stage
from kd.training.settings import student_dtype
from kd.training.trainer import RoutedTrainer


def align(recipe: AlignRecipe) -> RunResult:
    """Train the student that matches each expert on its domain's rows and the reference on general rows.

    Returns the finished run; the same recipe over an unfinished run folder goes on with it.
    Raises UserError (recipe, data or checkpoints), MachineError (disk, memory), Stopped (Ctrl-C, SIGTERM).
    """
    inputs = fingerprints(recipe)
    check_checkpoints(recipe, inputs)
    recipe = with_lora_of_student(recipe)
    data = load_data(recipe)
    return run_stage(
        "align",
        recipe,
        inputs,
        data,
        lambda settings: build_roles(recipe, inputs, settings),
        lambda roles, trainer: drift_callbacks(data, roles, trainer),
    )


def load_data(recipe: AlignRecipe) -> StageData:
    """All rows, encoded; warns of teachers that have another chat template. Raises UserError."""
    templates = templates_of_roles(recipe)
    routes, shares = [GENERAL, *recipe.expert], default_route_shares(recipe.expert)
    try:
        data = load_stage_data(recipe, routes, shares, chat_template=chosen_template(recipe, templates))
    except NoChatTemplateError as error:
        raise NoChatTemplateError(error.problem, remedy(recipe, templates)) from error
    warn_of_other_templates(recipe, templates, data)
    return data


def role_paths(recipe: AlignRecipe) -> dict[str, str]:
    """Every role but the student -> its checkpoint as typed. Experts are called `expert.NAME`."""
    paths = {"base": recipe.base, "reference": recipe.reference or recipe.base}
    paths |= {f"expert.{name}": path for name, path in recipe.expert.items()}
    if recipe.student_from is not None:
        paths["student_from"] = recipe.student_from
    return paths


def fingerprints(recipe: AlignRecipe) -> dict[str, str]:
    """SHA-256 of every role's weights and config; a checkpoint named twice is read once."""
    known: dict[str, str] = {}
    for path in role_paths(recipe).values():
        if path not in known:
            known[path] = model_fingerprint(path)
    return {role: known[path] for role, path in role_paths(recipe).items()}


def check_checkpoints(recipe: AlignRecipe, inputs: Mapping[str, str]) -> None:
    """Raise UserError where a checkpoint does not belong to the others; reads no weights."""
    paths = role_paths(recipe)
    refuse_adapter(recipe.base, "base")
    check_tokenizers(recipe.base, paths, recipe.trust_remote_code)
    for path in {inputs[role]: path for role, path in paths.items() if not is_adapter(path)}.values():
        check_complete(path, recipe.trust_remote_code)
    first_role: dict[str, str] = {}
    for role, path in paths.items():
        if is_adapter(path) and first_role.setdefault(path, role) == role:
            check_adapter(role, path, recipe.base, inputs["base"], recipe.trust_remote_code, shares=True)
    if recipe.student_from is not None and is_adapter(recipe.student_from) != (recipe.lora is not None):
        kind, remedy = ("an adapter", "merge it") if recipe.lora is None else ("a full checkpoint", "set `lora: null`")
        raise UserError(
            f"student_from: {recipe.student_from}: is {kind}, which this student cannot go on from; {remedy}."
        )


def build_roles(recipe: AlignRecipe, inputs: Mapping[str, str], settings: LoadSettings) -> StageRoles:
    """Load the student and its teachers on as few weights as possible.

    A LoRA student shares its backbone with the reference (adapters off) and with adapter experts. A student whose
    weights all train shares with nobody: "adapters off" would be the moving student itself, with a KL of zero that
    looks like success. Its teachers stand on one frozen copy of the base.
    """
    shared = Backbone(recipe.base, load_model(recipe.base, settings)) if needs_base(recipe, inputs) else None
    if recipe.lora is not None:
        assert shared is not None
        student = Role("student", add_student_adapter(shared, recipe.lora, recipe.student_from), STUDENT_ADAPTER)
    else:
        start = recipe.student_from or recipe.base
        student = Role("student", trainable_model(start, settings, student_dtype(recipe)), None)
    teachers = teachers_by_route(*load_teachers(recipe, inputs, settings, shared))
    roles = (student, *teachers.values())
    return StageRoles(student.model, objective_of(recipe, teachers), roles, vocabulary_rows(roles))


def objective_of(recipe: AlignRecipe, teachers: Mapping[str, Role | None]) -> Objective:
    """What is minimised, with each route's teacher (None: only the routes' weights are of interest)."""
    factors = recipe.weights if isinstance(recipe.weights, Mapping) else {}
    return Objective(
        tuple(Route(name, teacher, factors.get(name, 1.0)) for name, teacher in teachers.items()),
        TokenLoss(recipe.lambda_, recipe.temperature, recipe.divergence, recipe.beta, recipe.skew),
        pooled=recipe.weights == "tokens",
    )


def needs_base(recipe: AlignRecipe, inputs: Mapping[str, str]) -> bool:
    """Whether a frozen copy of the base is needed: as the student's backbone, or by a teacher that stands on it."""
    teachers = {role: path for role, path in role_paths(recipe).items() if role not in ("base", "student_from")}
    on_base = [is_adapter(path) or inputs[role] == inputs["base"] for role, path in teachers.items()]
    return recipe.lora is not None or any(on_base)


def load_teachers(
    recipe: AlignRecipe, inputs: Mapping[str, str], settings: LoadSettings, shared: Backbone | None
) -> tuple[Role, dict[str, Role]]:
    """(reference, experts by name): adapters and the base on the shared backbone, others on weights of their own."""
    paths = {role: path for role, path in role_paths(recipe).items() if role not in ("base", "student_from")}
    # Adapters first: the first one wraps the backbone, and every role must hold the wrapped one.
    adapters = {}
    for role, path in paths.items():
        if is_adapter(path):
            assert shared is not None
            adapters[role] = add_frozen_adapter(shared, path)
    own: dict[str, Role] = {}
    roles = {}
    for role, path in paths.items():
        if shared is not None and (role in adapters or inputs[role] == inputs["base"]):
            roles[role] = Role(role, shared.model, adapters.get(role))
        else:
            if inputs[role] not in own:
                own[inputs[role]] = Role(role, load_model(path, settings), None)
            roles[role] = Role(role, own[inputs[role]].model, None)
    experts = {name: roles[f"expert.{name}"] for name in recipe.expert}
    return roles["reference"], experts


def drift_callbacks(data: StageData, roles: StageRoles, trainer: RoutedTrainer) -> list[DriftCallback]:
    """What the student forgets, and how near it comes to each expert, on held-out rows; none without `data.eval`."""
    if not data.held_out:
        return []
    student = next(role for role in roles.roles if role.name == "student")
    by_route = {route.name: route.teacher for route in roles.objective.routes if route.teacher is not None}
    reference = by_route.pop(GENERAL)
    teachers = {GENERAL: {"reference": reference}}
    teachers |= {route: {"reference": reference, "expert": expert} for route, expert in by_route.items()}
    batch_size = trainer.args.per_device_eval_batch_size
    return [DriftCallback(student, teachers, data.held_out, batch_size, trainer.log)]
