"""`dae sft`: next-token loss on response tokens. Makes experts, and bases for the demo."""

from __future__ import annotations

from kd.config.stage_recipe import StageRecipe
from kd.data.stage_data import StageData, load_stage_data
from kd.losses.token_loss import TokenLoss
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.compatibility import check_complete
from kd.models.quantization import check_quantization
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    add_student_adapter,
    load_model,
    trainable_model,
)
from kd.stages.sft_recipe import ROUTE, SftRecipe
from kd.stages.stage import Inputs, Stage, StageRoles
from kd.training.model_card import Description
from kd.training.objective import Objective, Route
from kd.training.settings import student_dtype


class Sft(Stage[SftRecipe]):
    """The student alone; no teacher."""

    name = "sft"
    recipe = SftRecipe

    def inputs(self, recipe: SftRecipe) -> dict[str, Checkpoint]:
        return {"base": checkpoint(recipe.base)}

    def check(self, recipe: SftRecipe, inputs: Inputs) -> SftRecipe:
        inputs["base"].refuse_adapter("base")
        check_complete(inputs["base"], recipe.trust_remote_code)
        check_quantization(recipe.quantization, inputs, trust_remote_code=recipe.trust_remote_code)
        return recipe

    def load_data(self, recipe: SftRecipe, inputs: Inputs) -> StageData:
        return load_stage_data(recipe, inputs["base"], [ROUTE], None)

    def build_roles(self, recipe: SftRecipe, inputs: Inputs, settings: LoadSettings) -> StageRoles:
        return student_alone(recipe, inputs["base"], settings)

    def objective(self, recipe: SftRecipe, roles: StageRoles) -> Objective:
        return Objective((Route(ROUTE, None),), TokenLoss(weight=0.0), pooled=True)

    def describe(self, recipe: SftRecipe) -> Description:
        return Description(
            f"An expert: `{recipe.base}` trained further by next-token loss on the response tokens of the rows below."
        )


def student_alone(recipe: StageRecipe, base: Checkpoint, settings: LoadSettings) -> StageRoles:
    """The student on its base: a new adapter, or all weights with `lora: null`."""
    if recipe.lora is None:
        model = trainable_model(base, settings, student_dtype(recipe))
        return StageRoles(Role("student", model, None), {})
    backbone = Backbone(base, load_model(base, settings))
    adapted = add_student_adapter(backbone, recipe.lora)
    return StageRoles(Role("student", adapted, STUDENT_ADAPTER), {}, shared=adapted)
