"""`dae sft`: next-token loss on response tokens. Makes experts, and bases for the demo."""

from __future__ import annotations

from kd.config.stage_recipe import StageRecipe
from kd.data.stage_data import load_stage_data
from kd.losses.token_loss import TokenLoss
from kd.models.adapter_files import refuse_adapter
from kd.models.checkpoint_files import model_fingerprint
from kd.models.compatibility import check_complete
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    add_student_adapter,
    load_model,
    trainable_model,
    vocabulary_rows,
)
from kd.stages.sft_recipe import SftRecipe
from kd.training.objective import Objective, Route
from kd.training.run_stage import RunResult, StageRoles, run_stage
from kd.training.settings import student_dtype

ROUTE = "train"


def sft(recipe: SftRecipe) -> RunResult:
    """Train an expert with plain next-token prediction on response tokens; LoRA, or all weights with `lora: null`."""
    inputs = {"base": model_fingerprint(recipe.base)}
    check_checkpoint(recipe)
    data = load_stage_data(recipe, [ROUTE], None)
    return run_stage("sft", recipe, inputs, data, lambda settings: build_roles(recipe, settings))


def check_checkpoint(recipe: SftRecipe) -> None:
    """Raise UserError where the base is no full checkpoint with all of its weights; reads no weights."""
    refuse_adapter(recipe.base, "base")
    check_complete(recipe.base, recipe.trust_remote_code)


def build_roles(recipe: SftRecipe, settings: LoadSettings) -> StageRoles:
    """One role: the student. No teacher."""
    role = student_role(recipe, settings)
    objective = Objective((Route(ROUTE, None),), TokenLoss(weight=0.0), pooled=True)
    return StageRoles(role.model, objective, (role,), vocabulary_rows([role]))


def student_role(recipe: StageRecipe, settings: LoadSettings) -> Role:
    """The student alone on its base: a new adapter, or all weights with `lora: null`."""
    if recipe.lora is None:
        return Role("student", trainable_model(recipe.base, settings, student_dtype(recipe)), None)
    backbone = Backbone(recipe.base, load_model(recipe.base, settings))
    return Role("student", add_student_adapter(backbone, recipe.lora, None), STUDENT_ADAPTER)
