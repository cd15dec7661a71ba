"""Where a student would start: the one part of a check that loads weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import set_seed

from dae.checking.plan import Plan
from kd.errors import UserError
from kd.stages.run_stage import advise_rate, measurement
from kd.stages.stage import AnyStage


@dataclass(frozen=True)
class StartPoint:
    """How far towards each expert, and KL(teacher || student) by route there: nats per response token.

    weights: empty for a stage without experts, and for the base. kl: empty without teachers.
    """

    weights: Mapping[str, float]
    kl: Mapping[str, float]


def measured_start(stage: AnyStage, plan: Plan) -> tuple[StartPoint, list[StartPoint]]:
    """Where training would start, and the points that `start: auto` measured. Logs a learning rate for the start.

    Raises UserError where the student cannot start there.
    """
    if served := stage.served(plan.recipe):
        raise UserError(
            f"--weights: cannot measure a teacher on a server ({', '.join(served)}); a run writes the same into its "
            "metrics before the first step"
        )
    set_seed(plan.recipe.seed)
    torch.set_flush_denormal(True)
    roles = stage.build_roles(plan.recipe, plan.inputs, plan.settings)
    objective = stage.objective(plan.recipe, roles)
    measure = measurement(plan.recipe, roles, objective, plan.data, plan.args)
    facts = stage.start(plan.recipe, roles, measure)
    advise_rate(facts, plan.steps, plan.args.learning_rate)
    kl = {key.removesuffix("_kl"): value for key, value in measure().items() if key.endswith("_kl")}
    tried = [StartPoint(point["weights"], point["kl"]) for point in facts.get("curve", ())]
    return StartPoint(facts.get("weights", {}), kl), tried
