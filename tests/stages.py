"""What tests ask of a stage: its roles, its objective, and what `dae check` plans, by a recipe alone."""

from __future__ import annotations

from typing import Any

from dae.checking.plan import Plan, make_plan
from dae.stages import STAGES
from kd.config.stage_recipe import StageRecipe
from kd.models.roles import LoadSettings
from kd.stages.stage import Stage, StageRoles
from kd.training.objective import Objective


def stage_of(recipe: StageRecipe) -> Stage[Any]:
    """The stage that a recipe is for."""
    return next(entry.load() for entry in STAGES.values() if entry.recipe is type(recipe))


def plan_of(recipe: StageRecipe) -> Plan:
    return make_plan(stage_of(recipe), recipe)


def check_checkpoints(recipe: StageRecipe) -> None:
    stage_of(recipe).check(recipe, stage_of(recipe).inputs(recipe))


def fingerprints(recipe: StageRecipe) -> dict[str, str]:
    return {role: one.fingerprint for role, one in stage_of(recipe).inputs(recipe).items()}


def build_roles(recipe: StageRecipe, settings: LoadSettings) -> StageRoles:
    return stage_of(recipe).build_roles(recipe, stage_of(recipe).inputs(recipe), settings)


def build(recipe: StageRecipe, settings: LoadSettings) -> tuple[Any, Any, Objective]:
    """(student's model, teacher's model, objective) of a stage with one teacher."""
    roles = build_roles(recipe, settings)
    objective = stage_of(recipe).objective(recipe, roles)
    return roles.student.model, roles.teachers["teacher"].model, objective
