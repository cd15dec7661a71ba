"""A route kept within a budget of KL per token: its factor in the loss is the multiplier of that constraint.

    minimise the other routes' loss   subject to   KL_route <= budget

by dual ascent on the factor's logarithm, which keeps it positive: after every optimizer step

    log factor += RATE / steps * clip(KL_route / allowed - 1, -1, 1)

KL_route is the mean over the tokens of the last steps, older ones fading. With an eval set it is multiplied by the
ratio of held-out to training KL at the last evaluation, so that the budget is one for held-out rows. The budget is for
the result: in runs without one, the KL in the middle of training was two to four times its value at the end, when the
learning rate is low. So `allowed` falls from (1 + NOISE) * AIM * budget before the first step to AIM * budget after the
last one, with the square of the share of steps that are left: a factor that is too low late in training comes too late
to have an effect, since the learning rate is low. All constants are empirical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from kd.training.objective import Objective, RouteSums

RATE = 10.0  # the most that log factor can move in a whole run
NOISE = 2.0  # what the KL is allowed above the budget at first, in budgets
AIM = 0.9  # a little below the budget, so that the result is not above it half of the time
FADING = 0.95  # what a step's sums weigh one step later
LARGEST_GAP = 4.0  # one evaluation of few rows must not move the factor without limit
LAST_PART = 0.1  # of the steps: what the result is measured on where there is no eval set

# What decides how a run goes on: Python floats, so that a resumed run has the same bits.
STATE = ("log_factor", "recent_kl", "recent_tokens", "gap", "last_kl", "last_tokens")


class RouteBudget(TrainerCallback, ExportableState):
    """The budget of one route.

    log_factor: the factor's logarithm. recent_kl: sum of KL over response tokens, in nats, older steps fading;
    recent_tokens: of how many tokens. gap: held-out KL over training KL at the last evaluation. last_kl, last_tokens:
    the same sums over the last part of the steps, without fading.
    """

    def __init__(self, route: str, nats: float) -> None:
        """nats: of KL(teacher || student) per response token."""
        self.route = route
        self.nats = nats
        self.log_factor = 0.0
        self.recent_kl = self.recent_tokens = 0.0
        self.gap = 1.0
        self.last_kl = self.last_tokens = 0.0
        self._sums: Tensor | None = None  # [2] KL and tokens of the optimizer step so far, on this rank

    @property
    def factor(self) -> float:
        """What the route's own factor is multiplied by."""
        return math.exp(self.log_factor)

    def applied_to(self, objective: Objective) -> Objective:
        """The objective with the route's factor as it is now."""
        routes = (
            replace(route, factor=route.factor * self.factor) if route.name == self.route else route
            for route in objective.routes
        )
        return replace(objective, routes=tuple(routes))

    def add(self, sums: RouteSums, objective: Objective) -> None:
        """Add a micro-batch to the sums of the optimizer step."""
        index = [route.name for route in objective.routes].index(self.route)
        both = torch.stack([sums.kl[index].double(), sums.tokens[index].double()])
        self._sums = both if self._sums is None else self._sums + both

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the factor by this step's KL, over all ranks."""
        if self._sums is None:
            return
        total: Any = reduce(self._sums, "sum")
        kl, tokens = total.tolist()
        self._sums = None
        self.recent_kl = FADING * self.recent_kl + kl
        self.recent_tokens = FADING * self.recent_tokens + tokens
        if state.global_step > (1 - LAST_PART) * state.max_steps:
            self.last_kl += kl
            self.last_tokens += tokens
        if tokens > 0:
            allowed = AIM * self.nats * (1 + NOISE * (1 - state.global_step / state.max_steps) ** 2)
            over = self.gap * self.recent_kl / self.recent_tokens / allowed - 1.0
            self.log_factor += RATE / state.max_steps * min(1.0, max(-1.0, over))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Note how far held-out rows are from training rows."""
        held_out = given["metrics"].get(f"eval_{self.route}_kl")
        if held_out is not None and self.recent_kl > 0:
            gap = held_out * self.recent_tokens / self.recent_kl
            self.gap = min(LARGEST_GAP, max(1 / LARGEST_GAP, gap))

    def outcome(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """The result against the budget: KL in nats at the last evaluation of an eval set, else over the last steps.

        `kl` and `met` are None where no step had a row of the route.
        """
        kl, measured_on = self._measured(evaluation.get(f"eval_{self.route}_kl"))
        known = {"route": self.route, "nats": self.nats, "kl": kl, "measured_on": measured_on}
        return {**known, "met": None if kl is None else kl <= self.nats, "factor": self.factor}

    def _measured(self, held_out: float | None) -> tuple[float | None, str]:
        if held_out is not None:
            return held_out, "eval set"
        if self.last_tokens > 0:
            return self.last_kl / self.last_tokens, "training rows of the last tenth of the steps"
        if self.recent_tokens > 0:  # few rows a step, and none of this route among the last
            return self.recent_kl / self.recent_tokens, "the last training rows of this route"
        return None, "no training row of this route"

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {
            "args": {"route": self.route, "nats": self.nats},
            "attributes": {name: getattr(self, name) for name in STATE},
        }
