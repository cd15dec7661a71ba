"""The recipe's `cache`: where the teachers' hidden states are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd.config.schema import Frozen


class CacheRecipe(Frozen):
    """Teachers answer each row once; training reads their final hidden states from disk."""

    path: str = Field(min_length=1, description="folder; runs with the same teachers and rows share it")
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto", description="of what is stored; auto: as the teacher computes; int8: with a scale per token"
    )
