"""`student_from`: an earlier student's adapter is trained further as it is, so the recipe's `lora` must match it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from dae.recipe import AlignRecipe
from kd.config.stage_recipe import LoraRecipe
from kd.errors import UserError
from kd.models.adapters import put_adapter
from kd.models.checkpoint import Checkpoint
from kd.models.roles import STUDENT_ADAPTER, Backbone, add_student_adapter
from kd.stages.stage import Inputs

ALL_LINEAR = "all-linear"


def with_lora_of_student(recipe: AlignRecipe, inputs: Inputs) -> AlignRecipe:
    """The recipe with the `lora` of the adapter of `student_from`; unchanged without one.

    Raises UserError if explicit keys of `lora` differ, naming each.
    """
    earlier, ours = inputs.get("student_from"), recipe.lora
    if earlier is None or ours is None:
        return recipe
    adapted = put_adapter(inputs["base"].meta_model(recipe.trust_remote_code), earlier, STUDENT_ADAPTER)
    theirs = lora_of(recipe, inputs["base"], adapted)
    differing = [key for key in LoraRecipe.model_fields if getattr(ours, key) != getattr(theirs, key)]
    if "target_modules" in differing and _names_same_layers(recipe, inputs["base"], ours, adapted):
        differing.remove("target_modules")
    problems = [
        f"lora.{key}: {_shown(getattr(ours, key))}: the adapter of student_from ({earlier}) has "
        f"{_shown(getattr(theirs, key))}"
        for key in differing
        if key in ours.model_fields_set
    ]
    if problems:
        raise UserError(f"{'; '.join(problems)}. Remove these keys, or train a new adapter without student_from.")
    return recipe.model_copy(update={"lora": theirs})


def lora_of(recipe: AlignRecipe, base: Checkpoint, adapted: PeftModel) -> LoraRecipe:
    """The `lora` that would give a new adapter like this one."""
    config: Any = adapted.peft_config[STUDENT_ADAPTER]
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    if _layers(adapted) != _layers(_with_new_adapter(recipe, base, LoraRecipe(target_modules=ALL_LINEAR))):
        chosen = config.target_modules
        target_modules = chosen if isinstance(chosen, str) else tuple(sorted(chosen or ()))
    if not target_modules:
        raise UserError(
            f"student_from: {recipe.student_from}: its adapter is on single parameters only (target_parameters), "
            "which lora.target_modules cannot name; merge it, and use the full checkpoint with `lora: null`."
        )
    return LoraRecipe(
        rank=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout, target_modules=target_modules
    )


def _names_same_layers(recipe: AlignRecipe, base: Checkpoint, lora: LoraRecipe, adapted: PeftModel) -> bool:
    """Whether `lora.target_modules` names this adapter's layers in another way.

    Only all-linear includes a mixture's experts, which are parameters and not layers.
    """
    named, there = _layers(_with_new_adapter(recipe, base, lora)), _layers(adapted)
    return named == there if lora.target_modules == ALL_LINEAR else named[0] == there[0]


def _layers(adapted: PeftModel) -> tuple[set[str], set[str]]:
    """Names of an adapter's target modules, and of its target parameters."""
    tuner: Any = adapted.base_model
    return set(tuner.targeted_module_names), set(tuner.targeted_parameter_names)


def _with_new_adapter(recipe: AlignRecipe, base: Checkpoint, lora: LoraRecipe) -> PeftModel:
    model: Any = base.meta_model(recipe.trust_remote_code)
    return add_student_adapter(Backbone(base, model), lora)


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
