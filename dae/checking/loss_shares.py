"""Each route's share of the loss over a run's steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kd.data.mixing import Mixture
from kd.data.stage_data import StageData
from kd.training.objective import Objective

SAMPLED_STEPS = 1000  # the first ones; later steps have the same shares


@dataclass(frozen=True)
class LossShare:
    """One route's share of the loss, as a mean over steps (all routes sum to 1).

    absent: the share of steps without a row of the route, 0 to 1.
    """

    mean: float
    absent: float


def loss_shares(objective: Objective, data: StageData, mixture: Mixture, steps: int) -> dict[str, LossShare]:
    """Each route's share of the loss, by the objective's own weights of each step's rows.

    In a step without rows of a route, the others get its weight. So with `weights: routes` a route's share is its
    factor's only if every step has rows of every route.
    """
    if len(data.route_names) == 1:
        return {data.route_names[0]: LossShare(1.0, 0.0)}
    route_of_source = [data.route_names.index(source.route) for source in data.sources]
    counts = [rows.response_counts for rows in data.rows]
    sampled = min(steps, SAMPLED_STEPS)
    shares_R = torch.zeros(len(data.route_names), dtype=torch.float64)
    absent_R = torch.zeros(len(data.route_names), dtype=torch.float64)
    for step in range(sampled):
        tokens_R = torch.zeros(len(data.route_names), dtype=torch.int64)
        for source, row in mixture.rows_of_step(step):
            tokens_R[route_of_source[source]] += int(counts[source][row])
        shares_R += objective.weights(tokens_R) * tokens_R
        absent_R += tokens_R == 0
    means, absent = (shares_R / sampled).tolist(), (absent_R / sampled).tolist()
    return {name: LossShare(means[place], absent[place]) for place, name in enumerate(data.route_names)}
