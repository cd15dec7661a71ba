"""What a run was made from: the record beside its weights, and how it differs from another run's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd.errors import UserError

PROVENANCE = "provenance.json"
FINISHED = "run.json"
TOOLKIT = "dae-align"
HELD_OUT = "eval."  # before a route's name: its held-out rows
_ABSENT = object()


@dataclass(frozen=True)
class DataInput:
    """One data source of a run: path as typed, SHA-256 of its content, share of rows (0..1; None: by rows).

    encoded: SHA-256 of the tokens and masks that its rows became: tokenizer and chat template are in it.
    """

    path: str
    sha256: str
    share: float | None = None
    encoded: str | None = None


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """What a run folder of ours says it was made from, or None where `folder` is not one.

    Keys: `stage`; `processes`: how many; `base`: {path, fingerprint}; `data`: {route: [{path, sha256, share}]};
    `inputs`: {role: fingerprint}.

    Raises:
        UserError: provenance.json is there and cannot be read.
    """
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        return None
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); restore it, or remove it to go without provenance") from error
    if not isinstance(provenance, dict) or provenance.get("toolkit") != TOOLKIT:
        return None
    return provenance


def base_fingerprint_of(adapter_folder: str | Path) -> str | None:
    """Fingerprint of the base that an adapter was trained on, where a run folder of ours tells it; else None."""
    provenance = read_provenance(adapter_folder)
    base = provenance.get("base") if provenance else None
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any], recipe_before: str, recipe_now: str) -> list[str]:
    """One line, with the old and the new value, for each recipe key and input that differs; for another stage, that.

    The number of processes counts among them: it decides how many rows make an optimizer step.
    """
    if before.get("stage") != now["stage"]:
        return [f"stage: {_shown(before.get('stage'))} -> {_shown(now['stage'])}"]
    pairs = (
        {"processes": (before.get("processes", 1), now["processes"])}
        | _pairs(_flat(_yaml_of_recipe(recipe_before)), _flat(_yaml_of_recipe(recipe_now)))
        | _pairs(_input_hashes(before), _input_hashes(now))
        | _changed_tokens(before, now)
    )
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in pairs.items() if old != new]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The same for flat settings, one indented line each; empty where nothing differs."""
    return "\n".join(f"  {key}: {_shown(a)} -> {_shown(b)}" for key, (a, b) in _pairs(before, now).items() if a != b)


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in dict.fromkeys([*old, *new])}


def _shown(value: Any) -> str:
    return "(not given)" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)


def _yaml_of_recipe(text: str) -> dict[str, Any]:
    recipe = yaml.safe_load(text)
    return {key: value for key, value in recipe.items() if key != "output"}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping: {"data.general[0].path": ...}."""
    if isinstance(value, Mapping) and value:
        parts = {f"{prefix}.{key}" if prefix else str(key): part for key, part in value.items()}
    elif isinstance(value, list) and value:
        parts = {f"{prefix}[{index}]": part for index, part in enumerate(value)}
    else:
        return {prefix: value}
    return {name: leaf for key, part in parts.items() for name, leaf in _flat(part, key).items()}


def _changed_tokens(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Tokens of sources whose content is the same. Earlier releases recorded no tokens."""
    found = {}
    for route, sources in now["data"].items():
        for index, (source, old) in enumerate(zip(sources, before["data"].get(route, ()), strict=False)):
            tokens = old.get("encoded"), source.get("encoded")
            if None not in tokens and old["sha256"] == source["sha256"]:
                found[f"tokens of data.{route}[{index}] (tokenizer or chat template)"] = tokens
    return found


def _input_hashes(provenance: Mapping[str, Any]) -> dict[str, str]:
    models = {f"content of {role}": sha256 for role, sha256 in provenance["inputs"].items()}
    files = {
        f"content of data.{route}[{index}]": source["sha256"]
        for route, sources in provenance["data"].items()
        for index, source in enumerate(sources)
    }
    return models | files
