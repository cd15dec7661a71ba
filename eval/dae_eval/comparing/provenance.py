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
    """The comparison, in order: tasks, conditions (once if equal for all), files, options. Models have a table."""
    known = {one.model.fingerprint for one in evaluations.values()}
    bases = {
        role: f"{one.model.base}, SHA-256 {one.model.base_fingerprint}"
        for role, one in evaluations.items()
        if one.model.base is not None and one.model.base_fingerprint not in known
    }
    lines = _by_value(bases, "base of")
    settings = {task: _settings(result) for task, result in evaluations["student"].tasks.items()}
    lines += _each_or_all(settings, "tasks:", "of task")
    lines += _each_or_all({role: _flat(one.conditions) for role, one in evaluations.items()}, "", "of")
    rows: dict[str, list[str]] = {}
    for role, one in evaluations.items():
        for source in one.training_rows:
            rows.setdefault(f"{source.path}, SHA-256 {source.sha256}", []).append(role)
    lines += [(f"training rows of {', '.join(roles)}", source) for source, roles in rows.items()]
    held_out = {(loss.route, loss.path, loss.sha256) for one in evaluations.values() for loss in one.held_out}
    lines += [(f"held-out rows of {route}", f"{path}, SHA-256 {sha256}") for route, path, sha256 in sorted(held_out)]
    lines += [(key.replace("_", " "), json.dumps(value)) for key, value in asdict(criteria).items()]
    if command and ("command", command) not in lines:  # the conditions of this command's own evaluations have it
        lines.append(("command of the report", command))
    return lines


def _each_or_all(facts: Mapping[str, Mapping[str, str]], common: str, of: str) -> list[tuple[str, str]]:
    """A line for each key that is the same for all; else one for each value, with the names that have it."""
    lines = []
    for key in dict.fromkeys(key for found in facts.values() for key in found):
        by_name = {name: found[key] for name, found in facts.items() if key in found}
        if len(set(by_name.values())) == 1 and len(by_name) == len(facts):
            lines.append((f"{common} {key}".strip(), next(iter(by_name.values()))))
        else:
            lines += _by_value(by_name, f"{key} {of}")
    return lines


def _by_value(values: Mapping[str, str], what: str) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return [(f"{what} {', '.join(found)}", value) for value, found in names.items()]


def _settings(result: TaskResult) -> dict[str, str]:
    return {"version": result.version, "metric": result.metric, **_flat(result.settings)}


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
