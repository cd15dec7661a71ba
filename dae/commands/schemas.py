"""The recipe of each command, by the command's name: what `dae keys` lists."""

from __future__ import annotations

from dae_eval.suites import Suite

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.rank_teachers.recipe import RankRecipe
from dae.sampling.recipe import SampleRecipe
from dae.stages import STAGES
from kd.config.schema import Frozen


def schemas() -> dict[str, type[Frozen]]:
    """The stages' recipes, then the others."""
    return {
        **{name: entry.recipe for name, entry in STAGES.items()},
        "sample": SampleRecipe,
        "rank-teachers": RankRecipe,
        "merge-moe": MoeRecipe,
        "merge-weights": WeightsRecipe,
        "merge-to-lora": ToLoraRecipe,
        "suite": Suite,
    }
