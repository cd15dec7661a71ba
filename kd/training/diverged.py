"""What is said of a step that must not be taken: which rows, which teacher, which checkpoint, which learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from kd.data.mixing import Row, StepBatchSampler
from kd.errors import MachineError, UserError
from kd.models.sharding import is_engine, own_part
from kd.runs.run_folder import RunFolder
from kd.training.loss_watch import Fault, LossWatch
from kd.training.objective import Objective, route_sums
from kd.training.settings import default_rate

SHOWN_ROWS = 5
LOWER = 3.0  # the rate to try is that much below the highest so far,
ABOVE_DEFAULT = 10.0  # and no more than that much above the toolkit's default

Locate = Callable[[Iterable[Row]], Mapping[Row, str]]


class Trains(Protocol):
    """What is asked of kd.training.trainer.RoutedTrainer, which imports this module."""

    args: Any
    state: Any
    accelerator: Any
    model_wrapped: Any
    train_dataset: Any
    batch_sampler: StepBatchSampler
    collate: Callable[[list[Any]], dict[str, Tensor]]
    objective: Objective
    run_folder: RunFolder
    locate: Locate

    @property
    def watch(self) -> LossWatch: ...

    def compute_loss_context_manager(self) -> Any: ...


@dataclass(frozen=True)
class RowValues:
    """One row by itself: nats per token, of all processes; the gradient: whether its norm is finite.

    kl, ntp: NaN where they are not measured.
    """

    row: Row
    route: int
    loss: float
    kl: float
    ntp: float
    finite_gradient: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and self.finite_gradient

    @property
    def words(self) -> str:
        return f"loss {self.loss:.4g}" + ("" if self.finite_gradient else ", gradient not finite")


def values_of_rows(trainer: Trains, rows: Sequence[Row]) -> list[RowValues]:
    """Each row through a training step of its own, without the optimizer; most suspicious first.

    Every rank takes all rows, in the same order: sharded weights are gathered by all ranks.
    """
    values, routes = [], []
    for row in rows:
        item = trainer.train_dataset[row]
        batch = {key: value.to(trainer.args.device) for key, value in trainer.collate([item]).items()}
        values.append(values_of_batch(trainer, batch))
        routes.append(int(item["route_id"]))
    means = trainer.accelerator.reduce(torch.stack(values), "mean").tolist()
    found = [
        RowValues(row, route, loss, kl, ntp, not_finite == 0)
        for row, route, (loss, kl, ntp, not_finite) in zip(rows, routes, means, strict=True)
    ]
    return sorted(found, key=lambda one: (math.isfinite(one.loss), one.finite_gradient, -one.loss))


def values_of_batch(trainer: Trains, batch: Mapping[str, Tensor]) -> Tensor:
    """[4] loss, KL, next-token loss per token, and whether the gradient's norm is not finite, on this rank.

    DeepSpeed's engine keeps the gradients for its own step, so that of a row is not looked at there.
    """
    model, objective = trainer.model_wrapped, trainer.objective
    has_gradients = not is_engine(model)
    model.zero_grad()
    with trainer.compute_loss_context_manager(), torch.set_grad_enabled(has_gradients):
        sums = route_sums(model, batch, objective, with_teachers=objective.trains_with_teachers)
        loss = weighted(objective, sums.loss, sums.tokens)
        total = loss if sums.router_aux is None else loss + objective.router_aux_weight * sums.router_aux
    if has_gradients:
        total.backward()
    kl, ntp = (weighted(objective, one, sums.tokens) for one in (sums.kl, sums.ntp))
    not_finite = (~torch.isfinite(gradient_norm(model))).to(loss) if has_gradients else torch.zeros_like(loss)
    return torch.stack([total.detach().double(), kl, ntp, not_finite.double()])


def weighted(objective: Objective, sums_R: Tensor, tokens_R: Tensor) -> Tensor:
    """The mean per token over the routes that have tokens; an absent route's sum does not count, whatever it is."""
    return torch.where(tokens_R > 0, objective.weights(tokens_R) * sums_R, 0.0).sum()


def gradient_norm(model: nn.Module) -> Tensor:
    norms = [own_part(p.grad).float().norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).norm()


def diverged(trainer: Trains, fault: Fault) -> str:
    """The message of a run that stops before a step."""
    step = trainer.state.global_step  # those taken
    values = values_of_rows(trainer, trainer.batch_sampler.mixture.rows_of_step(step))
    suspects = [one for one in values if not one.is_finite] or values
    routes = [route.name for route in trainer.objective.routes]
    shown = shown_rows(trainer, {one.row: f" ({routes[one.route]}: {one.words})" for one in suspects})
    finite = "" if fault.exploded or not suspects[0].is_finite else " (each is finite by itself)"
    key, remedy = advice(trainer, suspects)
    return (
        f"{key}: stopped before step {step + 1}: {fault.words}. {kept(trainer, fault)}. {remedy}. "
        f"Rows of this step, most suspicious first{finite}:{shown}"
    )


def shown_rows(trainer: Trains, words: Mapping[Row, str]) -> str:
    """The first rows, each on a line of its own with its words."""
    first = list(words)[:SHOWN_ROWS]
    places = located(trainer, first)
    shown = "".join(f"\n  {places[row]}{words[row]}" for row in first)
    return shown if len(words) <= SHOWN_ROWS else f"{shown}\n  and {len(words) - SHOWN_ROWS} more"


def located(trainer: Trains, rows: Sequence[Row]) -> dict[Row, str]:
    """Where rows lie. A source that can no longer be read, or has changed, is no reason to say nothing of the step."""
    try:
        found = trainer.locate(rows)
    except (UserError, MachineError):
        found = {}
    return {row: found.get(row, f"row {row[1]} of source {row[0]}, whose file has changed since") for row in rows}


def harmed_by_engine(trainer: Trains, norm: float) -> str:
    """The message where the gradient was not finite, and DeepSpeed's engine has taken the step already."""
    step = trainer.state.global_step
    rows = dict.fromkeys(trainer.batch_sampler.mixture.rows_of_step(step), "")
    return (
        f"train.learning_rate: {trainer.args.learning_rate:g}: the gradient norm of step {step + 1} is {norm:g}, not "
        f"finite. DeepSpeed has taken the step, and nothing is written of these weights. {kept(trainer)}. If these "
        f"rows are right, {lower_rate(trainer)}. Rows of this step:{shown_rows(trainer, rows)}"
    )


def advice(trainer: Trains, suspects: Sequence[RowValues]) -> tuple[str, str]:
    """The key that a message begins with, and the remedy.

    The next-token loss is the student's alone: where it is finite and KL is not, the teacher's output is not.
    """
    worst = suspects[0]
    route = trainer.objective.routes[worst.route]
    asked = route.teacher is not None and trainer.objective.trains_with_teachers
    if asked and math.isfinite(worst.ntp) and not math.isfinite(worst.kl):
        remedy = "Save its checkpoint again, use dtype=float32, or remove these rows"
        assert route.teacher is not None
        return f"route {route.name}: {route.teacher.name}", f"The teacher's output is not finite. {remedy}"
    if trainer.state.global_step == 0:
        remedy = "No weight has changed yet, so no learning rate helps: look at these rows, or use dtype=float32"
        return f"route {route.name}", remedy
    return f"train.learning_rate: {trainer.args.learning_rate:g}", f"If these rows are right, {lower_rate(trainer)}"


def lower_rate(trainer: Trains) -> str:
    """The learning rate to try, by the highest so far: in a warm-up that is below the recipe's."""
    highest = trainer.watch.highest_rate
    lora = isinstance(trainer.accelerator.unwrap_model(trainer.model_wrapped), PeftModel)
    rate = min(highest / LOWER, ABOVE_DEFAULT * default_rate(lora=lora))
    return f"try train.learning_rate={rate:.1g} with another output (the highest so far was {highest:.2g})"


def kept(trainer: Trains, fault: Fault | None = None) -> str:
    """Which checkpoint is the last good one: an exploded loss is that of the weights that the last step left."""
    taken = trainer.state.global_step
    last = trainer.run_folder.checkpoints.latest(taken if fault is not None and fault.exploded else None)
    return "No checkpoint was written before" if last is None else f"The last good checkpoint is kept: {last}"


def refuse_harmed_weights(trainer: Trains) -> None:
    """Raise UserError, on every rank, where the steps so far have left weights that are not finite."""
    trained = [own_part(weight) for weight in trainer.model_wrapped.parameters() if weight.requires_grad]
    harmed = torch.stack([~torch.isfinite(weight).all() for weight in trained]).any()
    if not trainer.accelerator.reduce(harmed.double(), "sum").item():
        return
    raise UserError(
        f"train.learning_rate: {trainer.args.learning_rate:g}: weights are not finite after step "
        f"{trainer.state.global_step}, and nothing is written of them. {kept(trainer)}. "
        f"To go on, {lower_rate(trainer)}"
    )
