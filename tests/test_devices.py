"""What is computed on an accelerator is made there: nothing of the CPU meets it, and the values are the same.

There is no accelerator here; tests/elsewhere.py stands in for one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dae_eval.drift import HeldOutRows, KeptRoute, measure_held_out
from distillation import as_batch, make_rows
from elsewhere import DEVICE, Elsewhere
from peft import LoraConfig, get_peft_model
from pico import make_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from dae.rank_teachers.rewards import rewards_of
from dae.rank_teachers.student_losses import losses_of
from kd.data.mixing import collate
from kd.data.token_rows import TokenRow, TokenRows
from kd.losses.attention import attention_loss
from kd.losses.auxiliary import AuxiliaryLoss
from kd.losses.cross_tokenizer import CrossTokenizerLoss
from kd.losses.hidden_states import hidden_state_loss
from kd.losses.token_loss import TokenLoss
from kd.models.roles import STUDENT_ADAPTER, Role, check_head, check_packing
from kd.training.evaluating import evaluate_routes
from kd.training.loss_watch import LossWatch
from kd.training.metrics import MetricsWindow
from kd.training.objective import Objective, Route
from kd.training.trainer import RoutedTrainer

CPU = torch.device("cpu")
WIDE = {"hidden_size": 24, "num_hidden_layers": 3}
Values = list[float]


def lora_student(family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(1)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(make_model(family, **config), settings, STUDENT_ADAPTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model.train()


def teacher_of(family: str, **config: Any) -> Any:
    return make_model(family, seed=7, **config).requires_grad_(False)


def trained(student: Any, batches: list[Any], objective: Objective, device: torch.device) -> Values:
    """What the trainer does with one optimizer step: what it counts, loss, what it logs, gradients; and an evaluation.

    Batches come to the trainer placed.
    """
    placed = [{name: values.to(device) for name, values in batch.items()} for batch in batches]
    trainer: Any = SimpleNamespace(
        objective=objective,
        args=SimpleNamespace(world_size=1),
        budget=None,
        accelerator=SimpleNamespace(num_processes=1),
        current_gradient_accumulation_steps=len(batches),
        _window=MetricsWindow(objective),
        watch=LossWatch(),
        _has_engine=False,
    )
    tokens_R = RoutedTrainer._get_num_items_in_batch(trainer, placed, device)
    assert tokens_R.device == device
    values = [float(token) for token in tokens_R.tolist()]
    for batch in placed:
        loss = RoutedTrainer.compute_loss(trainer, student, batch, num_items_in_batch=tokens_R)
        assert loss.device == device
        loss.backward()
        values.append(loss.item())
    means = trainer._window.drain(lambda tensor, _how: tensor)
    values += [value for name, value in means.flat(objective.routes).items() if "per_second" not in name]
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    values += [float(gradients[name].norm()) for name in sorted(gradients)]
    return values + list(evaluate_routes(student, {"all": batches}, objective, device).values())


def with_term(make: Callable[[Role, Role], AuxiliaryLoss], student: Any, teacher: Any, device: torch.device) -> Values:
    roles = Role("student", student, STUDENT_ADAPTER), Role("teacher", teacher, None)
    objective = Objective((Route("train", roles[1]),), TokenLoss(0.5, 2.0, "jsd"), pooled=True, terms=(make(*roles),))
    batches = [as_batch(make_rows(3, shortest=9)), as_batch(make_rows(3, seed=2))]
    return trained(student, batches, objective, device)


def attention_maps(device: torch.device, **teacher_config: Any) -> Values:
    student, teacher = lora_student("mistral", sliding_window=6).to(device), teacher_of("mistral", **teacher_config)
    pairs = ((0, 0), (1, 1))
    return with_term(lambda *roles: attention_loss(0.5, *roles, pairs), student, teacher.to(device), device)


def more_heads(device: torch.device) -> Values:
    return attention_maps(device, num_attention_heads=8, head_dim=4)


def hidden_states(device: torch.device) -> Values:
    def make(student: Role, teacher: Role) -> AuxiliaryLoss:
        torch.manual_seed(0)
        term = hidden_state_loss(0.5, "mse", student, teacher, ((0, 1), (1, 2)))
        assert term.projections is not None
        student.model.add_module("training_only", term.projections.to(student.model.device))
        return term

    return with_term(make, lora_student().to(device), teacher_of("llama", **WIDE).to(device), device)


def other_tokens(device: torch.device) -> Values:
    student, teacher = lora_student().to(device), Role("teacher", teacher_of("qwen3", vocab_size=300).to(device), None)
    rows = [
        {**row, "teacher_input_ids": other["input_ids"], "teacher_response_mask": other["response_mask"]}
        for row, other in zip(make_rows(4), make_rows(4, seed=3), strict=True)
    ]
    terms = (CrossTokenizerLoss(0.5, teacher),)
    objective = Objective((Route("train", None),), TokenLoss(0.0), pooled=True, terms=terms, token_weight=0.5)
    batches = [collate(rows, pad_token_id=0, packing=False)]  # type: ignore[arg-type]
    return trained(student, batches, objective, device)


def routes_of_a_mixture(device: torch.device, packing: bool = False) -> Values:
    """Two routes with a router loss, the reference on the student's own weights."""
    config = {"num_experts_per_tok": 1, "experts_implementation": "eager"}
    student, expert = lora_student("mixtral", **config).to(device), teacher_of("mixtral", **config).to(device)
    routes = (Route("general", Role("reference", student, None)), Route("shop", Role("expert", expert, None), 2.0))
    objective = Objective(routes, TokenLoss(0.7), router_aux_weight=0.1)
    rows = [{**row, "route_id": place % 2} for place, row in enumerate(make_rows(6))]
    return trained(student, [as_batch(rows[:3], packing), as_batch(rows[3:], packing)], objective, device)


def packed_routes(device: torch.device) -> Values:
    return routes_of_a_mixture(device, packing=True)


def checks(device: torch.device) -> Values:
    role = Role("student", lora_student("gemma2").to(device), STUDENT_ADAPTER)
    check_head(role, 288)
    check_packing(role, 288)
    return []


def drift(device: torch.device) -> Values:
    student = Role("student", lora_student().to(device), STUDENT_ADAPTER)
    teachers = {"reference": Role("reference", teacher_of("llama").to(device), None)}
    rows = TokenRows.from_rows((row["input_ids"].tolist(), row["response_mask"]) for row in make_rows())
    (measured,) = measure_held_out(student, [HeldOutRows("general", rows, "rows.jsonl", "0" * 64)], teachers)
    kept = KeptRoute.ask(rows, teachers, 4).measure(student)
    return [measured.loss, *measured.kl.values(), kept.loss, *kept.kl.values()]


def choosing(device: torch.device) -> Values:
    rows = [TokenRow(row["input_ids"].tolist(), row["response_mask"].tolist()) for row in make_rows()]
    torch.manual_seed(0)
    config = make_model().config
    config.num_labels = 1
    judge: nn.Module = AutoModelForSequenceClassification.from_config(config)
    rewards = rewards_of(judge.eval().to(device), [row.input_ids for row in rows], 4)
    return losses_of(Role("student", lora_student().to(device), STUDENT_ADAPTER), rows, 4) + rewards


TRAINED = (attention_maps, more_heads, hidden_states, other_tokens, routes_of_a_mixture, packed_routes)


@pytest.mark.parametrize("scene", [*TRAINED, checks, drift, choosing])
def test_nothing_of_the_cpu_meets_the_accelerator(scene: Callable[[torch.device], Values]) -> None:
    expected = scene(CPU)
    with Elsewhere():
        found = scene(DEVICE)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    """Else the test above could not fail."""
    with Elsewhere():
        there, here = torch.ones(3, 2).to(DEVICE), torch.ones(3, 2)
        assert float((there * here.sum())[torch.tensor([0, 2])].sum()) == 24.0  # a number, and indices
        with pytest.raises(RuntimeError, match="on the CPU meets tensors on mps:0"):
            there + here
