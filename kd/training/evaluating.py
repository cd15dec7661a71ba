"""Loss and divergences of each route on held-out rows, or on a sample of training rows before the first step.

Shape legend: R routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from kd.data.batches import Batch
from kd.models.sharding import is_sharded
from kd.models.teacher_logits import TeacherLogits
from kd.training.metrics import MetricsWindow
from kd.training.objective import Objective, route_sums, teacher_views


def evaluate_routes(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    objective: Objective,
    device: torch.device,
    answers: list[Mapping[int, TeacherLogits]] | None = None,
    factors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """{"loss", "NAME_loss", "NAME_kl", "NAME_ntp"} in nats per response token over held-out batches, in eval mode.

    answers: the teachers' to each batch, filled by the first call with a list; the same batches again need no teacher.
    Not where weights are sharded over ranks: an answer has the teacher's head, which is whole for a moment only.
    factors: what a token counts in the means, by the batches' names; 1 without them.
    """
    if is_sharded(model):
        answers = None
    was_training = model.training
    model.eval()
    totals = MetricsWindow(objective)
    with_teachers = all(route.teacher is not None for route in objective.routes)
    with torch.no_grad():
        for index, (name, batch) in enumerate((name, batch) for name, several in batches.items() for batch in several):
            placed = {key: value.to(device) for key, value in batch.items()}
            if answers is not None and with_teachers and index == len(answers):
                answers.append(teacher_views(placed, objective))
            views = answers[index] if answers else None
            sums = route_sums(model, placed, objective, with_teachers=with_teachers, views=views)
            totals.add(sums if factors is None else sums.times(factors[name]))
    model.train(was_training)
    means = totals.drain(lambda tensor, _how: tensor)  # every rank evaluates the same rows
    result = {"loss": float((objective.weights(means.tokens_R) * means.loss_R).sum())}
    for index, route in enumerate(objective.routes):
        if means.tokens_R[index] > 0:
            result |= {
                f"{route.name}_{k.split('/')[1]}": v for k, v in means.route(index, route).items() if "tokens" not in k
            }
    return result
