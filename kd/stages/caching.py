"""A run's teachers from a cache: which rows they answer, filling what is missing, and which models are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from kd.cache.filling import cached_teachers, fill, refuse_batch_dependent
from kd.cache.plans import CachePlan, cache_plans
from kd.cache.store import CachedTeacher, TeacherStore
from kd.config.cache_recipe import CacheRecipe
from kd.config.stage_recipe import StageRecipe
from kd.data.mixing import Mixture
from kd.data.stage_data import StageData, refuse_unfit_rows, sampled_rows
from kd.data.token_rows import TokenRows
from kd.errors import UserError
from kd.losses.divergence_recipe import DivergenceRecipe
from kd.models.forward import innermost, learned_positions, unwrapped
from kd.models.roles import LoadSettings, Role, vocabulary_rows
from kd.stages.stage import AnyStage, Inputs, RecipeT, Stage, StageRoles, fingerprints
from kd.training.objective import Teacher
from kd.training.settings import load_settings, planned_steps, processes, rows_per_step, training_arguments


def cache_of(recipe: StageRecipe) -> CacheRecipe | None:
    """The recipe's `cache`; None for a stage that has no such key."""
    found: CacheRecipe | None = getattr(recipe, "cache", None)
    return found


def rows_of_run(data: StageData, mixture: Mixture, steps: int) -> list[set[int]]:
    """The training rows of each source that a run draws, or measures before its first step."""
    used = [set(sampled_rows(rows)) for rows in data.rows]
    left = sum(len(rows) for rows in data.rows) - sum(map(len, used))
    for step in range(steps):
        for source, row in mixture.rows_of_step(step):
            if row not in used[source]:
                used[source].add(row)
                left -= 1
        if not left:
            break
    return used


def plans_of_run(
    stage: AnyStage,
    recipe: StageRecipe,
    inputs: Inputs,
    data: StageData,
    mixture: Mixture,
    steps: int,
    settings: LoadSettings,
) -> dict[str, CachePlan]:
    """What each teacher's store has and lacks for a run, by role; empty without `cache`. Raises UserError."""
    cache = cache_of(recipe)
    if cache is None:
        return {}
    asks = isinstance(recipe, DivergenceRecipe) and recipe.trains_with_teachers
    used = rows_of_run(data, mixture, steps if asks else 0)
    rows: dict[str, list[tuple[TokenRows, Any]]] = {}
    for route, role in stage.taught_by(recipe).items():
        asked = rows.setdefault(role, [])
        for index, source in enumerate(data.sources):
            if source.route == route:
                asked.append((data.rows[index], sorted(used[index])))
        if route in data.held_out:
            asked.append((data.held_out[route], range(len(data.held_out[route]))))
    return cache_plans(cache, inputs, stage.served(recipe), rows, settings)


def filled(
    stage: AnyStage,
    plans: Mapping[str, CachePlan],
    recipe: StageRecipe,
    inputs: Inputs,
    data: StageData,
    settings: LoadSettings,
    args: TrainingArguments,
) -> dict[str, CachedTeacher]:
    """The cached teachers of a run by role, with all that the run asks them; empty where there are no plans.

    Raises:
        UserError: a store is damaged, or several processes would have to fill it.
        MachineError: the disk is too small.
    """
    several = processes().num_processes
    if several > 1:
        if not all(plan.is_complete for plan in plans.values()):
            missing = sum(len(plan.missing) for plan in plans.values())
            steps = several * args.gradient_accumulation_steps
            raise UserError(
                f"cache: {missing:,} rows are missing, and several processes cannot fill a cache together; fill it "
                f"first, in one process: dae cache RECIPE train.gradient_accumulation_steps={steps}"
            )
        return cached_teachers(plans, settings)

    def check(role: Role) -> None:
        refuse_unfit_rows(recipe, data, vocabulary_rows([role]), learned_positions(role.model))
        refuse_batch_dependent(role, data.longest)

    # As much as training passes through a model at once, so that a smaller batch helps here, too.
    batch_tokens = data.longest * args.per_device_train_batch_size
    text_of = partial(token_text, data.tokenizer)
    return fill(inputs, stage.served(recipe), plans, settings, check, batch_tokens, text_of)


def token_text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def with_cached(
    stage: Stage[RecipeT],
    recipe: RecipeT,
    inputs: Inputs,
    settings: LoadSettings,
    cached: Mapping[str, CachedTeacher],
    is_new: bool,
) -> StageRoles:
    """The stage's roles; a cached teacher's model is loaded only where the stage wants it in memory."""
    left_out = cached.keys() - stage.in_memory(recipe, inputs, is_new)
    live = {role: one for role, one in inputs.items() if role not in left_out}
    roles = stage.build_roles(recipe, live, settings)
    teachers = {**cached, **roles.teachers}
    ordered = [*inputs, *stage.served(recipe)]
    return replace(roles, teachers={role: teachers[role] for role in ordered if role in teachers})


def with_unasked(stage: AnyStage, recipe: StageRecipe, roles: StageRoles) -> StageRoles:
    """The roles of a plan: a teacher on a server is there, and cannot be asked."""
    served = stage.served(recipe)
    if not served or (cache := cache_of(recipe)) is None:
        return roles
    nothing, rows = TeacherStore(Path(cache.path)), roles.vocabulary_rows
    unasked = {role: CachedTeacher(role, nothing, "topk", None, rows) for role in served}
    return replace(roles, teachers={**roles.teachers, **unasked})


def with_head_of_backbone(cached: CachedTeacher, student: Role) -> CachedTeacher:
    """The same teacher; where its output layer is the frozen one of the student's backbone, there is one copy of it."""
    if cached.head is None:
        return cached
    weight: Any = innermost(unwrapped(student.model).get_output_embeddings()).weight
    own = cached.head.weight_VD
    if weight.requires_grad or weight.dtype != own.dtype or weight.shape != own.shape or not torch.equal(weight, own):
        return cached
    return replace(cached, head=replace(cached.head, weight_VD=weight.detach()))


def without_own_weights(roles: StageRoles, cached: Mapping[str, CachedTeacher]) -> StageRoles:
    """Let go of the cached teachers that are in memory with weights of their own."""
    kept = {
        name: cached[name] if name in cached and not is_on_student(teacher, roles) else teacher
        for name, teacher in roles.teachers.items()
    }
    return replace(roles, teachers=kept)


def is_on_student(teacher: Teacher, roles: StageRoles) -> bool:
    """Whether a teacher stands on the student's own backbone, and costs no weights of its own but an adapter's."""
    return isinstance(teacher, Role) and teacher.model is roles.student.model


def fill_cache(stage: Stage[RecipeT], recipe: RecipeT) -> dict[str, CachePlan]:
    """`dae cache`: answer the rows of a run that its cache lacks, without training; the plans as they were before.

    Raises UserError (recipe, data, checkpoints, cache), MachineError (disk, memory).
    """
    if cache_of(recipe) is None:
        raise UserError("cache: is required: add `cache: {path: DIR}`, or cache.path=DIR")
    inputs = stage.inputs(recipe)
    fingerprints(inputs)
    recipe = stage.check(recipe, inputs)
    data = stage.load_data(recipe, inputs)
    settings = load_settings(recipe)
    args = training_arguments(recipe, settings)
    mixture = Mixture(data.sources, rows_per_step(args), recipe.seed)
    steps = planned_steps(mixture, args)
    plans = plans_of_run(stage, recipe, inputs, data, mixture, steps, settings)
    filled(stage, plans, recipe, inputs, data, settings, args)
    return plans
