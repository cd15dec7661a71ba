"""Losses between layers, in a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from kd.config.schema import Frozen

Layers = Literal["even"] | tuple[tuple[int, int], ...]


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
    """Two layers, counted from 0."""
    return isinstance(value, tuple) and len(value) == 2 and all(type(layer) is int and layer >= 0 for layer in value)


class AttentionRecipe(LayersRecipe):
    """KL(teacher's attention maps || student's)."""


class HiddenRecipe(LayersRecipe):
    """Distance between hidden states."""

    loss: Literal["cosine", "mse"] = Field(
        default="cosine", description="1 - cosine, or the mean of squared differences; over a learnt projection"
    )
