"""Compares the settings that an output was started with to the current ones.

A recipe is recorded with every key resolved. Earlier releases had fewer keys, so both sides are compared as today's
schema reads them: a key that came later has its default. Facts (fingerprints of models, rows, tokenizers) are compared
as far as both sides have them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kd.config.loading import load_recipe
from kd.config.problems import Origins, Problem, report
from kd.config.schema import Frozen
from kd.errors import UserError

PACE = re.compile(r"(expert\.[^.]+|reference|teacher)\.(requests_per_minute|concurrency)")  # of a teacher on a server
DEFAULT_BATCH_SIZE = 8  # rows of a micro-batch where a recipe names none
CUT = {"train.per_device_train_batch_size": DEFAULT_BATCH_SIZE, "train.gradient_accumulation_steps": 1}
NOWHERE = os.path.join(os.sep, ".recorded")  # an output that contains nothing

_ABSENT = object()


def recorded_recipe(path: Path, schema: type[Frozen]) -> dict[str, Any]:
    """The recipe of a run folder as today's schema reads it, flat, without `output`: the folder may have been moved.

    Raises:
        UserError: today's schema refuses it; the message names the key.
    """
    try:
        return recipe_values(load_recipe(schema, path, {}))
    except UserError as error:
        raise UserError(
            f"{path.parent}: was started with a recipe that is invalid in this release; choose another output.\n{error}"
        ) from error


def recorded_values(values: Mapping[str, Any], schema: type[Frozen]) -> dict[str, Any]:
    """The same for a recipe that was recorded as JSON, without `output`."""
    try:
        return recipe_values(schema.model_validate({**values, "output": NOWHERE}))
    except ValidationError as error:
        problems = [Problem(line["loc"], line["input"], line["msg"]) for line in error.errors()]
        raise report(problems, Origins(), "recorded settings, which this release does not take") from error


def recipe_values(recipe: Frozen) -> dict[str, Any]:
    """A recipe's values by dotted key, without where things lie (`output`, `cache.path`) and a server's pace."""
    values = flat(json.loads(recipe.model_dump_json(by_alias=True, exclude={"output"})))
    return {key: value for key, value in values.items() if key != "cache.path" and not PACE.fullmatch(key)}


def as_rows_per_step(values: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """A stage's values with the rows of an optimizer step in place of how the step is cut.

    Rows follow from seed and step alone, so that a run goes on with another micro-batch, accumulation or number of
    processes, as long as their product is the same. Not with `router_aux_loss`: that is a mean over a micro-batch.
    """
    if values.get("router_aux_loss"):
        return {**values, "processes": processes}
    kept = {key: value for key, value in values.items() if key not in CUT}
    rows = math.prod(cut_of(values, processes))
    return {**kept, "rows of an optimizer step (batch size x accumulation x processes)": rows}


def cut_of(values: Mapping[str, Any], processes: int) -> tuple[int, ...]:
    """How an optimizer step is cut: batch size, accumulation, processes."""
    return *(int(values.get(key, default)) for key, default in CUT.items()), processes


def changed_settings(recorded: Mapping[str, Any], current: Mapping[str, Any], schema: type[Frozen]) -> list[str]:
    """`changed` for settings recorded as one flat mapping: keys of a recipe, and facts beside them.

    Recorded keys of `schema` that are missing have their default; facts are compared as far as both sides have them.
    """
    fields = {name: field for name, field in schema.model_fields.items() if name in current or name in recorded}
    defaults = {name: field.get_default() for name, field in fields.items() if not field.is_required()}
    known = {**json.loads(json.dumps(defaults)), **recorded}
    sides = ({key: side[key] for key in side if key in fields} for side in (known, current))
    return changed(*sides) + changed_facts(
        *({key: side[key] for key in side if key not in fields} for side in (known, current))
    )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping: {"data.general[0].path": ...}."""
    if isinstance(value, Mapping) and value:
        parts = {f"{prefix}.{key}" if prefix else str(key): part for key, part in value.items()}
    elif isinstance(value, list) and value:
        parts = {f"{prefix}[{index}]": part for index, part in enumerate(value)}
    else:
        return {prefix: value}
    return {name: leaf for key, part in parts.items() for name, leaf in flat(part, key).items()}


def changed(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value differs: `key: recorded -> current`."""
    keys = dict.fromkeys([*recorded, *current])
    pairs = {key: (recorded.get(key, _ABSENT), current.get(key, _ABSENT)) for key in keys}
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in pairs.items() if old != new]


def changed_facts(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The same for facts, as far as both sides have them."""
    shared = recorded.keys() & current.keys()
    return changed(*({key: facts[key] for key in facts if key in shared} for facts in (recorded, current)))


def refuse_changes(output: Path, lines: list[str]) -> None:
    """Raise UserError where there are lines of `changed`."""
    if lines:
        shown = "".join(f"  {line}\n" for line in lines)
        raise UserError(
            f"{output}: was started with different settings (recorded -> current):\n{shown}"
            "Give the same command to resume it, or choose another output."
        )


def _shown(value: Any) -> str:
    return "(not given)" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)
