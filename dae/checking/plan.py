"""Plans a run without its weights: rows, steps, roles, and everything that would stop it.

It uses the real run's functions to read rows, build roles and plan steps, so that a recipe that passes does not fail
later for a foreseeable reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import TrainingArguments

from kd.cache.plans import CachePlan
from kd.config.data_recipe import SourceRecipe
from kd.config.stage_recipe import StageRecipe
from kd.data.mixing import Mixture
from kd.data.records import read_records
from kd.data.stage_data import StageData, refuse_unfit_rows
from kd.errors import UserError
from kd.losses.router import refuse_useless_router_loss
from kd.models.forward import head_of, learned_positions
from kd.models.roles import LoadSettings, activate, refuse_unmergeable
from kd.runs.claimed_folder import refuse_file
from kd.runs.provenance import read_provenance
from kd.runs.run_folder import RunFolder, Start
from kd.stages.caching import cache_of, plans_of_run, with_unasked
from kd.stages.stage import AnyStage, Inputs, StageRoles, fingerprints
from kd.training.objective import Objective
from kd.training.settings import load_settings, planned_steps, rows_per_step, training_arguments

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """A planned run; the roles are on the device `meta`, without weights.

    roles: those that are loaded for training; cache: what each cached teacher's store has and lacks, by role.
    """

    recipe: StageRecipe
    inputs: Inputs
    data: StageData
    args: TrainingArguments
    settings: LoadSettings
    mixture: Mixture
    steps: int
    roles: StageRoles
    objective: Objective
    cache: Mapping[str, CachePlan]


class Findings:
    """Collects the problems of all steps of a check, to report them in one message."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, step: Callable[[], Result]) -> Result | None:
        """The step's result, or None if it raised UserError."""
        try:
            return step()
        except UserError as error:
            self.problems.append(str(error))
            return None

    def raise_all(self) -> None:
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError("\n".join([f"{len(self.problems)} problems:", *(f"  {line}" for line in self.problems)]))


def make_plan(stage: AnyStage, recipe: StageRecipe) -> Plan:
    """Plan a run. Raises UserError with every problem found."""
    found = Findings()
    found.of(lambda: check_output(recipe.output))
    if (asked := cache_of(recipe)) is not None:
        found.of(lambda: refuse_file(Path(asked.path), "cache.path"))
    settings = load_settings(recipe)
    inputs = found.of(lambda: read_inputs(stage, recipe))
    roles = objective = None
    if inputs is not None:
        checked = found.of(lambda: stage.check(recipe, inputs))
        if checked is not None and not found.problems:  # roles need checkpoints that fit together
            recipe = checked
            roles = found.of(lambda: stage.build_roles(recipe, inputs, replace(settings, device="meta")))
    if roles is not None:
        for role in roles.all:  # the adapters' weights were read, the base's were not
            nn.Module.to(role.model, "meta")
        roles = with_unasked(stage, recipe, roles)
        objective = found.of(lambda: stage.objective(recipe, roles))
    args = found.of(lambda: training_arguments(recipe, settings))
    readable = [found.of(partial(first_record, source)) for source in sources_of(recipe)]
    data = found.of(lambda: stage.load_data(recipe, inputs)) if inputs is not None and None not in readable else None
    mixture = steps = None
    if data is not None and args is not None:
        mixture = found.of(lambda: Mixture(data.sources, rows_per_step(args), recipe.seed))
    if mixture is not None and args is not None:
        steps = found.of(lambda: planned_steps(mixture, args))
    if roles is not None:
        found.of(lambda: check_roles(recipe, roles))
    if data is not None and roles is not None:
        found.of(lambda: refuse_unfit_rows(recipe, data, roles.vocabulary_rows, fewest_positions(roles)))
    if data is not None and inputs is not None:
        found.of(lambda: look_at_output(stage, recipe, inputs, data))
    found.raise_all()
    assert inputs is not None and data is not None and args is not None and mixture is not None
    assert steps is not None and roles is not None and objective is not None
    cache = plans_of_run(stage, recipe, inputs, data, mixture, steps, settings)
    if asked is not None and not all(one.is_complete for one in cache.values()):
        check_output(asked.path, "cache.path")
    loaded = stage.in_memory(recipe, inputs, True)  # also where it is only for the start
    kept = {name: one for name, one in roles.teachers.items() if name not in cache or name in loaded}
    in_memory = replace(roles, teachers=kept)
    return Plan(recipe, inputs, data, args, settings, mixture, steps, in_memory, objective, cache)


def read_inputs(stage: AnyStage, recipe: StageRecipe) -> Inputs:
    """The checkpoints, with their fingerprints. Raises UserError if files are truncated or missing."""
    inputs: Inputs = stage.inputs(recipe)
    fingerprints(inputs)
    return inputs


def check_roles(recipe: StageRecipe, roles: StageRoles) -> None:
    """Raise UserError if the run would refuse its models: an unknown head, an impossible merge."""
    for role in roles.all:
        try:
            with activate(role) as model:
                head_of(model)
        except UserError as error:
            raise UserError(f"role {role.name}: {error}") from error
    refuse_useless_router_loss(roles.student.model, recipe.router_aux_loss)
    if recipe.merge:
        refuse_unmergeable(roles.student.model)


def fewest_positions(roles: StageRoles) -> int | None:
    """The fewest learned positions of any role; None if no role has learned positions."""
    learned = (learned_positions(role.model) for role in roles.all)
    return min((positions for positions in learned if positions is not None), default=None)


def sources_of(recipe: StageRecipe) -> list[SourceRecipe]:
    return [
        source for part in (recipe.data.routes, recipe.data.eval) for sources in part.values() for source in sources
    ]


def first_record(source: SourceRecipe) -> str:
    """The location of a source's first record. Raises UserError if it cannot be read."""
    location, _ = next(read_records(source))
    return location


def check_output(output: str, key: str = "output") -> None:
    """Raise UserError if a folder cannot be written. key: of the recipe."""
    place = Path(output)
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    refuse_file(place, key)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {output}: no permission to write to {existing}; use another folder")


def look_at_output(stage: AnyStage, recipe: StageRecipe, inputs: Inputs, data: StageData) -> None:
    """Raise UserError if the run folder has another run, or a live process holds it."""
    begun = read_provenance(recipe.output) or {}
    processes = begun.get("processes", 1)  # how many a launcher will start is unknown here
    RunFolder(recipe.output).look(Start(stage.name, recipe, fingerprints(inputs), recipe.base, data.inputs, processes))
