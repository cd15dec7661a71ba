"""The keys that all training stages share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    field_validator,
)

from kd.config.data_recipe import DATA_SETTINGS, DataRecipe
from kd.config.flags import BASE, ROWS, CommandRecipe, Flag
from kd.config.problems import Problem, suggestion
from kd.config.schema import LARGEST_SEED, Frozen, Reads
from kd.config.training_arguments import ALLOWED, training_argument_problems

Quantization = Literal["nf4", "int8"]
Offload = Literal["cpu", "disk"]


class LoraRecipe(Frozen):
    """The student's adapter."""

    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="which layers: all-linear, a regular expression, or a list of module names"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _text_or_names(cls, value: Any) -> Any:
        named = isinstance(value, tuple) and value and all(isinstance(name, str) for name in value)
        if not named and not (isinstance(value, str) and value):
            raise ValueError("expected all-linear, a regular expression, or a list of module names")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"is not a regular expression ({error}); give one, all-linear, or a list of module names"
                ) from error
        return value


class StageRecipe(CommandRecipe):
    """The keys that all training stages share."""

    verbatim: ClassVar[frozenset[str]] = frozenset({"train"})
    has_experts: ClassVar[bool] = False
    flags: ClassVar[tuple[Flag, ...]] = (BASE, ROWS)  # besides --output, --recipe, --merge and --check
    reads: ClassVar[Mapping[str, Reads]] = {
        "base": "full checkpoint",
        "data.routes.*.*.path": "rows",
        "data.eval.*.*.path": "rows",
        "data.chat_template": "template",
    }

    base: str = Field(min_length=1, description="checkpoint that training starts from: folder or hub id")
    output: str = Field(min_length=1, description="the run folder to write")
    seed: int = Field(
        default=0, ge=0, le=LARGEST_SEED, description="decides the order of rows, the adapter's start and dropout"
    )
    data: DataRecipe = Field(description="rows and how they are read")
    lora: LoraRecipe | None = Field(
        default=LoraRecipe(), description="the adapter that trains; null: all weights train"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; auto: bfloat16 on a GPU that has it, else float32"
    )
    quantization: Quantization | None = Field(
        default=None,
        description="of frozen weights in memory (bitsandbytes): nf4 (4 bits) or int8; the adapter is not quantised",
    )
    attn_implementation: str | None = Field(
        default=None, description="of the models, as in transformers: sdpa, eager, ..."
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with a checkpoint")
    allow_fallback: bool = Field(
        default=False, description="train on where accelerate gives less than its config asks for: DDP, one process"
    )
    merge: bool = Field(default=False, description="also write the merged full weights of a LoRA student")
    router_aux_loss: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss that keeps a mixture's experts in use (Switch Transformer); 0: off",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better one; needs data.eval"
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="transformers.TrainingArguments by name, such as learning_rate"
    )

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the checkpoint with the lowest eval loss, unless `train` says otherwise."""
        return bool(self.data.eval)

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        data = raw.get("data", {})
        return {**raw, "data": DataRecipe.expand(dict(data))} if isinstance(data, Mapping) else raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        data, train = raw.get("data"), raw.get("train")
        problems = []
        if isinstance(train, Mapping):
            held_out = isinstance(data, Mapping) and bool(data.get("eval"))
            problems += training_argument_problems(train, held_out)
        if isinstance(data, Mapping) and data.get("chat_template") == "expert" and not cls.has_experts:
            words = "this stage has no expert: give `plain` or a .jinja file"
            problems.append(Problem(("data", "chat_template"), "expert", words))
        if raw.get("merge") is True and "lora" in raw and raw["lora"] is None:
            problems.append(Problem(("merge",), True, "with `lora: null` the weights are written whole: remove it"))
        attention = raw.get("attn_implementation")
        if isinstance(attention, str) and "/" in attention and raw.get("trust_remote_code") is not True:
            words = "is code on the hub: write `sdpa` or `eager`, or add trust_remote_code: true"
            problems.append(Problem(("attn_implementation",), attention, words))
        problems += quantization_problems(raw)
        if isinstance(data, Mapping) and not data.get("eval"):
            words = "needs an eval set: add `data.eval`"
            if raw.get("early_stopping_patience") is not None:
                problems.append(Problem(("early_stopping_patience",), raw["early_stopping_patience"], words))
            if isinstance(train, Mapping) and str(train.get("eval_strategy", "no")) not in ("no", "False"):
                problems.append(Problem(("train", "eval_strategy"), train["eval_strategy"], words))
        return problems

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        nested = {f"data.{key}": key for key in DATA_SETTINGS} | {f"lora.{key}": key for key in LoraRecipe.model_fields}
        found = next((dotted for dotted, key in nested.items() if key == name), None)
        if found or suggestion(name, cls.model_fields):
            return found
        return f"train.{name}" if name in ALLOWED else None


def quantization_problems(raw: Mapping[str, Any]) -> list[Problem]:
    quantization, problems = raw.get("quantization"), []
    if quantization is None:
        return []
    if "lora" in raw and raw["lora"] is None:
        words = "quantised weights cannot train: remove it, or `lora: null`"
        problems.append(Problem(("quantization",), quantization, words))
    elif raw.get("merge") is True:
        words = (
            "the adapter is trained on quantised weights; merged into the others it is another model: remove it. "
            "`dae merge weights` makes that model afterwards; evaluate it by itself"
        )
        problems.append(Problem(("merge",), True, words))
    return problems
