"""The recipe of each command, by the command's name."""

from __future__ import annotations

from dae_eval.suites import Suite

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.rank_teachers.recipe import RankRecipe
from dae.recipe import AlignRecipe
from dae.sampling.recipe import SampleRecipe
from kd.config.schema import Frozen
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe

SCHEMAS: dict[str, type[Frozen]] = {
    "align": AlignRecipe,
    "distill": DistillRecipe,
    "sft": SftRecipe,
    "sample": SampleRecipe,
    "rank-teachers": RankRecipe,
    "merge-moe": MoeRecipe,
    "merge-weights": WeightsRecipe,
    "merge-to-lora": ToLoraRecipe,
    "suite": Suite,
}
CHECKED = ("align", "distill", "sft")  # the stages that `dae check` looks at
