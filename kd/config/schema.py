"""The recipe: one frozen, fully typed description of a run, and how it is put together.

A recipe comes from a YAML file; flags override it, and `key=value` overrides both. One error names all mistakes.
Nothing here imports torch; only `train` needs transformers to be checked, when it is not empty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from kd.config.problems import NO_VALUE, Problem, in_plain_words

LARGEST_SEED = 2**32 - 1  # numpy, which transformers seeds along with torch, takes none above
Recipe = TypeVar("Recipe", bound="Frozen")


def plain(value: Any) -> Any:
    """Paths as text and lists as tuples, all the way down: what frozen, strictly typed fields take."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


# What pydantic puts into the place of an error for the kinds of a value that has several; users do not see it.
PATH_TAG, SERVER_TAG, ROWS_TAG, WORD_TAG, NUMBERS_TAG = TAGS = ("<path>", "<server>", "<rows>", "<word>", "<numbers>")
# What is to be found at an input of a command.
Reads = Literal["checkpoint", "full checkpoint", "rows", "evaluation", "suite", "template"]


class Frozen(BaseModel):
    """Base of all recipes: immutable, exact types (no "3" for 3), unknown keys refused, all problems in one error."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )
    verbatim: ClassVar[frozenset[str]] = frozenset()
    # Dotted key (`*` for any one part) -> what is read there: how `dae run` finds a stage's inputs.
    reads: ClassVar[Mapping[str, Reads]] = {}

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Short forms written out (a bare path becomes {path: ...}), so that dotted keys reach what they name."""
        return raw

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What can be looked up instead of asked for, filled in. `raw` is expanded, and may be wrong anywhere."""
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        """Problems between keys. `raw` is expanded, and may be wrong anywhere: single keys are checked elsewhere."""
        return []

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        """The dotted key that an unknown key of this name belongs to, if there is one."""
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all_problems(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(raw, cls) or not isinstance(raw, Mapping):
            return handler(raw)
        raw = cls.expand({key: value if key in cls.verbatim else plain(value) for key, value in raw.items()})
        problems: list[Problem] = []
        try:
            recipe = handler(raw)
        except ValidationError as error:
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for line in error.errors():
                value = NO_VALUE if line["type"] == "missing" else line["input"]
                elsewhere = cls.key_elsewhere(str(line["loc"][-1])) if line["type"] == "extra_forbidden" else None
                words = f"belongs elsewhere: write `{elsewhere}`" if elsewhere else in_plain_words(line, known)
                key = tuple(part for part in line["loc"] if part not in TAGS)
                problems.append(Problem(key, value, words))
        problems += cls.cross_checks(raw)
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, [as_pydantic(problem) for problem in problems])
        return recipe


def as_pydantic(problem: Problem) -> InitErrorDetails:
    """A problem as pydantic carries it up from a nested recipe."""
    # Not PydanticCustomError's own template fields: the words may hold braces.
    kind = PydanticCustomError("recipe", "{words}", {"words": problem.message})
    return InitErrorDetails(type=kind, loc=problem.key, input=problem.value)
