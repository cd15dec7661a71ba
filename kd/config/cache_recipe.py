"""The recipe's `cache`: where what teachers say is kept, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kd.config.problems import Problem
from kd.config.schema import Frozen

READ_BY = {"top_k": "topk", "samples": "sampled"}


class CacheRecipe(Frozen):
    """Teachers answer each row once; training reads their answers from disk."""

    path: str = Field(min_length=1, description="folder; runs with the same teachers and rows share it")
    kind: Literal["hidden", "topk", "sampled"] = Field(
        default="hidden",
        description="hidden: final hidden states, so that losses are exact; topk: the largest probabilities, and the "
        "rest as one class; sampled: tokens drawn from the teacher, so that forward KL is right on average as long "
        "as rows are not seen often",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="of what is stored; auto: as the teacher computes (topk: float32); int8, only of hidden: with a "
        "scale per token; not of sampled",
    )
    top_k: int = Field(default=64, ge=1, description="of topk: how many probabilities of a token")
    samples: int = Field(default=12, ge=1, description="of sampled: how many draws for a token")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        kind, problems = raw.get("kind", "hidden"), []
        for key, reader in READ_BY.items():
            default = cls.model_fields[key].default
            if kind != reader and raw.get(key, default) != default:
                problems.append(Problem((key,), raw[key], f"is read with `kind: {reader}` only: remove it"))
        if kind == "topk" and raw.get("dtype") == "int8":
            words = "logarithms of probabilities need more: use float32 or bfloat16"
            problems.append(Problem(("dtype",), "int8", words))
        if kind == "sampled" and raw.get("dtype", "auto") != "auto":
            problems.append(Problem(("dtype",), raw["dtype"], "samples are integers: remove it"))
        return problems
