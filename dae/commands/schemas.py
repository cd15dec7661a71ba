"""The recipe of each command, by the command's name."""

from __future__ import annotations

from dae_eval.suites import Suite

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.recipe import AlignRecipe, SampleRecipe
from kd.choose.recipe import RankRecipe
from kd.config import Frozen, SftRecipe
from kd.distill_recipe import DistillRecipe

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
