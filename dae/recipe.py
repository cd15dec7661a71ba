"""Recipes of `dae align` and `dae sample`: experts paired with their rows, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from dae.recorded_rows import complete_from_run_folders, domain_remedy, general_remedy
from dae.routing import GENERAL, UNNAMED
from kd.config.data_recipe import DATA_SETTINGS, ROUTE_NAME, route_problems
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import Reads
from kd.config.stage_recipe import BASE, Flag, StageRecipe
from kd.errors import UserError
from kd.losses.divergence_recipe import DivergenceRecipe


class AlignRecipe(DivergenceRecipe):
    """`dae align`: the student matches each expert on the rows of its route, and the reference on `general`."""

    has_experts: ClassVar[bool] = True
    summary: ClassVar[str] = "Make the student that matches each expert on its domain and the reference elsewhere."
    flags: ClassVar[tuple[Flag, ...]] = (
        BASE,
        Flag("expert", "expert", "[NAME=]PATH", "a domain's teacher; repeats, by name", repeats=True),
        Flag("reference", "reference", "CKPT", "teacher of general rows (default: the base)"),
        Flag(
            "domain-data",
            "data.domain",
            "[NAME=]PATH",
            "rows of an expert (default: the data recorded in the expert's run folder)",
            repeats=True,
        ),
        Flag(
            "general-data",
            "data.general",
            "PATH",
            "general rows (default: the data recorded in the reference's run folder)",
            repeats=True,
        ),
    )
    reads: ClassVar[Mapping[str, Reads]] = {
        **StageRecipe.reads,
        "expert.*": "checkpoint",
        "reference": "checkpoint",
        "student_from": "checkpoint",
    }

    output: str = Field(default="runs/align", min_length=1, description="the run folder to write")
    expert: dict[str, str] = Field(
        description="each domain's teacher: a path, or {name: path}; a LoRA folder, a checkpoint or a hub id"
    )
    reference: str | None = Field(default=None, min_length=1, description="teacher of general rows; null: the base")
    student_from: str | None = Field(
        default=None, min_length=1, description="go on from an earlier student: its run folder"
    )
    weights: Literal["routes", "tokens"] | dict[str, float] = Field(
        default="routes", description="each route the same say, each token the same say, or a factor for each route"
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _routes_tokens_or_factors(cls, value: Any) -> Any:
        if value in ("routes", "tokens") or isinstance(value, Mapping):
            return value
        raise ValueError("wants routes, tokens, or a factor for each route, such as {general: 1.0, domain: 2.0}")

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        plain = {name: value for name, value in given.items() if name not in ("expert", "domain_data")}
        flags, names = super().from_flags(plain)
        named_flags, named_names = align_flags(given.get("expert", ()), given.get("domain_data", ()))
        return flags | named_flags, names | named_names

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        raw = super().expand(raw)
        return {**raw, "expert": {UNNAMED: raw["expert"]}} if isinstance(raw.get("expert"), str) else raw

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
        problems += route_problems(
            raw, {GENERAL: general_remedy(raw)} | {str(n): domain_remedy(n, p) for n, p in experts.items()}
        )
        return problems + weight_problems(raw.get("weights"), [GENERAL, *experts])


def align_flags(experts: Sequence[str], domain_data: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`--expert [NAME=]PATH` and `--domain-data [NAME=]PATH` as dotted keys, and the flag of each key for messages."""
    flags: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, path in map(named, experts):
        key = "expert" if name is None else f"expert.{name}"
        if key in flags:
            again = "names two experts alike" if name else "without a name is for one expert: write --expert NAME=PATH"
            raise UserError(f"--expert {path}: {again}")
        flags[key], names[key] = path, "--expert"
    if "expert" in flags and len(flags) > 1:
        raise UserError(f"--expert {flags['expert']}: has no name beside named ones: write --expert NAME=PATH")
    for name, path in map(named, domain_data):
        if name == GENERAL:
            raise UserError(f"--domain-data {name}={path}: `{GENERAL}` is the reference's route: --general-data {path}")
        key = f"data.{name or UNNAMED}"
        flags.setdefault(key, []).append(path)
        names[key] = "--domain-data"
    return flags, names


def named(text: str) -> tuple[str | None, str]:
    """NAME=PATH -> (NAME, PATH); a text whose first part cannot be a name is a path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and ROUTE_NAME.fullmatch(name) else (None, text)


def expert_problems(experts: Mapping[str, Any]) -> list[Problem]:
    """No expert at all, names that another key has, and empty paths."""
    if not experts:
        return [Problem(("expert",), NO_VALUE, "names no expert: add one, such as --expert PATH")]
    problems = []
    for name, path in experts.items():
        if name == GENERAL:
            problems.append(
                Problem(("expert", name), path, "`general` is the reference's route: give the expert another name")
            )
        elif name in DATA_SETTINGS or not ROUTE_NAME.fullmatch(str(name)):
            words = "cannot be a route's name (letters, digits, - and _, and no setting of `data`): give it another"
            problems.append(Problem(("expert", str(name)), path, words))
        elif path == "":
            problems.append(Problem(("expert", name), path, "must not be empty"))
    return problems


def weight_problems(weights: Any, routes: list[str]) -> list[Problem]:
    """Factors are numbers above 0, one for each route."""
    if not isinstance(weights, Mapping):
        return []
    problems = [
        Problem(("weights", name), NO_VALUE, "has no factor: give one for each route")
        for name in routes
        if name not in weights
    ]
    for name, factor in weights.items():
        if name not in routes:
            problems.append(Problem(("weights", str(name)), factor, f"is no route; the routes are {', '.join(routes)}"))
        elif isinstance(factor, (int, float)) and not isinstance(factor, bool) and not factor > 0:
            problems.append(Problem(("weights", name), factor, "must be above 0"))
    return problems
