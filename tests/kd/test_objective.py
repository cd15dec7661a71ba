"""The routed objective against its definition, and what must not matter to it. Everything in float64 on pico models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import FAMILIES, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd.data.batches import predicting_positions, response_token_counts
from kd.data.mixing import collate
from kd.losses import chunked
from kd.losses.token_loss import TokenLoss
from kd.models.forward import head_of
from kd.models.roles import STUDENT_ADAPTER, Role, activate
from kd.training.objective import Objective, Route, route_sums

Row = dict[str, Any]
PLAIN = TokenLoss()


def make_rows(seed: int = 0, routes: Sequence[int] = (0, 1, 0, 1, 1, 0)) -> list[Row]:
    """Rows of different lengths; each ends in some response tokens, some have a second response turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for route in routes:
        length = int(torch.randint(4, 14, (), generator=generator))
        ids = torch.randint(3, 280, (length,), generator=generator).tolist()
        mask = [False] * length
        mask[length - 2] = mask[length - 1] = True
        if length > 8:
            mask[2] = mask[3] = True
        rows.append({"input_ids": ids, "response_mask": mask, "route_id": route})
    return rows


def as_batch(rows: list[Row], packing: bool = False) -> dict[str, Tensor]:
    arrays = [
        {**row, "input_ids": np.array(row["input_ids"], np.int32), "response_mask": np.array(row["response_mask"])}
        for row in rows
    ]
    return collate(arrays, pad_token_id=0, packing=packing)  # type: ignore[arg-type]


def add_adapter(model: nn.Module, name: str, seed: int, size: float) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, name, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name and "lora_B" in parameter_name:
                parameter.normal_(0.0, size)
    return model.double()


class World:
    """A student with an expert on route 1 and a reference on route 0, sharing the backbone or not."""

    def __init__(self, family: str = "llama", *, lora: bool = True, shared: bool = True) -> None:
        base = make_model(family, dtype=torch.float64)
        frozen = add_adapter(copy.deepcopy(base), "expert", 2, 0.2)
        frozen.requires_grad_(False)
        if lora:
            student: nn.Module = add_adapter(base, STUDENT_ADAPTER, 1, 0.1)
            if shared:
                student = add_adapter(student, "expert", 2, 0.2)
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(f".{STUDENT_ADAPTER}." in name)
        else:
            student = copy.deepcopy(base).requires_grad_(True)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(0.01)
        home = student if lora and shared else frozen.eval()
        self.student = student.train()
        self.reference, self.expert = Role("reference", home, None), Role("expert", home, "expert")

    def objective(self, token_loss: TokenLoss = PLAIN, **settings: Any) -> Objective:
        return Objective((Route("general", self.reference), Route("ecom", self.expert)), token_loss, **settings)

    def gradients(self) -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}
        self.student.zero_grad()
        return found


def defined_loss(world: World, rows: list[Row], token_loss: TokenLoss, weights: str | Sequence[float]) -> Tensor:
    """The design's formula, row by row and position by position, from whole models' full logits."""
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(2)], [0, 0]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with activate(world.expert if row["route_id"] == 1 else world.reference) as model, torch.no_grad():
            q = model(input_ids=ids).logits[0].softmax(-1)
        log_p = world.student(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(ids.shape[1] - 1):
            if row["response_mask"][t + 1]:
                kl = (q[t] * (q[t].log() - log_p[t])).sum()
                ntp = -log_p[t, row["input_ids"][t + 1]]
                sums[row["route_id"]] = sums[row["route_id"]] + token_loss.weight * kl + (1 - token_loss.weight) * ntp
                counts[row["route_id"]] += 1
    if weights == "tokens":
        return (sums[0] + sums[1]) / (counts[0] + counts[1])
    factors = (1.0, 1.0) if weights == "routes" else weights
    present = [r for r in range(2) if counts[r]]
    total = sum((float(factors[r]) * sums[r] / counts[r] for r in present), torch.zeros((), dtype=torch.float64))
    return total / sum(float(factors[r]) for r in present)


def our_loss(world: World, batches: list[dict[str, Tensor]], objective: Objective) -> Tensor:
    """What the trainer does with the micro-batches of one optimizer step."""
    tokens_R = sum((response_token_counts(b, 2) for b in batches), torch.zeros(2, dtype=torch.long))
    weights_R = objective.weights(tokens_R)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = (weights_R * route_sums(world.student, batch, objective).loss).sum()
        loss.backward()
        total += loss.detach()
    return total


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """No entry differs by more than this part of the largest."""
    assert a.keys() == b.keys() and a
    largest = max(float(g.abs().max()) for g in b.values())
    assert largest > 1e-3
    for name, gradient in a.items():
        assert float((gradient - b[name]).abs().max()) <= tolerance * largest, name


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lora", "shared"), [(True, True), (True, False), (False, False)], ids=["lora", "lora-apart", "full"]
)
def test_loss_and_gradient_equal_the_definition(family: str, lora: bool, shared: bool) -> None:
    world, rows, token_loss = World(family, lora=lora, shared=shared), make_rows(), TokenLoss(weight=0.7)
    expected = defined_loss(world, rows, token_loss, "routes")
    expected.backward()
    wanted = world.gradients()
    ours = our_loss(world, [as_batch(rows)], world.objective(token_loss))
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=1e-12)
    assert_same(world.gradients(), wanted)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("weights", ["routes", "tokens", (2.0, 0.5)])
def test_weights_mean_what_the_design_says(weights: Any) -> None:
    world, rows = World(), make_rows()
    expected = defined_loss(world, rows, TokenLoss(), weights)
    objective = world.objective()
    if weights == "tokens":
        objective = world.objective(pooled=True)
    elif weights != "routes":
        routes = tuple(Route(r.name, r.teacher, f) for r, f in zip(objective.routes, weights, strict=True))
        objective = Objective(routes, TokenLoss())
    torch.testing.assert_close(our_loss(world, [as_batch(rows)], objective), expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("pooled", [False, True])
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(pooled: bool) -> None:
    world, rows = World(), make_rows(routes=(0, 1, 0, 0, 1, 0, 0, 0))
    objective = world.objective(pooled=pooled)
    results = []
    for size in (8, 4, 1):
        batches = [as_batch(rows[i : i + size]) for i in range(0, 8, size)]
        loss = our_loss(world, batches, objective)
        results.append((loss, world.gradients()))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=1e-12)
        assert_same(gradients, results[0][1])


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_does_not_matter(family: str) -> None:
    world, rows = World(family), make_rows()
    padded = our_loss(world, [as_batch(rows)], world.objective())
    wanted = world.gradients()
    packed = our_loss(world, [as_batch(rows, packing=True)], world.objective())
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    assert_same(world.gradients(), wanted)


@pytest.mark.usefixtures("in_double")
def test_padding_and_row_order_do_not_matter() -> None:
    world, rows = World(), make_rows()
    plain = our_loss(world, [as_batch(rows)], world.objective())
    wanted = world.gradients()
    batch = as_batch(rows[::-1])
    wider = {k: v if k == "route_ids" else nn.functional.pad(v, (0, 9)) for k, v in batch.items()}
    loss = our_loss(world, [wider], world.objective())
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    assert_same(world.gradients(), wanted)


def test_micro_batches_without_response_tokens_contribute_nothing() -> None:
    world, rows = World(), make_rows()
    silent = [{**row, "response_mask": [False] * len(row["input_ids"])} for row in make_rows(5)]
    alone = our_loss(world, [as_batch(rows)], world.objective())
    wanted = world.gradients()
    with_silent = our_loss(world, [as_batch(silent), as_batch(rows)], world.objective())
    assert with_silent == alone
    assert_same(world.gradients(), wanted, 0.0)
    nothing = our_loss(world, [as_batch(silent)], world.objective())
    assert nothing == 0
    assert all(not gradient.any() for gradient in world.gradients().values())


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("route", [0, 1])
def test_a_step_of_one_route_only(route: int) -> None:
    world, rows = World(), make_rows(routes=(route,) * 3)
    expected = defined_loss(world, rows, TokenLoss(), "routes")
    expected.backward()
    wanted = world.gradients()
    ours = our_loss(world, [as_batch(rows)], world.objective())
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=1e-12)
    assert_same(world.gradients(), wanted)


def test_each_row_passes_only_its_own_teacher_and_once() -> None:
    world, rows = World(shared=False), make_rows()
    home = world.expert.model
    seen: list[tuple[str, int]] = []

    def note(_module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        layer = next(m for m in home.modules() if hasattr(m, "_disable_adapters"))
        seen.append(("reference" if layer._disable_adapters else "expert", len(inputs["input_ids"])))

    home.register_forward_pre_hook(note, with_kwargs=True)
    route_sums(world.student, as_batch(rows), world.objective())
    assert sorted(seen) == [("expert", 3), ("reference", 3)]


class LogitsSeen(TorchDispatchMode):
    """Elements of the largest tensor over the vocabulary that any operation makes, but for views of the head itself."""

    def __init__(self, head_VD: Tensor) -> None:
        super().__init__()
        self.head_VD, self.largest = head_VD, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if not isinstance(tensor, Tensor) or tensor.shape[-1:] != self.head_VD.shape[:1]:
                continue
            if tensor.untyped_storage().data_ptr() != self.head_VD.untyped_storage().data_ptr():
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("token_loss", [PLAIN, TokenLoss(0.5, 2.0, "jsd")], ids=["forward_kl", "jsd"])
def test_no_tensor_is_larger_than_both_sides_of_a_chunk(token_loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    world, batch = World(), as_batch(make_rows())
    head_VD = head_of(world.student).weight_VD
    vocabulary = len(head_VD)
    monkeypatch.setattr(chunked, "CPU_LOGITS_ELEMENTS", 2 * vocabulary)
    monkeypatch.setattr(chunked, "FEWEST_CHUNK_TOKENS", 1)
    with LogitsSeen(head_VD) as seen:
        our_loss(world, [batch], world.objective(token_loss))
    assert int(predicting_positions(batch).sum()) > 6
    assert seen.largest == 2 * 2 * vocabulary


def test_response_at_3_to_6_puts_gradient_on_2_to_5() -> None:
    world = World()
    mask = [False, False, False, True, True, True, True, False]
    batch = as_batch([{"input_ids": list(range(10, 18)), "response_mask": mask, "route_id": 1}])
    assert predicting_positions(batch)[0].nonzero().flatten().tolist() == [2, 3, 4, 5]
    caught: list[Tensor] = []
    decoder = world.student.get_base_model().get_decoder()  # type: ignore[union-attr, operator]
    decoder.register_forward_hook(lambda _m, _a, out: caught.append(out.last_hidden_state))
    loss = route_sums(world.student, batch, world.objective()).loss.sum()
    (gradient,) = torch.autograd.grad(loss, caught[-1])
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    world, rows = World(), make_rows()
    our_loss(world, [as_batch(rows)], world.objective())
    wanted = world.gradients()
    model: Any = world.student
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    our_loss(world, [as_batch(rows)], world.objective())
    assert_same(world.gradients(), wanted, 0.0)


def test_teacher_equal_to_student_has_gradient_of_exactly_zero() -> None:
    model = make_model(dtype=torch.float32)
    student = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    reference = Role("reference", student, None)
    objective = Objective((Route("general", reference), Route("ecom", reference)), TokenLoss())
    student.train()
    sums = route_sums(student, as_batch(make_rows()), objective)
    sums.loss.sum().backward()
    assert sums.loss.tolist() == [0.0, 0.0] and sums.tokens.min() > 0
    gradients = [p.grad for p in student.parameters() if p.requires_grad]
    assert gradients and all(g is not None and not g.any() for g in gradients)
