"""Recipe of `dae sample`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kd.config.schema import LARGEST_SEED, Frozen, Reads


class SampleRecipe(Frozen):
    """`dae sample`: a model writes general rows itself."""

    reads: ClassVar[Mapping[str, Reads]] = {"model": "checkpoint", "prompts": "rows"}

    model: str = Field(min_length=1, description="checkpoint that writes: folder or hub id")
    output: str = Field(min_length=1, description="the JSONL file to write")
    rows: int = Field(default=1000, ge=1, description="how many rows")
    max_new_tokens: int = Field(default=256, ge=1, description="longest row in tokens; the model's context caps it")
    temperature: float = Field(default=1.0, gt=0, description="of the sampling; 1 is the model's own distribution")
    batch_size: int = Field(default=16, ge=1, description="rows written at a time")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="the same seed gives the same rows")
    prompts: str | None = Field(
        default=None,
        min_length=1,
        description="a JSONL file whose prompts are answered; null: the model starts by itself",
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the checkpoint")
