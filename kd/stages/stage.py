"""What a training stage is: which checkpoints it reads, its rows, its roles, and what it minimises.

`run_stage` (run_stage.py) trains by it, and `dae check` looks at it without weights. A new stage is a
recipe (a StageRecipe), a class with the methods of `Stage`, and a line in `dae.stages.STAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn
from transformers import TrainerCallback

from kd.cache.store import CachedTeacher
from kd.config.served_recipe import ServedTeacher
from kd.config.stage_recipe import StageRecipe
from kd.data.stage_data import StageData
from kd.models.checkpoint import Checkpoint
from kd.models.roles import LoadSettings, Role, vocabulary_rows
from kd.training.model_card import Description
from kd.training.objective import Objective, Teacher
from kd.training.trainer import RoutedTrainer

RecipeT = TypeVar("RecipeT", bound=StageRecipe)
Inputs = Mapping[str, Checkpoint]  # by role; `base` is among them


def fingerprints(inputs: Inputs) -> dict[str, str]:
    """SHA-256 of each role's weights and config. Raises UserError where files are torn, missing or pickled."""
    return {role: one.fingerprint for role, one in inputs.items()}


@dataclass(frozen=True)
class StageRoles:
    """The models of a stage.

    teachers: by role, in the order in which cards and checks name them, in memory or cached; shared: the copy of the
    base's weights that several roles stand on, where there is one; own_vocabulary: the teachers have a tokenizer of
    their own.
    """

    student: Role
    teachers: Mapping[str, Teacher]
    shared: nn.Module | None = None
    own_vocabulary: bool = False

    @property
    def live_teachers(self) -> dict[str, Role]:
        """Those in memory."""
        return {role: teacher for role, teacher in self.teachers.items() if isinstance(teacher, Role)}

    @property
    def all(self) -> tuple[Role, ...]:
        """All in memory, the student first."""
        return (self.student, *self.live_teachers.values())

    @property
    def vocabulary_rows(self) -> int:
        """Rows that the heads share which are compared with each other."""
        if self.own_vocabulary:
            return vocabulary_rows([self.student])
        cached = [one.vocabulary_rows for one in self.teachers.values() if isinstance(one, CachedTeacher)]
        return min(vocabulary_rows(self.all), *cached) if cached else vocabulary_rows(self.all)


class Stage(Protocol[RecipeT]):
    """One kind of training run. What depends on the kind is asked of it, and of nothing else."""

    name: str
    recipe: type[RecipeT]

    def inputs(self, recipe: RecipeT) -> dict[str, Checkpoint]:
        """The checkpoints by role, `base` among them. Raises UserError where one is not found."""
        ...

    def served(self, recipe: RecipeT) -> Mapping[str, ServedTeacher]:
        """The teachers on servers by role; they are not among the inputs, and answer through the cache only."""
        return {}

    def check(self, recipe: RecipeT, inputs: Inputs) -> RecipeT:
        """The recipe, with what its checkpoints decide filled in; reads no weights of full checkpoints.

        Raises UserError where the checkpoints do not belong together or do not fit the recipe.
        """
        ...

    def load_data(self, recipe: RecipeT, inputs: Inputs) -> StageData:
        """All rows, encoded. Raises UserError where they cannot be used."""
        ...

    def build_roles(self, recipe: RecipeT, inputs: Inputs, settings: LoadSettings) -> StageRoles:
        """The student and its teachers; on the device `meta` without weights. Raises UserError."""
        ...

    def objective(self, recipe: RecipeT, roles: StageRoles) -> Objective:
        """What is minimised."""
        ...

    def taught_by(self, recipe: RecipeT) -> Mapping[str, str]:
        """Route -> the role of its teacher, for what a cache can hold."""
        return {}

    def in_memory(self, recipe: RecipeT, inputs: Inputs, is_new: bool) -> set[str]:
        """Roles of cached teachers that are loaded all the same: they cost nothing, or a new run needs their weights.

        is_new: False where a run goes on, whose student has started.
        """
        return set()

    def start(
        self, recipe: RecipeT, roles: StageRoles, measure: Callable[[], Mapping[str, float]]
    ) -> Mapping[str, Any]:
        """Move the untrained student to where training starts; facts for the run's summary.

        `distance` among the facts: root mean square change of the weights that train, from which a learning rate is
        suggested.

        measure: loss and KL of the student as it is, by route, on a fixed sample of training rows (`evaluate_routes`).
        """
        return {}

    def callbacks(
        self, recipe: RecipeT, data: StageData, roles: StageRoles, trainer: RoutedTrainer
    ) -> Sequence[TrainerCallback]:
        """Further callbacks of the trainer, such as measures on the eval sets."""
        return ()

    def describe(self, recipe: RecipeT) -> Description:
        """What the result is, for its model card."""
        ...


AnyStage = Stage[Any]
