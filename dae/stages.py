"""The training stages: the only list of them. The command line, `dae check`, `dae keys` and `dae run` read it.

An entry is a recipe and the stage's class (the protocol is in kd/stages/stage.py), which is imported when it runs.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dae.recipe import AlignRecipe
from kd.config.stage_recipe import StageRecipe
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe

if TYPE_CHECKING:
    from kd.stages.stage import Stage


@dataclass(frozen=True)
class StageEntry:
    """A stage's recipe, which imports no torch, and its class as "module:Class"."""

    recipe: type[StageRecipe]
    home: str

    def load(self) -> Stage[Any]:
        """The stage; imports torch."""
        stage: Stage[Any] = pkgutil.resolve_name(self.home)()
        return stage


STAGES: dict[str, StageEntry] = {
    "align": StageEntry(AlignRecipe, "dae.alignment:Align"),
    "distill": StageEntry(DistillRecipe, "kd.stages.distill:Distill"),
    "sft": StageEntry(SftRecipe, "kd.stages.sft:Sft"),
}
