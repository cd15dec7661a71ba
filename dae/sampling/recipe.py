"""Recipe of `dae sample`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kd.config.flags import CommandRecipe, Flag
from kd.config.schema import LARGEST_SEED, Reads


class SampleRecipe(CommandRecipe):
    """`dae sample`: a model writes rows."""

    summary: ClassVar[str] = "Sample training rows from a model: general rows, or its answers to prompts."
    flags: ClassVar[tuple[Flag, ...]] = (
        Flag("model", "model", "CKPT", "model to sample from"),
        Flag("output", "output", "FILE", "JSONL file to write"),
        Flag("rows", "rows", None, "number of rows"),
        Flag("max-new-tokens", "max_new_tokens", None, "maximum length of a row"),
        Flag("seed", "seed", None, "the same seed gives the same rows"),
        Flag("batch-size", "batch_size", None, "rows per batch"),
        Flag("prompts", "prompts", "FILE", "JSONL with prompts to answer"),
    )
    reads: ClassVar[Mapping[str, Reads]] = {"model": "checkpoint", "prompts": "rows"}

    model: str = Field(min_length=1, description="checkpoint to sample from: folder or hub id")
    output: str = Field(min_length=1, description="JSONL file to write")
    rows: int = Field(default=1000, ge=1, description="number of rows")
    max_new_tokens: int = Field(default=256, ge=1, description="maximum tokens of a row; capped by the model's context")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature")
    batch_size: int = Field(default=16, ge=1, description="rows per batch")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="the same seed gives the same rows")
    prompts: str | None = Field(
        default=None, min_length=1, description="JSONL file with prompts to answer; null: the model writes those, too"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the checkpoint")
