"""Where the student starts: the base, or a point on the line from the base towards its experts (kd/models/line.py).

`auto` goes towards the experts while that is cheap: the largest weights with which the untrained student has come at
least EXCHANGE nats per token nearer to its experts for each nat away from the reference, by the routes' KL on a fixed
sample of training rows. First one weight for all experts, then each expert's own. Further on, training does not win
back what no row protects (benchmarks/results/starts.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from dae.recipe import AlignRecipe
from dae.routing import GENERAL
from kd.models.line import Energy, Pull, start_adapter, start_all_weights
from kd.models.roles import Role
from kd.stages.stage import StageRoles

logger = logging.getLogger("dae")

EXCHANGE = 10.0  # nats of KL on domain routes for one on the general route
STEPS = 20  # weights are multiples of 1 / STEPS

Weights = dict[str, float]
Measure = Callable[[], Mapping[str, float]]  # `ROUTE_kl` of the student as it is now


def start_student(recipe: AlignRecipe, roles: StageRoles, measure: Measure) -> dict[str, Any]:
    """Move the student to its start; facts for the run's summary.

    Raises UserError where the student cannot take the sum of the experts' differences.
    """
    if recipe.start == "base":
        return {}
    experts = {name: roles.teachers[f"expert.{name}"] for name in recipe.expert}
    line = Line(roles.student, experts)
    if recipe.start == "auto":
        weights, curve = chosen_weights(line, measure)
        facts: dict[str, Any] = {"weights": weights, "curve": curve}
    else:
        weights = {name: recipe.start.get(name, 0.0) for name in experts}
        facts = {"weights": weights}
    energy = line.place(weights)
    described = ", ".join(f"{weight:g} of the way to {name}" for name, weight in weights.items())
    if energy is not None and energy.whole:
        facts["energy_kept"] = energy.share
        described += "" if energy.share > 0.9995 else f"; the adapter has {energy.share:.1%} of that difference"
    logger.info("start: from the base, %s", described)
    return facts


class Line:
    """The student on its way from the base to the experts."""

    def __init__(self, student: Role, experts: Mapping[str, Role]) -> None:
        """student: as it is at the base."""
        self._student = student
        self.experts = experts
        self._at = dict.fromkeys(experts, 0.0)
        self._new = {name: weight.detach().clone() for name, weight in _adapter_weights(student)}

    def place(self, weights: Mapping[str, float]) -> Energy | None:
        """Put the student at these weights; what its adapter took of the difference, None if all weights train."""
        if self._student.adapter is not None:
            for name, weight in _adapter_weights(self._student):
                weight.data.copy_(self._new[name])
            return start_adapter(self._student, [Pull(role, weights[name]) for name, role in self.experts.items()])
        moves = [Pull(role, weights[name] - self._at[name]) for name, role in self.experts.items()]
        self._at = dict(weights)
        start_all_weights(self._student.model, moves)
        return None


def _adapter_weights(student: Role) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the student's adapter; none if all weights train."""
    if student.adapter is None:
        return []
    return [(name, weight) for name, weight in student.model.named_parameters() if student.adapter in name.split(".")]


def chosen_weights(line: Line, measure: Measure) -> tuple[Weights, list[dict[str, Any]]]:
    """The weights by the rule of this module, and every point that was measured: weights, and KL by route."""
    names = list(line.experts)
    curve: list[dict[str, Any]] = []

    def kl_at(weights: Weights) -> dict[str, float]:
        line.place(weights)
        kl = {key.removesuffix("_kl"): value for key, value in measure().items() if key.endswith("_kl")}
        curve.append({"weights": dict(weights), "kl": kl})
        return kl

    at_base = kl_at(dict.fromkeys(names, 0.0))

    def fits(weights: Weights) -> bool:
        kl = kl_at(weights)
        gained = sum(at_base[name] - kl[name] for name in names)
        return gained >= EXCHANGE * (kl[GENERAL] - at_base[GENERAL])

    def largest(at: Callable[[int], Weights], low: int) -> int:
        """The largest step that fits, by bisection; `low` fits."""
        high = STEPS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(at(middle)) else (low, middle)
        return low

    steps = dict.fromkeys(names, largest(lambda all_of: dict.fromkeys(names, all_of / STEPS), 0))
    for name in names if len(names) > 1 else ():
        others = {other: found / STEPS for other, found in steps.items()}
        steps[name] = largest(partial(_with, others, name), steps[name])
    return {name: found / STEPS for name, found in steps.items()}, curve


def _with(others: Weights, name: str, steps: int) -> Weights:
    return {**others, name: steps / STEPS}
