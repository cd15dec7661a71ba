"""Recipe of `dae sft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.config.data_recipe import route_problems
from kd.config.problems import Problem
from kd.config.stage_recipe import StageRecipe


class SftRecipe(StageRecipe):
    """`dae sft`: next-token loss on response tokens of the route `train`."""

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        return [*super().cross_checks(raw), *route_problems(raw, {"train": "add --data PATH"})]
