"""The recipe of `dae align`: experts paired with their rows by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

from pydantic import Discriminator, Field, Tag, field_validator

from dae.recorded_rows import complete_from_run_folders, domain_remedy, general_remedy
from dae.routing import GENERAL, UNNAMED
from kd.config.data_recipe import DATA_SETTINGS, ROUTE_NAME, route_problems
from kd.config.flags import BASE, NAME_RULE, Flag, split_name
from kd.config.problems import NO_VALUE, Key, Problem, one_of
from kd.config.schema import NUMBERS_TAG, WORD_TAG, Reads
from kd.config.served_recipe import TeacherChoice, served_problems
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.losses.divergence_recipe import DivergenceRecipe

Start = Annotated[
    Annotated[Literal["base", "auto"], Tag(WORD_TAG)] | Annotated[dict[str, float], Tag(NUMBERS_TAG)],
    Discriminator(lambda value: NUMBERS_TAG if isinstance(value, Mapping) else WORD_TAG),
]
DEFAULT_ROWS = "{} rows; repeats (default: the data recorded in the {}'s run folder)"


class AlignRecipe(DivergenceRecipe):
    """`dae align`: the student matches each expert on the rows of its route, and the reference on `general`."""

    has_experts: ClassVar[bool] = True
    summary: ClassVar[str] = "Train a student to match each expert on its domain and the reference elsewhere."
    flags: ClassVar[tuple[Flag, ...]] = (
        BASE,
        Flag("expert", "expert", "[NAME=]PATH", "teacher of a domain; repeats, with names", True),
        Flag("reference", "reference", "CKPT", "teacher of general rows (default: the base)"),
        Flag("domain-data", "data.domain", "[NAME=]PATH", DEFAULT_ROWS.format("domain", "expert"), True),
        Flag("general-data", "data.general", "PATH", DEFAULT_ROWS.format("general", "reference"), True),
    )
    reads: ClassVar[Mapping[str, Reads]] = {
        **StageRecipe.reads,
        "expert.*": "checkpoint",
        "reference": "checkpoint",
        "student_from": "checkpoint",
    }

    output: str = Field(default="runs/align", min_length=1, description="the run folder to write")
    expert: dict[str, TeacherChoice] = Field(
        description="teacher of each domain: a path, or {name: path}; a LoRA folder, a checkpoint or a hub id, or a "
        "model on a server: {name: {url, model, top_k}}"
    )
    reference: TeacherChoice | None = Field(
        default=None, description="teacher of general rows: as for `expert`; null: the base"
    )
    student_from: str | None = Field(
        default=None, min_length=1, description="train an earlier student further: its run folder"
    )
    start: Start = Field(
        default="auto",
        description="how far to start from the base towards each expert: base, auto, or {name: 0 to 1}",
    )
    weights: Literal["routes", "tokens"] | dict[str, float] = Field(
        default="routes",
        description="weight in the loss: equal per route, equal per token, or a factor per route",
    )
    budget: dict[str, float] = Field(
        default_factory=dict,
        description="{general: NATS}: the KL from the reference that the result may have, per token of general rows; "
        "training adjusts the general route's weight in the loss",
    )

    @property
    def keeps_best(self) -> bool:
        """Not with a budget: the checkpoint with the lowest eval loss may exceed it."""
        return super().keeps_best and not self.budget

    @property
    def trains_with_teachers(self) -> bool:
        """Also for a budget, which follows the reference's KL."""
        return super().trains_with_teachers or bool(self.budget)

    @field_validator("weights", mode="before")
    @classmethod
    def _routes_tokens_or_factors(cls, value: Any) -> Any:
        if value in ("routes", "tokens") or isinstance(value, Mapping):
            return value
        raise ValueError("expected routes, tokens, or a factor per route, such as {general: 1.0, domain: 2.0}")

    @field_validator("start", mode="before")
    @classmethod
    def _base_or_weights(cls, value: Any) -> Any:
        if value in ("base", "auto") or isinstance(value, Mapping):
            return value
        if is_number(value):  # of one expert it is its weight: `expand`
            raise ValueError("a single number works with one expert only; write start.NAME=0.4 for each expert")
        raise ValueError("expected base, auto, or a weight for each expert, such as {ecom: 0.4}")

    @field_validator("budget", mode="before")
    @classmethod
    def _nats_of_a_route(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return value
        raise ValueError(f"expected nats per token for a route, such as budget.{GENERAL}=0.02")

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        flags, names = super().from_flags({**given, "expert": None})
        del flags["data.domain"]  # set below, after data.general: the order of routes is that of these keys
        for name, path in map(split_name, given.get("expert") or ()):
            key = "expert" if name is None else f"expert.{name}"
            if flags.get(key) is not None:
                words = f"duplicate name `{name}`" if name else "several experts need names: --expert NAME=PATH"
                raise UserError(f"--expert {path}: {words}")
            flags[key], names[key] = path, "--expert"
        if flags["expert"] is not None and any(key.startswith("expert.") for key in flags):
            raise UserError(f"--expert {flags['expert']}: several experts need names: --expert NAME=PATH")
        for name, path in map(split_name, given.get("domain_data") or ()):
            if name == GENERAL:
                raise UserError(
                    f"--domain-data {name}={path}: `{GENERAL}` is the reference's route: use --general-data"
                )
            key = f"data.{name or UNNAMED}"
            flags[key] = [*(flags.get(key) or ()), path]
            names[key] = "--domain-data"
        return flags, names

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        raw = super().expand(raw)
        raw = {**raw, "expert": {UNNAMED: raw["expert"]}} if isinstance(raw.get("expert"), str) else raw
        raw = {**raw, "start": "base"} if "start" not in raw and raw.get("student_from") is not None else raw
        experts, start = raw.get("expert"), raw.get("start")
        if is_number(start) and isinstance(experts, Mapping) and len(experts) == 1:
            return {**raw, "start": dict.fromkeys(experts, float(start))}
        return raw

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return complete_from_run_folders(raw)

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = super().cross_checks(raw)
        experts = raw.get("expert")
        if not isinstance(experts, Mapping):
            return problems
        problems += expert_problems(experts)
        teachers: dict[Key, Any] = {("reference",): raw.get("reference")} | {
            ("expert", str(n)): one for n, one in experts.items()
        }
        problems += served_problems(raw, teachers)
        problems += route_problems(
            raw, {GENERAL: general_remedy(raw)} | {str(n): domain_remedy(n, p) for n, p in experts.items()}
        )
        problems += weight_problems(raw.get("weights"), [GENERAL, *experts])
        problems += budget_problems(raw)
        return problems + start_problems(raw, {str(name): one for name, one in experts.items()})


def is_number(value: Any) -> TypeGuard[float]:
    """Also of numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def expert_problems(experts: Mapping[str, Any]) -> list[Problem]:
    if not experts:
        return [Problem(("expert",), NO_VALUE, "at least one is required: add --expert PATH")]
    problems = []
    if isinstance(experts.get("url"), str) and isinstance(experts.get("model"), str):
        words = f"a model on a server needs a name: write expert.{UNNAMED}.url and expert.{UNNAMED}.model, say"
        return [Problem(("expert",), NO_VALUE, words)]
    for name, path in experts.items():
        if name == GENERAL:
            words = "`general` is the reference's route: rename the expert"
            problems.append(Problem(("expert", name), path, words))
        elif name in DATA_SETTINGS or not ROUTE_NAME.fullmatch(str(name)):
            words = f"invalid name: {NAME_RULE}, and is no setting of `data`"
            problems.append(Problem(("expert", str(name)), path, words))
        elif path == "":
            problems.append(Problem(("expert", name), path, "must not be empty"))
    return problems


def start_problems(raw: Mapping[str, Any], experts: Mapping[str, Any]) -> list[Problem]:
    start, problems = raw.get("start"), []
    if start not in (None, "base") and raw.get("student_from") is not None:
        problems.append(Problem(("start",), NO_VALUE, "cannot be combined with student_from: remove one"))
    for name, weight in start.items() if isinstance(start, Mapping) else ():
        if name not in experts:
            problems.append(Problem(("start", str(name)), weight, f"unknown expert; expected {one_of(list(experts))}"))
        elif isinstance(experts[name], Mapping) and weight:
            words = "needs the expert's weights, and this one is on a server: remove it"
            problems.append(Problem(("start", name), weight, words))
        elif is_number(weight) and math.isfinite(weight) and not 0 <= weight <= 1:
            problems.append(Problem(("start", name), weight, "must be from 0 (the base) to 1 (the expert)"))
    return problems


def budget_problems(raw: Mapping[str, Any]) -> list[Problem]:
    budget, cache = raw.get("budget"), raw.get("cache")
    if not isinstance(budget, Mapping) or not budget:
        return []
    problems = []
    if isinstance(cache, Mapping) and cache.get("kind") == "sampled":
        words = "cannot be combined with budget: a student learns its rows' draws, so their KL is too low; use another"
        problems.append(Problem(("cache", "kind"), "sampled", words))
    for name, nats in budget.items():
        if name != GENERAL:
            problems.append(Problem(("budget", str(name)), nats, f"unknown route; expected {GENERAL}"))
        elif is_number(nats) and math.isfinite(nats) and not nats > 0:
            problems.append(Problem(("budget", name), nats, "must be above 0: nats per token"))
    if raw.get("weights") == "tokens":
        words = "cannot be combined with budget, which sets the general route's factor: use routes or factors"
        problems.append(Problem(("weights",), "tokens", words))
    train = raw.get("train")
    if isinstance(train, Mapping) and train.get("load_best_model_at_end") is True:
        words = "cannot be combined with budget: the checkpoint with the lowest eval loss may exceed it; remove one"
        problems.append(Problem(("train", "load_best_model_at_end"), True, words))
    if raw.get("early_stopping_patience") is not None:
        words = "cannot be combined with budget, which adjusts the loss until the last step; remove one"
        problems.append(Problem(("early_stopping_patience",), raw["early_stopping_patience"], words))
    return problems


def weight_problems(weights: Any, routes: list[str]) -> list[Problem]:
    if not isinstance(weights, Mapping):
        return []
    problems = [
        Problem(("weights", name), NO_VALUE, "is required: add a factor for each route")
        for name in routes
        if name not in weights
    ]
    for name, factor in weights.items():
        if name not in routes:
            problems.append(Problem(("weights", str(name)), factor, f"unknown route; expected {one_of(routes)}"))
        elif is_number(factor) and not factor > 0:
            problems.append(Problem(("weights", name), factor, "must be above 0"))
    return problems
