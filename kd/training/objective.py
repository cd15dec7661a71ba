"""The routed objective: every row's teacher, each route's token losses, and how routes weigh in one optimizer step.

Shape legend: B rows, T positions, N response tokens, R routes, D and E widths of student and teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kd.cache.store import CachedTeacher
from kd.data.batches import (
    Batch,
    model_inputs,
    predicting_positions,
    response_token_counts,
    route_of_tokens,
    rows_of_routes,
)
from kd.losses.auxiliary import AuxiliaryLoss
from kd.losses.router import experts_per_token, load_balancing_loss, recorded_router_logits
from kd.losses.token_loss import LossSums, TokenLoss, token_loss_sums
from kd.models.forward import final_hidden_states, head_of, run_in_forward
from kd.models.head import Head
from kd.models.roles import Role, activate
from kd.models.sharding import is_sharded
from kd.models.teacher_logits import HiddenTeacher, TeacherLogits

Teacher = Role | CachedTeacher


@dataclass(frozen=True)
class Route:
    """A stream of rows with its one teacher (None: next-token prediction alone) and its factor in the loss."""

    name: str
    teacher: Teacher | None
    factor: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What is minimised: the token loss on every route, each against its own teacher, and auxiliary losses.

    pooled: False weighs routes by their factors (w_r = factor / N_r), True weighs tokens alike (w_r = 1).
    terms: auxiliary losses, only with a single route; each has its own weight, the token loss has `token_weight`.
    measures_kl: whether a training step runs the teachers even where the loss does not need them.
    router_aux_weight: of the routers' load balancing loss, where the student is a mixture of experts (router.py).
    """

    routes: tuple[Route, ...]
    token_loss: TokenLoss
    pooled: bool = False
    terms: tuple[AuxiliaryLoss, ...] = ()
    token_weight: float = 1.0
    router_aux_weight: float = 0.0
    measures_kl: bool = False

    def __post_init__(self) -> None:
        assert not self.terms or len(self.routes) == 1, "auxiliary losses do not know routes"

    @property
    def trains_with_teachers(self) -> bool:
        """Whether a training step runs the routes' teachers."""
        needed = self.token_loss.weight > 0 or bool(self.terms) or self.measures_kl
        return self.routes[0].teacher is not None and needed

    def weights(self, tokens_R: Tensor) -> Tensor:
        """[R] response tokens of the whole optimizer step -> [R] fp64 weights w_r / sum_r w_r N_r of the route sums."""
        present_R = tokens_R > 0
        if self.pooled:
            return present_R.double() / tokens_R.sum().clamp(min=1)
        factors_R = (
            torch.tensor([r.factor for r in self.routes], dtype=torch.float64, device=tokens_R.device) * present_R
        )
        return factors_R / (tokens_R.clamp(min=1) * factors_R.sum().clamp(min=torch.finfo(factors_R.dtype).tiny))


@dataclass(frozen=True)
class RouteSums:
    """Sums over the response tokens of a batch, per route: tensors [R]. Only `loss` carries a gradient.

    terms: the value of each auxiliary loss, without its weight; in `loss` it is with it.
    router_aux: a mean over the batch's tokens, not a sum, without its weight and not in `loss`; a scalar with gradient,
    or None where none is asked for or nothing has a gradient.
    """

    loss: Tensor
    kl: Tensor
    ntp: Tensor
    tokens: Tensor
    terms: tuple[Tensor, ...] = ()
    router_aux: Tensor | None = None

    def times(self, factor: float) -> RouteSums:
        """As if each row came `factor` times."""
        terms = tuple(factor * one for one in self.terms)
        loss, kl, ntp, tokens = (factor * one for one in (self.loss, self.kl, self.ntp, self.tokens))
        return replace(self, loss=loss, kl=kl, ntp=ntp, tokens=tokens, terms=terms)


def teacher_views(batch: Batch, objective: Objective) -> dict[int, TeacherLogits]:
    """Route index -> what its teacher says of its response tokens, in row order; for the routes with rows in the batch.

    Each row passes its own teacher, once and without gradient; routes that share a teacher go through it together. A
    cached teacher's output is read.

    A teacher whose weights are sharded over the ranks runs on every rank, in the order of the routes: its weights are
    gathered by all of them. A rank without rows for it gives it two tokens, and ignores the output.
    """
    views: dict[int, TeacherLogits] = {}
    groups: list[tuple[Role, list[int]]] = []
    present = set(torch.unique(batch["route_ids"]).tolist())
    for index, route in enumerate(objective.routes):
        teacher = route.teacher
        if isinstance(teacher, CachedTeacher):
            if index in present:
                views[index] = teacher.logits(rows_of_routes(batch, [index]))
            continue
        assert teacher is not None, "every route needs a teacher"
        members = next((members for known, members in groups if known.same_as(teacher)), None)
        if members is None:
            members = []
            groups.append((teacher, members))
        if index in present:
            members.append(index)
    for teacher, members in groups:
        if not members and not is_sharded(teacher.model):
            continue
        with activate(teacher) as model, torch.no_grad():
            if not members:
                final_hidden_states(model, {"input_ids": batch["input_ids"][:1, :2]})
                head_of(model)  # gathered by all ranks, too
                continue
            rows = rows_of_routes(batch, members)
            hidden_BTE = final_hidden_states(model, model_inputs(rows))[:, :-1]
            head = head_of(model)
        predicting, route_BT = predicting_positions(rows), route_of_tokens(rows)
        views |= {index: HiddenTeacher(hidden_BTE[predicting & (route_BT == index)], head) for index in members}
    return views


def route_sums(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    with_teachers: bool = True,
    views: Mapping[int, TeacherLogits] | None = None,
) -> RouteSums:
    """Run the teachers, then the student, and sum the token loss of every route.

    model: the (wrapped) student. with_teachers False leaves the teachers out, which needs a token loss of weight 0;
    `kl` is then NaN. views: what `teacher_views` gave for this batch, where that is known.

    A batch without response tokens gives zeros that are still connected to the graph.
    """
    tokens_R = response_token_counts(batch, len(objective.routes))
    loss_R, kl_R, ntp_R, *others = run_in_forward(
        model, lambda: _sums(model, batch, objective, with_teachers=with_teachers, views=views)
    )
    assert loss_R.dtype.itemsize >= 4, "a wrapper has rounded the losses"
    terms = tuple(others[: len(objective.terms)])
    return RouteSums(loss_R, kl_R, ntp_R, tokens_R, terms, *others[len(terms) :])


def _sums(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    with_teachers: bool,
    views: Mapping[int, TeacherLogits] | None,
) -> tuple[Tensor, ...]:
    """loss, kl, ntp, then the terms' values, each [R], and the router's loss where there is one."""
    device = batch["input_ids"].device.type
    with contextlib.ExitStack() as stack:
        term_sums = [stack.enter_context(term.recording(batch)) for term in objective.terms]
        with_router = objective.router_aux_weight > 0
        router_logits = stack.enter_context(recorded_router_logits(model)) if with_router else []
        if views is None:
            with torch.autocast(device, enabled=False):
                views = teacher_views(batch, objective) if with_teachers else {}
        hidden_BTD = final_hidden_states(model, model_inputs(batch))[:, :-1]
    with torch.autocast(device, enabled=False):  # inside of a wrapped model's forward pass it is on
        return _losses(hidden_BTD, model, batch, objective, views, term_sums, router_logits)


def _losses(
    hidden_BTD: Tensor,
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    views: Mapping[int, TeacherLogits],
    term_sums: Sequence[Callable[[Tensor, Head], Tensor]],
    router_logits: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    head = head_of(model)
    labels_BT = batch["input_ids"][:, 1:]
    predicting, route_BT = predicting_positions(batch), route_of_tokens(batch)
    present = set(torch.unique(batch["route_ids"]).tolist())
    # An empty selection: an absent route costs nothing and is 0, also in the graph.
    nothing = hidden_BTD[predicting & (route_BT < 0)].sum().to(torch.float32)
    sums: list[LossSums] = []
    for index in range(len(objective.routes)):
        if index not in present:
            sums.append(LossSums(nothing, nothing.detach(), nothing.detach()))
            continue
        here, teacher = predicting & (route_BT == index), views.get(index)
        sums.append(token_loss_sums(hidden_BTD[here], head, labels_BT[here], objective.token_loss, teacher))
    loss_R = torch.stack([s.loss for s in sums])
    if objective.token_weight != 1.0:
        loss_R = objective.token_weight * loss_R
    terms = [term_sum(hidden_BTD, head).reshape(1) for term_sum in term_sums]
    for term, value_R in zip(objective.terms, terms, strict=True):
        loss_R = loss_R + term.weight * value_R
    router_aux = []
    if router_logits:
        router_aux = [load_balancing_loss(router_logits, experts_per_token(model), batch.get("attention_mask"))]
    kl_R, ntp_R = torch.stack([s.kl for s in sums]), torch.stack([s.ntp for s in sums])
    return loss_R, kl_R, ntp_R, *(value_R.detach() for value_R in terms), *router_aux
