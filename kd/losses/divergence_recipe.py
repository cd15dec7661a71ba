"""The distance to a teacher, in a recipe: for every stage that has teachers with the student's tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kd.config.cache_recipe import CacheRecipe
from kd.config.problems import Problem
from kd.config.stage_recipe import Offload, StageRecipe
from kd.losses.divergences import DIVERGENCES, parameters_of

LEAST_SKEW = 0.001  # nearer to 0 or 1 the mixture is one of the two distributions, and logarithms of fp32 run out
FORMULAS = "; ".join(f"{name}: {(it.__doc__ or '').splitlines()[0].rstrip('.')}" for name, it in DIVERGENCES.items())

if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]


class DivergenceRecipe(StageRecipe):
    """The token loss of a stage with teachers."""

    lambda_: float = Field(
        default=1.0, ge=0, le=1, alias="lambda", description="weight of the divergence; the rest is next-token loss"
    )
    temperature: float = Field(default=1.0, gt=0, description="both distributions are softened by it")
    divergence: DivergenceName = Field(default="forward_kl", description=f"between student p and teacher q; {FORMULAS}")
    beta: float = Field(default=0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 is reverse KL")
    skew: float = Field(
        default=0.1,
        ge=LEAST_SKEW,
        le=1 - LEAST_SKEW,
        description="of the skewed divergences: how much of the first distribution is mixed into the second",
    )
    cache: CacheRecipe | None = Field(
        default=None,
        description="keep what teachers say of the rows on disk: {path, kind, dtype, top_k, samples}; null: do not",
    )
    offload_teachers: Offload | None = Field(
        default=None,
        description="where layers of teachers with their own weights wait for each pass: cpu (memory), disk; null: "
        "on the device",
    )

    @property
    def trains_with_teachers(self) -> bool:
        """Whether a training step asks the teachers."""
        return self.lambda_ > 0.0

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = super().cross_checks(raw)
        for key in ("beta", "skew"):
            readers = [name for name in DIVERGENCES if key in parameters_of(name)]
            unread = raw.get("divergence", "forward_kl") not in readers
            if unread and raw.get(key, cls.model_fields[key].default) != cls.model_fields[key].default:
                words = f"is read with `divergence: {'` or `'.join(readers)}` only: remove it"
                problems.append(Problem((key,), raw[key], words))
        if raw.get("offload_teachers") is not None and raw.get("quantization") is not None:
            words = "quantised layers cannot be moved: remove it, or quantization"
            problems.append(Problem(("offload_teachers",), raw["offload_teachers"], words))
        return problems + cache_problems(raw)


def cache_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """What does not go with the recipe's `cache`."""
    cache, problems = raw.get("cache"), []
    if not isinstance(cache, Mapping):
        return []
    kind, temperature, divergence = cache.get("kind"), raw.get("temperature", 1.0), raw.get("divergence", "forward_kl")
    if kind in ("topk", "sampled") and temperature != 1.0:
        words = f"`cache.kind: {kind}` keeps probabilities at temperature 1: use 1.0, or cache.kind=hidden"
        problems.append(Problem(("temperature",), temperature, words))
    if kind == "sampled" and divergence != "forward_kl":
        words = "samples are right on average for forward_kl only: use that, or another cache.kind"
        problems.append(Problem(("divergence",), divergence, words))
    path, output = cache.get("path"), raw.get("output")
    if isinstance(path, str) and isinstance(output, str):
        inner, outer = os.path.abspath(path), os.path.abspath(output)
        if os.path.commonpath([inner, outer]) == outer:
            problems.append(Problem(("cache", "path"), path, f"lies in output ({output}), which one run owns: move it"))
    return problems
