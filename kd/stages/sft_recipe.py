"""Recipe of `dae sft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kd.config.data_recipe import route_problems
from kd.config.problems import Problem
from kd.config.stage_recipe import StageRecipe

ROUTE = "train"


class SftRecipe(StageRecipe):
    """`dae sft`: next-token loss on response tokens of the route `train`."""

    summary: ClassVar[str] = "Train an expert: next-token loss on response tokens."

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        return [*super().cross_checks(raw), *route_problems(raw, {ROUTE: "add --data PATH"})]
