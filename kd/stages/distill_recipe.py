"""Recipe of `dae distill`: one teacher, the distance to it, and what is compared beside the next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from kd.config.data_recipe import route_problems
from kd.config.flags import BASE, ROWS, Flag
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import Frozen, Reads
from kd.config.served_recipe import TeacherChoice, served_problems
from kd.config.stage_recipe import StageRecipe
from kd.losses.divergence_recipe import DivergenceRecipe
from kd.losses.layer_pairs import Layers

ROUTE = "train"


class LayersRecipe(Frozen):
    """A loss between layers."""

    weight: float = Field(default=1.0, gt=0, description="of this loss, beside the loss of `lambda` and `divergence`")
    layers: Layers = Field(
        default="even", description="[student's, teacher's] layers, counted from 0; even: all, spread evenly"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _even_or_pairs(cls, value: Any) -> Any:
        if value == "even":
            return value
        if isinstance(value, tuple) and value and all(is_pair(pair) for pair in value):
            return value
        raise ValueError("expected even, or a list of [student's layer, teacher's layer] such as [[0, 0], [11, 23]]")


def is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(layer) is int and layer >= 0 for layer in value)


class AttentionRecipe(LayersRecipe):
    """KL(teacher's attention maps || student's)."""


class HiddenRecipe(LayersRecipe):
    """Distance between hidden states."""

    loss: Literal["cosine", "mse"] = Field(
        default="cosine", description="1 - cosine, or the mean of squared differences; over a learnt projection"
    )


class DistillRecipe(DivergenceRecipe):
    """`dae distill`: the student matches one teacher, of any size, on the rows of the route `train`."""

    summary: ClassVar[str] = "Make a student that matches a larger teacher: the stage before align."
    flags: ClassVar[tuple[Flag, ...]] = (
        BASE,
        Flag("teacher", "teacher", "CKPT", "checkpoint to learn from, of any size"),
        ROWS,
    )
    reads: ClassVar[Mapping[str, Reads]] = {**StageRecipe.reads, "teacher": "full checkpoint"}

    output: str = Field(default="runs/distill", min_length=1, description="the run folder to write")
    teacher: TeacherChoice = Field(
        description="what to learn from: a folder or hub id, or a model on a server: {url, model, top_k}"
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
        problems += served_problems(raw, {("teacher",): raw.get("teacher")})
        return problems + cross_tokenizer_problems(raw) + cache_problems(raw)


def cache_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """What needs more of the teacher than a cache holds."""
    if raw.get("cache") is None:
        return []
    needs = {"attention": "attention maps", "hidden": "hidden states of all layers", "cross_tokenizer": "own tokens"}
    words = "needs {} of the teacher, which a cache does not hold: remove it, or remove cache"
    return [Problem((key,), NO_VALUE, words.format(what)) for key, what in needs.items() if raw.get(key) is not None]


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
