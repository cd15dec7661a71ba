"""Records of benchmarks/starts.py of two machines as one.

On another machine rounding differs, and so do the world's bases and experts: its students are further runs of the same
ways, at the rates that the first machine's search chose (`starts.py --rates`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.starts_ways import WAY_FIELDS, WAYS

PER_SEED = ("figures", "weights", "budgets")


def read_pooled(folder: Path) -> dict[str, Any]:
    """starts.json with the students of the records that its rates come from."""
    record: dict[str, Any] = json.loads((folder / "starts.json").read_text(encoding="utf-8"))
    for pair, name in record.get("rates", {}).items():
        record = pooled(record, json.loads((folder / name).read_text(encoding="utf-8")), pair, Path(name).stem)
    return record


def pooled(record: Mapping[str, Any], other: Mapping[str, Any], pair: str, name: str) -> dict[str, Any]:
    """One pair's lines with the figures of both records; the seeds of `other` have its name."""
    mine = {key_of(line): line for line in record["lines"] if line["pair"] == pair}
    theirs = {key_of(line): named_seeds(line, name) for line in other["lines"] if line["pair"] == pair}
    order = [tuple(getattr(way, field) for field in WAY_FIELDS) for way in WAYS]
    keys = sorted({*mine, *theirs}, key=lambda key: (order.index(key[:-1]), key[-1]))
    lines = [with_figures(mine[key], theirs.get(key)) if key in mine else theirs[key] for key in keys]
    ends = record["ends"]
    if pair == "world":
        ends = {end: ends[end] | renamed(other["ends"][end], name) for end in ends}
    compared = [
        {**one, "seed": f"{one['seed']}, {name}"} for one in other.get("differences", ()) if one["pair"] == pair
    ]
    return {
        **record,
        "ends": ends,
        "lines": lines + [line for line in record["lines"] if line["pair"] != pair],
        "differences": [*record["differences"], *compared],
    }


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two lines have in common that are pooled: the way, and its rate at the end."""
    return (*(line[field] for field in WAY_FIELDS), line["learning_rate"])


def named_seeds(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**line, **{field: renamed(line[field], name) for field in PER_SEED}}


def renamed(by_seed: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {f"{seed}, {name}": value for seed, value in by_seed.items()}


def with_figures(line: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**line, **{field: line[field] | other[field] for field in PER_SEED}} if other else dict(line)
