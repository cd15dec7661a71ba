"""The hidden-state loss against its definition, on single tensors and inside of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation import as_batch, assert_same, gradients, make_rows
from pico import FAMILIES, make_model
from torch import Tensor, nn

from kd.data.batches import model_inputs, predicting_positions
from kd.errors import UserError
from kd.losses.hidden_states import Distance, decoder_layers, distance_sum, hidden_state_loss
from kd.losses.token_loss import TokenLoss
from kd.models.roles import Role
from kd.training.objective import Objective, Route, route_sums

N, D, E = 5, 4, 6
DISTANCES: tuple[Distance, ...] = ("cosine", "mse")


def defined_distance(ours: Tensor, theirs: Tensor, distance: str) -> Tensor:
    """Of one token, entry by entry."""
    if distance == "mse":
        return sum(((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)), torch.zeros(())) / len(ours)
    product = sum((a * b for a, b in zip(ours, theirs, strict=True)), torch.zeros(()))
    return 1 - product / (sum(a * a for a in ours) ** 0.5 * sum(b * b for b in theirs) ** 0.5)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("projected", [True, False])
def test_value_and_gradients_equal_the_definition(distance: Distance, projected: bool) -> None:
    torch.manual_seed(1)
    theirs = torch.randn(N, E if projected else D, dtype=torch.float64)
    projection = nn.Linear(D, E, bias=False).double() if projected else None
    weights = [projection.weight] if projection is not None else []
    ours = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        taken = ours[n] if projection is None else torch.einsum("d,ed->e", ours[n], projection.weight)
        expected = expected + defined_distance(taken, theirs[n], distance)
    got = distance_sum(ours, theirs, distance, projection)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, [ours, *weights]), torch.autograd.grad(expected, [ours, *weights]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_tokens_give_a_zero_that_is_connected(distance: Distance) -> None:
    hidden, projection = torch.randn(0, D, requires_grad=True), nn.Linear(D, E, bias=False)
    total = distance_sum(hidden, torch.randn(0, E), distance, projection)
    total.backward()
    assert total == 0 and projection.weight.grad is not None and not projection.weight.grad.any()


def test_half_precision_is_compared_in_fp32() -> None:
    hidden = torch.full((1, 2000), 3.0, dtype=torch.bfloat16)
    assert distance_sum(hidden, hidden + 1, "mse").item() == 1.0
    assert distance_sum(hidden, hidden, "cosine").dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_states_are_those_that_models_give_as_hidden_states(family: str, distance: Distance) -> None:
    """Layer l's output is entry l + 1 of `hidden_states` (the last one comes after the final norm)."""
    student = make_model(family, dtype=torch.float64).train()
    more: dict[str, Any] = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    teacher = make_model(family, seed=3, dtype=torch.float64, **more).requires_grad_(False)
    roles = (Role("student", student, None), Role("teacher", teacher, None))
    pairs = ((0, 1), (0, 2))
    objective = objective_of(roles, distance, pairs)
    batch = as_batch(make_rows())
    sums = route_sums(student, batch, objective)
    ours, theirs = (m(**model_inputs(batch), output_hidden_states=True).hidden_states for m in (student, teacher))
    expected = torch.zeros((), dtype=torch.float64)
    for a, b in pairs:
        for row, t in predicting_positions(batch).nonzero().tolist():
            distances = defined_distance(ours[a + 1][row, t], theirs[b + 1][row, t], distance)
            expected = expected + distances / len(pairs)
    expected.backward()
    wanted = gradients(student)
    torch.testing.assert_close(sums.terms[0][0], expected.detach(), rtol=1e-9, atol=1e-9)
    sums.loss.sum().backward()
    found = gradients(student)
    assert_same({name: found[name] for name in wanted}, wanted)


def objective_of(roles: tuple[Role, Role], distance: Distance, pairs: Any, token_weight: float = 0.0) -> Objective:
    term = hidden_state_loss(1.0, distance, *roles, pairs)
    if term.projections is not None:
        roles[0].model.add_module("training_only", term.projections.double())
    return Objective((Route("train", roles[1]),), TokenLoss(), terms=(term,), token_weight=token_weight)


def pair_of_widths() -> tuple[Role, Role]:
    student = make_model(dtype=torch.float64).train()
    teacher = make_model(seed=3, dtype=torch.float64, hidden_size=24, num_hidden_layers=3).requires_grad_(False)
    return Role("student", student, None), Role("teacher", teacher, None)


def test_packing_checkpointing_and_row_order_do_not_matter() -> None:
    roles, rows = pair_of_widths(), make_rows()
    student: Any = roles[0].model
    objective = objective_of(roles, "mse", ((0, 1), (1, 2)), token_weight=1.0)
    route_sums(student, as_batch(rows), objective).loss.sum().backward()
    wanted = gradients(student)
    assert wanted["training_only.0.weight"].any() and wanted["training_only.1.weight"].any()
    for batch in (as_batch(rows, packing=True), as_batch(rows[::-1])):
        route_sums(student, batch, objective).loss.sum().backward()
        assert_same(gradients(student), wanted)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    route_sums(student, as_batch(rows), objective).loss.sum().backward()
    assert_same(gradients(student), wanted, 0.0)


def test_projections_are_made_only_where_widths_differ_and_start_alike() -> None:
    student, teacher = pair_of_widths()
    made = []
    for _ in range(2):
        torch.manual_seed(4)
        made.append(hidden_state_loss(1.0, "cosine", student, teacher, ((0, 0), (1, 2))).projections)
    first, second = made
    assert first is not None and second is not None and len(first) == 2
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.T @ a, torch.eye(16))  # 24 x 16: the student's angles are kept
    assert hidden_state_loss(1.0, "cosine", student, student, ((0, 0),)).projections is None


def test_hooks_are_gone_afterwards() -> None:
    roles = pair_of_widths()
    objective = objective_of(roles, "mse", ((0, 1),))
    route_sums(roles[0].model, as_batch(make_rows()), objective)
    with pytest.raises(RuntimeError), objective.terms[0].recording(as_batch(make_rows())):
        raise RuntimeError
    assert not any(layer._forward_hooks for role in roles for layer in decoder_layers(role))


def test_an_architecture_without_a_list_of_layers_is_refused_by_name() -> None:
    student, _ = pair_of_widths()
    student.model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="role student: the layers of LlamaForCausalLM are unknown"):
        decoder_layers(student)
