"""How a recipe is put together: YAML < flags < key=value; and written out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from kd.config.data_recipe import DataRecipe
from kd.config.layering import Layers, RecipeDumper, dotted
from kd.config.problems import MISSING, Key, Problem, as_written, report
from kd.config.schema import Frozen, Recipe

UNUSABLE = re.compile("[\0\ud800-\udfff]")


def address(key: Key) -> Key:
    """Where a key, as the user writes it, lies: routes stand beside the settings of `data`, and are kept apart."""
    if len(key) > 1 and key[0] == "data" and key[1] not in DataRecipe.model_fields:
        return ("data", "routes", *key[1:])
    return key


def load_recipe(
    schema: type[Recipe],
    path: Path | None,
    flags: Mapping[str, Any],
    assignments: Sequence[str] = (),
    flag_names: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
    where: str = "command line",
) -> Recipe:
    """Puts a recipe together: YAML < flags < key=value < values.

    Args:
        schema: which stage's recipe.
        path: the YAML file, if there is one.
        flags: dotted key -> value; a value of None means that the flag was not given.
        assignments: `key=value`, values read as YAML.
        flag_names: dotted key -> the flag as typed, for messages; `--key` where it names none.
        values: dotted key -> value, given in Python.
        where: what messages name where no file, flag or key=value is at fault.

    Raises:
        UserError: one message with everything that is wrong.
    """
    layers = Layers(address)
    if path is not None:
        layers.read_yaml(Path(path))
    layers.raw = schema.expand(layers.raw)
    names = flag_names or {}
    for name, value in flags.items():
        if value is not None:
            layers.put(tuple(name.split(".")), value, names.get(name, f"--{name.replace('_', '-')}"))
    layers.raw = schema.expand(layers.raw)
    for assignment in assignments:
        layers.put_assignment(assignment)
    for name, value in (values or {}).items():
        layers.put(dotted(name), value, where)
    problems = list(layers.problems)
    if unusable := list(unusable_texts(layers.raw)):  # before a path is opened by one of them
        raise report(unusable, layers.origins, str(path) if path else where)
    try:
        recipe = schema.model_validate(schema.complete(schema.expand(layers.raw)))
    except ValidationError as error:
        known = {tuple(str(part) for part in problem.key) for problem in problems}
        found = [Problem(line["loc"], line["input"], line["msg"]) for line in error.errors()]
        problems += [problem for problem in found if tuple(str(part) for part in problem.key) not in known]
    if problems:
        with_remedies = [with_remedy(problem, flags, names) for problem in problems]
        raise report(with_remedies, layers.origins, str(path) if path else where)
    return recipe


def unusable_texts(value: Any, key: Key = ()) -> Iterator[Problem]:
    """A problem for each text that holds a null or half of a surrogate pair: no path has them, and no file of ours."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from unusable_texts(inner, (*key, str(name)))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from unusable_texts(inner, (*key, index))
    elif isinstance(value, str) and (found := UNUSABLE.search(value)):
        yield Problem(key, value, f"holds the character U+{ord(found[0]):04X}: remove it")


def with_remedy(problem: Problem, flags: Mapping[str, Any], names: Mapping[str, str]) -> Problem:
    """A missing key with the flag or key that gives it."""
    if problem.message != MISSING:
        return problem
    key = ".".join(str(part) for part in as_written(problem.key))
    way = names.get(key, f"--{key.replace('_', '-')}") if key in flags else f"`{key}`"
    return replace(problem, message=f"{MISSING}: add {way}")


def resolved_yaml(recipe: Frozen) -> str:
    """The recipe with every default written out, in the order of the schema; `load_recipe` reads it back the same."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
