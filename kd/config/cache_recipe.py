"""The recipe's `cache`: where what teachers say is kept, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kd.config.problems import Problem
from kd.config.schema import Frozen


class CacheRecipe(Frozen):
    """Teachers answer each row once; training reads their answers from disk."""

    path: str = Field(min_length=1, description="folder; runs with the same teachers and rows share it")
    kind: Literal["hidden", "topk"] = Field(
        default="hidden",
        description="hidden: final hidden states, so that losses are exact; topk: the largest probabilities, and the "
        "rest as one class",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="of what is stored; auto: as the teacher computes (topk: float32); int8, only of hidden: with a "
        "scale per token",
    )
    top_k: int = Field(default=64, ge=1, description="of topk: how many probabilities of a token")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        is_top_k = raw.get("kind") == "topk"
        problems = []
        if not is_top_k and raw.get("top_k", 64) != 64:
            problems.append(Problem(("top_k",), raw["top_k"], "is read with `kind: topk` only: remove it"))
        if is_top_k and raw.get("dtype") == "int8":
            words = "logarithms of probabilities need more: use float32 or bfloat16"
            problems.append(Problem(("dtype",), "int8", words))
        return problems
