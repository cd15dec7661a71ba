"""Recipe of `dae distill`: one teacher, the distance to it, and what is compared beside the next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kd.config.data_recipe import route_problems
from kd.config.flags import BASE, ROWS, Flag
from kd.config.layer_recipes import AttentionRecipe, HiddenRecipe
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import Reads
from kd.config.stage_recipe import StageRecipe

ROUTE = "train"
LEAST_SKEW = 0.001  # nearer to 0 or 1 the mixture is one of the two distributions, and logarithms of fp32 run out


class DistillRecipe(StageRecipe):
    """`dae distill`: the student matches one teacher, of any size, on the rows of the route `train`."""

    summary: ClassVar[str] = "Make a student that matches a larger teacher: the stage before align."
    flags: ClassVar[tuple[Flag, ...]] = (
        BASE,
        Flag("teacher", "teacher", "CKPT", "checkpoint to learn from, of any size"),
        ROWS,
    )
    reads: ClassVar[Mapping[str, Reads]] = {**StageRecipe.reads, "teacher": "full checkpoint"}

    output: str = Field(default="runs/distill", min_length=1, description="the run folder to write")
    teacher: str = Field(min_length=1, description="the checkpoint to learn from: folder or hub id")
    lambda_: float = Field(
        default=1.0, ge=0, le=1, alias="lambda", description="weight of the divergence; the rest is next-token loss"
    )
    temperature: float = Field(default=1.0, gt=0, description="both distributions are softened by it")
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"] = Field(
        default="forward_kl", description="between teacher and student: KL(t||s), KL(s||t), between them, or skewed"
    )
    beta: float = Field(default=0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 is reverse KL")
    skew: float = Field(
        default=0.1,
        ge=LEAST_SKEW,
        le=1 - LEAST_SKEW,
        description="of the skewed divergences: how much of the first distribution is mixed into the second",
    )
    attention: AttentionRecipe | None = Field(
        default=None, description="also match attention maps: {weight, layers}; null: do not"
    )
    hidden: HiddenRecipe | None = Field(
        default=None, description="also match hidden states: {weight, layers, loss}; null: do not"
    )
    cross_tokenizer: Literal["uld"] | None = Field(
        default=None, description="uld: the teacher has another tokenizer, and sorted probabilities are compared"
    )

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = [*super().cross_checks(raw), *route_problems(raw, {ROUTE: "add --data PATH"})]
        divergence = raw.get("divergence", "forward_kl")
        if raw.get("beta", 0.5) != 0.5 and divergence != "jsd":
            problems.append(Problem(("beta",), raw["beta"], "is read with `divergence: jsd` only: remove it"))
        if raw.get("skew", 0.1) != 0.1 and not str(divergence).startswith("skewed_"):
            words = "is read with `divergence: skewed_forward_kl` or `skewed_reverse_kl` only: remove it"
            problems.append(Problem(("skew",), raw["skew"], words))
        return problems + cross_tokenizer_problems(raw)


def cross_tokenizer_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """What needs the same tokens on both sides, and is given beside `cross_tokenizer`."""
    if raw.get("cross_tokenizer") is None:
        return []
    problems = []
    if raw.get("lambda", raw.get("lambda_", 1.0)) == 1.0:
        words = "with `cross_tokenizer: uld` only the next-token loss says which tokens are meant: write 0.5, say"
        problems.append(Problem(("lambda",), NO_VALUE, words))
    for key, default in (("divergence", "forward_kl"), ("temperature", 1.0)):
        if raw.get(key, default) != default:
            problems.append(Problem((key,), raw[key], "is not read with `cross_tokenizer: uld`: remove it"))
    for key in ("attention", "hidden"):
        if raw.get(key) is not None:
            words = "needs the same tokens on both sides: remove it, or remove cross_tokenizer"
            problems.append(Problem((key,), raw[key], words))
    data = raw.get("data")
    if isinstance(data, Mapping) and data.get("packing") is True:
        words = "rows of two tokenizers cannot be packed together: set it to false, or remove cross_tokenizer"
        problems.append(Problem(("data", "packing"), True, words))
    return problems
