"""The roles of a run as `dae check` has them: architectures and adapters without weights.

What a run asks of its loaded models before the first step (kd/training/run_stage.py) is asked of these, as far as it
takes no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dae.alignment import role_paths
from dae.recipe import AlignRecipe
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.losses.gradient_reach import refuse_constant_losses
from kd.losses.router import refuse_useless_router_loss
from kd.models.adapter_files import is_adapter
from kd.models.compatibility import empty_model, refuse_unusable_attention
from kd.models.forward import head_of, learned_positions
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    Role,
    activate,
    add_frozen_adapter,
    add_student_adapter,
    refuse_unknown_forward,
    refuse_unmergeable,
)
from kd.stages.distill_recipe import DistillRecipe


def empty_roles(recipe: StageRecipe) -> tuple[Role, ...]:
    """The student, then its teachers, on the models that the run would have them on (they take no memory).

    Raises UserError for an architecture or an attention that cannot be run, and for adapters that fit no layer, or not
    beside each other.
    """
    teachers: dict[str, str] = {}
    if isinstance(recipe, DistillRecipe):
        teachers = {"teacher": recipe.teacher}
    elif isinstance(recipe, AlignRecipe):
        teachers = {role: path for role, path in role_paths(recipe).items() if role not in ("base", "student_from")}
    shared = Backbone(recipe.base, opened(recipe.base, recipe))
    earlier = recipe.student_from if isinstance(recipe, AlignRecipe) else None
    if recipe.lora is not None:
        add_student_adapter(shared, recipe.lora, earlier)
    adapters = {name: add_frozen_adapter(shared, path) for name, path in teachers.items() if is_adapter(path)}
    nn.Module.to(
        shared.model, "meta"
    )  # adapters were read from their files, and would not meet the weights of the base
    own = {name: opened(path, recipe) for name, path in teachers.items() if name not in adapters}
    if recipe.lora is not None:
        student = Role("student", shared.model, STUDENT_ADAPTER)
    else:
        student = Role("student", opened(earlier or recipe.base, recipe), None)
    return student, *(
        Role(name, shared.model, adapters[name]) if name in adapters else Role(name, own[name], None)
        for name in teachers
    )


def opened(path: str, recipe: StageRecipe) -> Any:
    """A checkpoint's architecture with the attention that the recipe wants. Raises UserError where it cannot be run."""
    model: Any = empty_model(path, recipe.trust_remote_code)
    refuse_unusable_attention(model, path, recipe.attn_implementation)
    refuse_unknown_forward(model, path)
    return model


def check_roles(recipe: StageRecipe, roles: Sequence[Role]) -> None:
    """Raise UserError where the run would refuse its models: a head it does not know, a merge that would go wrong."""
    for role in roles:
        try:
            with activate(role) as model:
                head_of(model)
        except UserError as error:
            raise UserError(f"role {role.name}: {error}") from error
    student = roles[0].model
    refuse_useless_router_loss(student, recipe.router_aux_loss)
    if isinstance(recipe, DistillRecipe):
        refuse_constant_losses(recipe.attention, recipe.hidden, roles[0])
    if recipe.merge:
        refuse_unmergeable(student)


def fewest_positions(roles: Sequence[Role]) -> int | None:
    """Positions that every role has an embedding for; None where all compute theirs."""
    learned = (learned_positions(role.model) for role in roles)
    return min((positions for positions in learned if positions is not None), default=None)
