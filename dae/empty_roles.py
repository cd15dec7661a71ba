"""The roles of a run as `dae check` has them: architectures and adapters without weights.

What a run asks of its loaded models before the first step (kd/stage.py) is asked of these, as far as it takes no
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from dae.alignment import role_paths
from dae.recipe import AlignRecipe
from kd.adapter_files import is_adapter
from kd.adapters import put_adapter
from kd.compatibility import empty_model, refuse_unusable_attention
from kd.config import StageRecipe
from kd.distill_recipe import DistillRecipe
from kd.errors import UserError
from kd.reach import refuse_useless_terms
from kd.roles import (
    STUDENT_ADAPTER,
    Backbone,
    Role,
    add_student_adapter,
    head_of,
    learned_positions,
    refuse_unknown_forward,
    refuse_unmergeable,
    speaking_as,
)
from kd.router import refuse_useless_router_loss


def empty_roles(recipe: StageRecipe) -> tuple[Role, ...]:
    """The student, then its teachers, each on a model of its own (they take no memory).

    Raises UserError for an architecture or an attention that cannot be run, and for adapters that fit no layer.
    """
    teachers: dict[str, str] = {}
    if isinstance(recipe, DistillRecipe):
        teachers = {"teacher": recipe.teacher}
    elif isinstance(recipe, AlignRecipe):
        teachers = {role: path for role, path in role_paths(recipe).items() if role not in ("base", "student_from")}
    return (empty_student(recipe), *(empty_teacher(name, path, recipe) for name, path in teachers.items()))


def empty_student(recipe: StageRecipe) -> Role:
    """The model that trains: a new adapter or an earlier student's, or all weights with `lora: null`."""
    earlier = recipe.student_from if isinstance(recipe, AlignRecipe) else None
    if recipe.lora is None:
        return Role("student", opened(earlier or recipe.base, recipe), None)
    base = opened(recipe.base, recipe)
    if earlier is not None:
        return Role("student", with_adapter(base, earlier, trainable=True), STUDENT_ADAPTER)
    return Role("student", add_student_adapter(Backbone(recipe.base, base), recipe.lora, None), STUDENT_ADAPTER)


def empty_teacher(name: str, path: str, recipe: StageRecipe) -> Role:
    """A frozen role: a checkpoint, or an adapter on the base."""
    if not is_adapter(path):
        return Role(name, opened(path, recipe), None)
    return Role(name, with_adapter(opened(recipe.base, recipe), path, trainable=False), STUDENT_ADAPTER)


def opened(path: str, recipe: StageRecipe) -> Any:
    """A checkpoint's architecture with the attention that the recipe wants. Raises UserError where it cannot be run."""
    model: Any = empty_model(path, recipe.trust_remote_code)
    refuse_unusable_attention(model, path, recipe.attn_implementation)
    refuse_unknown_forward(model, path)
    return model


def with_adapter(model: Any, path: str, *, trainable: bool) -> PeftModel:
    """A model with the layers that the adapter in `path` puts on it."""
    # put_adapter reads the adapter's own weights, which would not meet those of the base.
    return put_adapter(model, path, STUDENT_ADAPTER, trainable=trainable).to("meta")


def check_roles(recipe: StageRecipe, roles: Sequence[Role]) -> None:
    """Raise UserError where the run would refuse its models: a head it does not know, a merge that would go wrong."""
    for role in roles:
        try:
            with speaking_as(role) as model:
                head_of(model)
        except UserError as error:
            raise UserError(f"role {role.name}: {error}") from error
    student = roles[0].model
    refuse_useless_router_loss(student, recipe.router_aux_loss)
    if isinstance(recipe, DistillRecipe):
        refuse_useless_terms(recipe, roles[0])
    if recipe.merge:
        refuse_unmergeable(student)


def fewest_positions(roles: Sequence[Role]) -> int | None:
    """Positions that every role has an embedding for; None where all compute theirs."""
    learned = (learned_positions(role.model) for role in roles)
    return min((positions for positions in learned if positions is not None), default=None)
