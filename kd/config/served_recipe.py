"""A teacher in a recipe: a path, or a model on a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from kd.config.address import plain_address
from kd.config.problems import NO_VALUE, SECRET, Key, Problem
from kd.config.schema import PATH_TAG, SERVER_TAG, Frozen

KEY_NAME = "TEACHER_API_KEY"  # environment variable


class ServedTeacher(Frozen):
    """A model behind an OpenAI-compatible server that answers `prompt_logprobs`, as vLLM does."""

    url: str = Field(
        min_length=1, description=f"of a server: its address, http://HOST:8000/v1; the key is read from {KEY_NAME}"
    )
    model: str = Field(min_length=1, description="of a server: the model's name there")
    top_k: int = Field(
        default=20,
        ge=1,
        description="of a server: how many probabilities of a token; vLLM gives 20 unless --max-logprobs is higher",
    )
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="of a server: at most so many; null: no limit"
    )
    concurrency: int = Field(default=8, ge=1, description="of a server: requests at a time, each of one row")

    @field_validator("url")
    @classmethod
    def _plain_form(cls, value: str) -> str:
        try:
            return plain_address(value, KEY_NAME)
        except ValueError:  # served_problems refuses it
            return value

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


def _kind(value: Any) -> str:
    return SERVER_TAG if isinstance(value, (Mapping, ServedTeacher)) else PATH_TAG


TeacherChoice = Annotated[
    Annotated[Annotated[str, Field(min_length=1)], Tag(PATH_TAG)] | Annotated[ServedTeacher, Tag(SERVER_TAG)],
    Discriminator(_kind),
]


def served_problems(raw: Mapping[str, Any], teachers: Mapping[Key, Any]) -> list[Problem]:
    """Addresses that cannot be used, and what a teacher on a server does not go with. teachers: all, by their keys."""
    problems = []
    for key, teacher in teachers.items():
        if isinstance(teacher, str) and teacher.startswith(("http://", "https://")):
            name = ".".join(map(str, key))
            words = f"is the address of a server: write {name}.url=ADDRESS and {name}.model=NAME"
            problems.append(Problem(key, SECRET, words))
    served = {key: one for key, one in teachers.items() if isinstance(one, Mapping)}
    if not served:
        return problems
    for key, teacher in served.items():
        if not isinstance(url := teacher.get("url"), str):
            continue
        try:
            plain_address(url, KEY_NAME)
        except ValueError as error:
            problems.append(Problem((*key, "url"), SECRET, str(error)))
    key = next(iter(served))
    if raw.get("cache") is None:
        words = "is required with a teacher on a server, whose answers are kept on disk: add cache.path=DIR"
        problems.append(Problem(("cache",), NO_VALUE, words))
    if raw.get("temperature", 1.0) != 1.0:
        words = f"a server gives probabilities at temperature 1 ({'.'.join(map(str, key))}): use 1.0"
        problems.append(Problem(("temperature",), raw["temperature"], words))
    return problems
