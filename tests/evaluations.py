"""Evaluations made by hand: what the tests of pairing, roles and comparison compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from dae_eval.report import Report, TaskLine
from dae_eval.results import Document, Evaluation, Kind, ModelFacts, TaskResult

N = 400
KINDS: dict[str, tuple[str, Kind]] = {
    "price": ("shop", "domain"),
    "size": ("shop", "domain"),
    "sorting": ("general", "general"),
    "copying": ("general", "general"),
    "crafts": ("general, not aligned", "shown"),
}


def task(name: str, scores: Any, **changes: Any) -> TaskResult:
    """A task with the given scores, one document each."""
    group, kind = KINDS[name]
    documents = tuple(
        Document(i, f"{name}-{i}", float(score), f"{name} {i}?", "yes", "yes" if score else "no", f"{name}-{i}")
        for i, score in enumerate(scores)
    )
    result = TaskResult(name, group, kind, "acc", "1", {"shots": 0, "limit": None}, documents, chance=0.5, majority=0.6)
    return replace(result, **changes)


def evaluation(name: str, *tasks: TaskResult, fingerprint: str = "", **more: Any) -> Evaluation:
    """An evaluation of the model at `name`, whose fingerprint is the name unless another is given."""
    inputs = more.pop("inputs", {})
    facts = ModelFacts(name, fingerprint or f"sha-{name}", inputs=inputs)
    conditions = more.pop("conditions", {"command": f"dae eval tasks --model {name}", "libraries": {"torch": "2.13.0"}})
    return Evaluation(facts, {one.task: one for one in tasks}, conditions, **more)


def right(share: float, wrong: tuple[int, ...] = ()) -> np.ndarray:
    """Scores of which the first `share` are 1, but for the documents in `wrong`."""
    scores = (np.arange(N) < share * N).astype(float)
    scores[list(wrong)] = 0
    return scores


def models(student: dict[str, np.ndarray] | None = None) -> dict[str, Evaluation]:
    """base = reference; an expert that gained and forgot; a student that took most of the gain and kept all."""
    base = {"price": right(0.3), "size": right(0.3), "sorting": right(0.9), "copying": right(0.9), "crafts": right(0.8)}
    expert = base | {"price": right(0.9), "size": right(0.9), "sorting": right(0.4), "copying": right(0.4)}
    student = base | {"price": right(0.85), "size": right(0.85), "crafts": right(0.7)} | (student or {})
    of_base = evaluation("base", *(task(name, scores) for name, scores in base.items()))
    return {
        "base": of_base,
        "expert": evaluation("expert", *(task(name, scores) for name, scores in expert.items())),
        "reference": of_base,
        "student": evaluation("student", *(task(name, scores) for name, scores in student.items())),
    }


def line(report: Report, name: str) -> TaskLine:
    return next(found for found in report.tasks if found.task == name)


def without(found: dict[str, Evaluation], *names: str) -> dict[str, Evaluation]:
    """The same evaluations without the named tasks."""
    return {
        role: replace(one, tasks={name: each for name, each in one.tasks.items() if name not in names})
        for role, one in found.items()
    }
