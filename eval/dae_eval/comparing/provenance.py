"""Where a report's figures come from: models, tasks, conditions, files and options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dae_eval.comparing.verdicts import Criteria
from dae_eval.results import Evaluation, TaskResult


def provenance(evaluations: Mapping[str, Evaluation], criteria: Criteria, command: str) -> list[tuple[str, str]]:
    """The comparison, in order: models, tasks, conditions (once if equal for all), files, options."""
    bases = {
        role: f"{one.model.base}, SHA-256 {one.model.base_fingerprint}"
        for role, one in evaluations.items()
        if one.model.base is not None
    }
    lines = _by_value(bases, "base of")
    lines += _by_value(
        {task: _task_conditions(result) for task, result in evaluations["student"].tasks.items()}, "task"
    )
    conditions = {role: _flat(one.conditions) for role, one in evaluations.items()}
    for key in dict.fromkeys(key for found in conditions.values() for key in found):
        by_role = {role: found[key] for role, found in conditions.items() if key in found}
        if len(set(by_role.values())) == 1 and len(by_role) == len(evaluations):
            lines.append((key, next(iter(by_role.values()))))
        else:
            lines += _by_value(by_role, f"{key}:")
    for role, one in evaluations.items():
        lines += [(f"training rows of {role}", f"{rows.path}, SHA-256 {rows.sha256}") for rows in one.training_rows]
    held_out = {(loss.route, loss.path, loss.sha256) for one in evaluations.values() for loss in one.held_out}
    lines += [(f"held-out rows of {route}", f"{path}, SHA-256 {sha256}") for route, path, sha256 in sorted(held_out)]
    lines += [(key.replace("_", " "), json.dumps(value)) for key, value in asdict(criteria).items()]
    if command and ("command", command) not in lines:  # the conditions of this command's own evaluations have it
        lines.append(("command of the report", command))
    return lines


def _by_value(values: Mapping[str, str], what: str) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return [(f"{what} {', '.join(found)}", value) for value, found in names.items()]


def _task_conditions(result: TaskResult) -> str:
    settings = "; ".join(f"{key} {value}" for key, value in _flat(result.settings).items())
    return f"version {result.version}; {result.metric}" + (f"; {settings}" if settings else "")


def _flat(conditions: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `outer.inner`; values as text."""
    found: dict[str, str] = {}
    for key, value in conditions.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _as_text(key, value)
    return found


def _as_text(key: str, value: Any) -> str:
    if key == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
