"""What Python callers pass, as values of a recipe: rows as sources, keyword arguments as keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from kd.config.data_recipe import DATA_SETTINGS, SourceRecipe
from kd.config.in_memory_rows import InMemoryRows, is_dataset, why_no_rows
from kd.config.schema import plain
from kd.config.stage_recipe import LoraRecipe, StageRecipe
from kd.config.training_arguments import ALLOWED
from kd.errors import UserError

# Keys of a recipe that are arguments of their own.
RENAMED = {"base": "model", "output": "output_dir"}


def sources(value: Any, route: str) -> Any:
    """Rows of a route as a recipe has them: paths and sources as given, all else as rows in memory.

    Raises UserError where a value is no rows.
    """
    if not is_list(value) or not all(map(is_source, value)) or not value:
        return source(value, route)
    return [source(one, f"{route}.{place}") for place, one in enumerate(value)]


def source(value: Any, route: str) -> Any:
    """One source: a path, {"path": rows, "share": 0.2}, or rows. Raises UserError where a value is none of them."""
    if isinstance(value, InMemoryRows):
        return value
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, Mapping) and "path" in value:
        return {**value, "path": source(value["path"], route)}
    return InMemoryRows(value, f"rows of `{route}`")


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_source(value: Any) -> bool:
    """Whether an entry of a list is a source of its own, and not a row."""
    if isinstance(value, Mapping):
        return "path" in value and set(value) <= set(SourceRecipe.model_fields)
    return isinstance(value, (str, os.PathLike, InMemoryRows)) or is_dataset(value) or is_list(value)


def routes(argument: str, value: Any, key: str) -> dict[str, Any]:
    """{"shop": rows} as {"data.shop": sources}. Raises UserError where a value is no mapping of routes."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or "path" in value:
        kind = type(value).__name__ if why_no_rows(value) else "rows"
        raise UserError(
            f'{argument}: expected a mapping from routes to rows, such as {{"domain": rows, "general": rows}}, '
            f"not {kind}"
        )
    held_out = key.removeprefix("data").removeprefix(".")
    return {f"{key}.{name}": sources(rows, f"{held_out}.{name}".removeprefix(".")) for name, rows in value.items()}


def recipe_values(schema: type[StageRecipe], function: str, keys: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Keyword arguments and `args` by dotted key; nested mappings are flattened, so that they add to each other.

    Raises UserError where `args` is no mapping, or a key is an argument of its own.
    """
    if args is not None and not isinstance(args, Mapping):
        raise UserError(
            f'{function}(args=...): expected a mapping such as {{"train.learning_rate": 1e-3}}, '
            f"not {type(args).__name__}"
        )
    values = flattened({place_of(schema, function, name): value for name, value in keys.items()})
    values |= flattened(args or {})
    for key, argument in RENAMED.items():
        if key in values:
            raise UserError(f"{function}({key}=...): is the argument `{argument}`")
    return values


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"data": {"max_length": 64}} as {"data.max_length": 64}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            found[key] = value
    return {key: value if key.startswith("train.") else plain(value) for key, value in found.items()}


def place_of(schema: type[StageRecipe], function: str, name: str) -> str:
    """The dotted key that a keyword means: a key of the recipe, or one of its sections `data`, `lora` and `train`.

    Raises UserError for one that is near to a key of a section; the recipe itself refuses others.
    """
    own = {field.alias or key for key, field in schema.model_fields.items()}
    sections = {"train": ALLOWED, "lora": LoraRecipe.model_fields, "data": DATA_SETTINGS}
    places = {key: f"{section}." for section, names in sections.items() for key in names} | dict.fromkeys(own, "")
    name = name.removesuffix("_")  # lambda_: `lambda` is a word of Python
    if name in places:
        return places[name] + name
    near = get_close_matches(name, sorted(places), n=1, cutoff=0.6)
    if near and near[0] not in own:
        raise UserError(f"{function}(): {name}: unknown key; did you mean `{near[0]}`?")
    return name
