"""The kinds of stages of `dae run`: each one's recipe, inputs, output and command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.sampling.recipe import SampleRecipe
from dae.stages import STAGES
from kd.config.data_recipe import ROUTE_NAME
from kd.config.flags import NAME_RULE
from kd.config.layering import RecipeDumper
from kd.config.problems import NO_VALUE, Key, Problem
from kd.config.schema import Frozen, Reads

Gives = Literal["checkpoint", "rows", "evaluation", "report"]
ROLES = ("base", "expert", "reference", "student")


class SuiteChoice(Frozen):
    """A suite's file, and keys that override it."""

    verbatim: ClassVar[frozenset[str]] = frozenset({"set"})

    file: str = Field(min_length=1, description="YAML with tasks in groups")
    set: dict[str, Any] = Field(default_factory=dict, description="keys that override the suite's")

    def assignments(self) -> list[str]:
        return [f"{key}={in_one_line(value)}" for key, value in dotted(self.set)]


class SuiteStage(Frozen):
    """A stage that may name its suite by a bare path."""

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "suite": {"file": raw["suite"]}} if isinstance(raw.get("suite"), str) else raw


class EvalStage(SuiteStage):
    """`dae eval tasks`: one model scored on the tasks of a suite."""

    reads: ClassVar[Mapping[str, Reads]] = {
        "model": "checkpoint",
        "base": "full checkpoint",
        "suite.file": "suite",
    }

    model: str = Field(min_length=1, description="checkpoint, adapter or run folder")
    base: str | None = Field(default=None, min_length=1, description="base of an adapter; null: the one it names")
    suite: SuiteChoice = Field(description="a file, or {file, set: {key: value}}")
    output: str = Field(min_length=1, description="folder for the answers")

    def command_line(self) -> list[str]:
        return [*words([("model", self.model), ("base", self.base)]), *suite_words(self.suite, self.output)]


class ReportStage(SuiteStage):
    """`dae report`: base, expert, reference and student compared, from models or finished evaluations."""

    reads: ClassVar[Mapping[str, Reads]] = {
        **dict.fromkeys(ROLES, "checkpoint"),
        "compare.*": "checkpoint",
        "from.*": "evaluation",
        "suite.file": "suite",
    }

    base: str | None = Field(default=None, min_length=1, description="the expert's starting point")
    expert: str | None = Field(default=None, min_length=1, description="domain expert")
    reference: str | None = Field(default=None, min_length=1, description="general model; null: the base")
    student: str | None = Field(default=None, min_length=1, description="the model to judge")
    compare: dict[str, str] = Field(default_factory=dict, description="other students to compare: {name: path}")
    from_: dict[str, str] = Field(
        default_factory=dict, alias="from", description="finished evaluations instead of models: {role: folder}"
    )
    suite: SuiteChoice | None = Field(default=None, description="a file, or {file, set: {key: value}}")
    margin: float = Field(default=1.0, gt=0, description="largest loss on general tasks that passes, in points")
    min_gap: float = Field(default=0.0, ge=0, le=1, description="least share of the expert's gain that passes")
    max_task_loss: float = Field(default=5.0, gt=0, description="largest loss of a single task that passes, in points")
    allow_missing: tuple[str, ...] = Field(default=(), description="tasks that may be missing, by name")
    retention_only: bool = Field(default=False, description="report retention only; no expert")
    output: str = Field(min_length=1, description="folder for the report")

    def command_line(self) -> list[str]:
        flags: list[tuple[str, str | None]] = [(role, getattr(self, role)) for role in ROLES]
        flags += [("compare", f"{name}={path}") for name, path in self.compare.items()]
        flags += [("from", f"{role}={folder}") for role, folder in self.from_.items()]
        flags += [("margin", f"{self.margin!r}" if self.margin != 1.0 else None)]
        flags += [("min-gap", f"{self.min_gap!r}" if self.min_gap else None)]
        flags += [("max-task-loss", f"{self.max_task_loss!r}" if self.max_task_loss != 5.0 else None)]
        flags += [("allow-missing", task) for task in self.allow_missing]
        switch = ["--retention-only"] if self.retention_only else []
        return [*words(flags), *switch, *suite_words(self.suite, self.output)]

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        if raw.get("from"):
            words = "cannot be combined with `from`: use models or finished evaluations"
            return [Problem((key,), NO_VALUE, words) for key in (*ROLES, "compare", "suite") if raw.get(key)]
        needed = ["student", "suite"]
        if raw.get("retention_only") is not True:
            needed += ["base", "expert"]
        elif not raw.get("base"):
            needed.append("reference")
        words = "is required, unless `from` names finished evaluations"
        problems = [Problem((key,), NO_VALUE, words) for key in needed if not raw.get(key)]
        others = raw.get("compare")
        for name in others if isinstance(others, Mapping) else ():
            if name in ROLES or not ROUTE_NAME.fullmatch(str(name)):
                words = f"invalid name: {NAME_RULE}, and is no role ({', '.join(ROLES)})"
                problems.append(Problem(("compare", str(name)), NO_VALUE, words))
        return problems


def dotted(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping) and part:
            yield from dotted(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", part


def in_one_line(value: Any) -> str:
    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def words(flags: Iterable[tuple[str, str | None]]) -> list[str]:
    """The flags that have a value, as a command line."""
    return [word for flag, value in flags if value is not None for word in (f"--{flag}", value)]


def suite_words(suite: SuiteChoice | None, output: str) -> list[str]:
    chosen = [] if suite is None else ["--suite", suite.file, *suite.assignments()]
    return [*chosen, "--output", output]


@dataclass(frozen=True)
class Kind:
    """command_line: what follows the command's words; None if the command reads a recipe."""

    command: tuple[str, ...]
    schema: type[Frozen]
    gives: Gives = "checkpoint"
    command_line: Callable[[Any], list[str]] | None = None


def kinds() -> dict[str, Kind]:
    """Every kind of stage by name, in the order of messages."""
    trained = {name: Kind((name,), entry.recipe) for name, entry in STAGES.items()}
    return {
        **trained,
        "sample": Kind(("sample",), SampleRecipe, "rows"),
        "merge moe": Kind(("merge", "moe"), MoeRecipe),
        "merge weights": Kind(("merge", "weights"), WeightsRecipe),
        "merge to-lora": Kind(("merge", "to-lora"), ToLoraRecipe),
        "eval": Kind(("eval", "tasks"), EvalStage, "evaluation", EvalStage.command_line),
        "report": Kind(("report",), ReportStage, "report", ReportStage.command_line),
    }


def found_at(raw: Any, pattern: str) -> Iterator[tuple[Key, str]]:
    """Every text at a dotted pattern, with its key; `raw` may be invalid anywhere."""
    first, _, rest = pattern.partition(".")
    if isinstance(raw, Mapping):
        parts: list[tuple[Any, Any]] = [(k, v) for k, v in raw.items() if isinstance(k, str) and first in ("*", k)]
    elif isinstance(raw, (list, tuple)) and first == "*":
        parts = list(enumerate(raw))
    else:
        return
    for part, value in parts:
        if rest:
            yield from (((part, *below), text) for below, text in found_at(value, rest))
        elif isinstance(value, str) and value:
            yield (part,), value
