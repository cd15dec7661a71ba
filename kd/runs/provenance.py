"""What a run was made from: the record beside its weights, and how it differs from what the same command has now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kd.errors import UserError
from kd.runs.settings import changed_facts

PROVENANCE = "provenance.json"
FINISHED = "run.json"
TOOLKIT = "dae-align"
HELD_OUT = "eval."  # before a route's name: its held-out rows


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
    """The recorded provenance of a run folder; None if `folder` is not a run folder of dae.

    Keys: `stage`; `processes`: how many; `base`: {path, fingerprint}, of a base that was quantised in memory also
    {quantization}; `data`: {route: [{path, sha256, share}]};
    `inputs`: {role: fingerprint}.

    Raises:
        UserError: provenance.json is not valid JSON, or a key has another type.
    """
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        return None
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); restore it, or remove it to go without") from error
    if not isinstance(provenance, dict) or provenance.get("toolkit") != TOOLKIT:
        return None
    try:
        _Provenance.model_validate(provenance)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; restore it, or remove it to go without") from error
    return {"inputs": {}, "data": {}, **provenance}


class _Recorded(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Base(_Recorded):
    path: str
    fingerprint: str
    quantization: str | None = None


class _Source(_Recorded):
    path: str
    sha256: str
    share: float | None = None
    encoded: str | None = None


class _Provenance(_Recorded):
    """The types of what is read of provenance.json."""

    stage: str | None = None
    processes: int = Field(default=1, ge=1)
    base: _Base | None = None
    inputs: dict[str, str] = {}
    data: dict[str, list[_Source]] = {}


def base_fingerprint_of(adapter_folder: str | Path) -> str | None:
    """Fingerprint of the adapter's base as recorded in its run folder; None if it is not a run folder of dae."""
    return _of_base(adapter_folder, "fingerprint")


def base_quantization_of(adapter_folder: str | Path) -> str | None:
    """How the adapter's base was quantised when it was trained; None if it was not, or its folder does not say."""
    return _of_base(adapter_folder, "quantization")


def _of_base(adapter_folder: str | Path, key: str) -> str | None:
    provenance = read_provenance(adapter_folder)
    base = provenance.get("base") if provenance else None
    value = base.get(key) if isinstance(base, dict) else None
    return value if isinstance(value, str) else None


def changed_inputs(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each input of a run whose content differs, as far as both records have it.

    Tokens are compared only if the rows are the same.
    """
    records = (recorded, current)
    before, now = (_sources(record) for record in records)
    same = [name for name in now if name in before and before[name]["sha256"] == now[name]["sha256"]]
    tokens = (
        {
            f"tokens of {name} (tokenizer or chat template)": sources[name]["encoded"]
            for name in same
            if sources[name].get("encoded") is not None
        }
        for sources in (before, now)
    )
    return changed_facts(*(_contents(record) for record in records)) + changed_facts(*tokens)


def _contents(provenance: Mapping[str, Any]) -> dict[str, Any]:
    models = {f"content of {role}": sha256 for role, sha256 in provenance["inputs"].items()}
    rows = {f"content of {name}": source["sha256"] for name, source in _sources(provenance).items()}
    return {**models, **rows}


def _sources(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    data = provenance["data"].items()
    return {f"data.{route}[{index}]": source for route, sources in data for index, source in enumerate(sources)}
