"""Where the student starts: the base, or a point on the line from the base towards its experts (kd/models/line.py).

`auto` takes the largest weights at which KL(expert || student), summed over the domain routes, has fallen by more than
EXCHANGE times as much as KL(reference || student) has risen on the general route. Both are nats per response token of
the untrained student, on a fixed sample of training rows. It first looks for one weight for all experts, then for each
expert's own. The rule is empirical: docs/start.md says how it was found.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn

from dae.recipe import AlignRecipe
from dae.routing import GENERAL
from kd.errors import UserError
from kd.models.line import Decomposed, Energy, Pull, described, refuse_expert, start_adapter, start_all_weights
from kd.models.roles import Role
from kd.models.sharding import is_sharded, own_part, reshard
from kd.models.summable import no_line_to_quantised, refuse_unsummable_config
from kd.stages.stage import Inputs, StageRoles

logger = logging.getLogger("dae")

EXCHANGE = 10.0  # nats gained on the domain routes for each nat lost on the general route
STEPS = 20  # weights are multiples of 1 / STEPS

Weights = dict[str, float]
Measure = Callable[[], Mapping[str, float]]  # `ROUTE_kl` of the student as it is now


def start_student(recipe: AlignRecipe, roles: StageRoles, measure: Measure) -> dict[str, Any]:
    """Move the student to its start; facts for the run's summary.

    Raises UserError where the student cannot take the sum of the experts' differences; `auto` warns, and stays.
    """
    if recipe.start == "base":
        return {}
    live = roles.live_teachers
    experts = {name: live[f"expert.{name}"] for name, one in recipe.expert.items() if isinstance(one, str)}
    if not experts:
        logger.info("start: the base; the weights of an expert on a server are not here")
        return {}
    line = Line(roles.student, experts)
    if recipe.start == "auto":
        found = weights_or_base(line, measure)
        if found is None:
            return {}
        weights, curve = found
        facts: dict[str, Any] = {"weights": weights, "curve": curve}
    else:
        weights = {name: recipe.start.get(name, 0.0) for name in experts}
        facts = {"weights": weights}
    energy = line.place(weights)
    facts["distance"] = line.distance()
    cut = ""
    if energy is not None and energy.whole:
        facts["energy_kept"] = energy.share
        cut = "" if energy.share > 0.9995 else f"; the adapter keeps {energy.share:.1%} of that difference"
    if any(weights.values()) and not facts["distance"]:
        logger.warning("start: these experts have the base's weights, so the student starts at the base")
    logger.info("start: %s%s", described(weights), cut)
    return facts


def weights_or_base(line: Line, measure: Measure) -> tuple[Weights, list[dict[str, Any]]] | None:
    """The weights of `auto` and what it measured; None if no expert can be summed, and the student is at the base.

    One of several experts that cannot be summed has weight 0, with a warning.
    """
    names = list(line.experts)
    for name in names if len(names) > 1 else ():
        try:
            refuse_expert(line.student, line.experts[name])
        except UserError as error:
            names = [other for other in names if other != name]
            logger.warning("start=auto: expert %s gets weight 0, because of this: %s", name, error)
    if not names:
        logger.warning("start=auto: the student starts at the base: no expert can be summed")
        return None
    try:
        return chosen_weights(line, names, measure)
    except UserError as error:
        line.place(dict.fromkeys(line.experts, 0.0))
        logger.warning("start=auto: the student starts at the base, because of this: %s", error)
        return None


def refuse_unreachable_start(recipe: AlignRecipe, inputs: Inputs) -> None:
    """Raise UserError where the recipe names a start that an expert's files show to be none."""
    for name, weight in recipe.start.items() if isinstance(recipe.start, Mapping) else ():
        expert = inputs.get(f"expert.{name}")
        if not weight or expert is None or expert.fingerprint == inputs["base"].fingerprint:
            continue
        if expert.is_adapter:
            refuse_unsummable_config(f"expert.{name}", expert.adapter_config)
        elif recipe.quantization is not None:
            raise UserError(no_line_to_quantised(f"expert.{name}"))


class Line:
    """The student on its way from the base to the experts."""

    def __init__(self, student: Role, experts: Mapping[str, Role]) -> None:
        """student: as it is at the base. A copy of what trains is kept in the CPU's memory, of split weights a part."""
        self.student = student
        self.experts = experts
        self._decomposed = Decomposed()
        self._at_base = {name: own_part(weight).to("cpu", copy=True) for name, weight in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of the student's adapter; all parameters if all weights train."""
        for role in (self.student, *self.experts.values()):
            reshard(role.model)
        adapter, parameters = self.student.adapter, self.student.model.named_parameters()
        return [(name, weight) for name, weight in parameters if adapter is None or adapter in name.split(".")]

    def place(self, weights: Mapping[str, float]) -> Energy | None:
        """Put the student at these weights; what its adapter took of the difference, None if all weights train."""
        for name, weight in self._trained():
            own_part(weight).copy_(self._at_base[name])
        pulls = [Pull(role, weights[name]) for name, role in self.experts.items()]
        if self.student.adapter is not None:
            return start_adapter(self.student, pulls, self._decomposed)
        start_all_weights(self.student.model, pulls)
        return None

    def distance(self) -> float:
        """Root mean square of how far what trains has been moved; of an adapter, its factors B, which began as 0."""
        moved = [
            (own_part(weight).cpu().double() - self._at_base[name].double()).square()
            for name, weight in self._trained()
            if self.student.adapter is None or "lora_B" in name
        ]
        sums = torch.tensor(
            [sum(float(one.sum()) for one in moved), sum(one.numel() for one in moved)], dtype=torch.float64
        )
        if is_sharded(self.student.model):
            sums = reduce(sums.to(self.student.model.device), "sum")
        squares, count = sums.tolist()
        return math.sqrt(squares / max(1.0, count))


def chosen_weights(line: Line, names: Sequence[str], measure: Measure) -> tuple[Weights, list[dict[str, Any]]]:
    """The weights by the rule of this module, and every point that was measured: weights, and KL in nats by route.

    names: of the experts that may get another weight than 0.
    """
    curve: list[dict[str, Any]] = []
    zeros = dict.fromkeys(line.experts, 0.0)

    def kl_at(weights: Weights) -> dict[str, float]:
        line.place(weights)
        kl = {key.removesuffix("_kl"): value for key, value in measure().items() if key.endswith("_kl")}
        curve.append({"weights": dict(weights), "kl": kl})
        return kl

    at_base = kl_at(zeros)

    def fits(weights: Weights) -> bool:
        kl = kl_at(weights)
        gained = sum(at_base[name] - kl[name] for name in line.experts)
        return gained > EXCHANGE * (kl[GENERAL] - at_base[GENERAL])

    def largest(at: Callable[[int], Weights], low: int) -> int:
        """The largest step that fits, by bisection; `low` fits."""
        high = STEPS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(at(middle)) else (low, middle)
        return low

    steps = dict.fromkeys(names, largest(lambda all_of: zeros | dict.fromkeys(names, all_of / STEPS), 0))
    for name in names if len(names) > 1 else ():
        others = zeros | {other: found / STEPS for other, found in steps.items()}
        steps[name] = largest(partial(_with, others, name), steps[name])
    return zeros | {name: found / STEPS for name, found in steps.items()}, curve


def _with(others: Weights, name: str, steps: int) -> Weights:
    return {**others, name: steps / STEPS}
