"""Ways to take the same optimizer step: what benchmarks/step_cost.py measures.

Shape legend: B rows, T positions, N response tokens, V vocabulary, R routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kd.config.stage_recipe import LoraRecipe
from kd.data.batches import model_inputs, response_token_counts
from kd.losses.token_loss import TokenLoss, token_loss_sums
from kd.models.checkpoint import checkpoint
from kd.models.forward import final_hidden_states, head_of
from kd.models.roles import Backbone, LoadSettings, Role, add_frozen_adapter, add_student_adapter, load_model
from kd.models.teacher_logits import HiddenTeacher
from kd.training.objective import Objective, Route, route_sums, teacher_views

GENERAL, DOMAIN = 0, 1
LEARNING_RATE = 1e-3

LossOfStep = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights and one micro-batch: `rows` full rows, the first `prompt` tokens of each are prompt."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    rows: int = 8
    domain_rows: int = 1  # about a tenth of the rows, as in the paper
    tokens: int = 256
    prompt: int = 128
    lora_rank: int = 16


SHAPES = {
    "head": Shape("head", layers=6, width=288, mlp=768, heads=6, vocabulary=32000),
    "backbone": Shape("backbone", layers=12, width=512, mlp=1376, heads=8, vocabulary=4096),
    "tiny": Shape("tiny", layers=2, width=16, mlp=32, heads=2, vocabulary=96, rows=4, tokens=12, prompt=5, lora_rank=4),
}


def make_batch(shape: Shape) -> dict[str, Tensor]:
    """What kd.data.mixing.collate makes of rows of equal length: the first rows are domain rows, the others general."""
    generator = torch.Generator().manual_seed(1)
    size = (shape.rows, shape.tokens)
    response_mask_BT = torch.zeros(size, dtype=torch.bool)
    response_mask_BT[:, shape.prompt :] = True
    return {
        "input_ids": torch.randint(3, shape.vocabulary, size, generator=generator),
        "attention_mask": torch.ones(size, dtype=torch.int64),
        "response_mask": response_mask_BT,
        "route_ids": torch.where(torch.arange(shape.rows) < shape.domain_rows, DOMAIN, GENERAL),
    }


def lora_config(shape: Shape) -> LoraConfig:
    rank = shape.lora_rank
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def prepare(shape: Shape, folder: Path) -> None:
    """Write the base checkpoint, the expert's adapter and the teachers' hidden states into `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.tokens,
    )
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=2.0 * shape.width**-0.5)  # logits of standard deviation 2: not flat
    base.save_pretrained(folder / "base")
    expert = get_peft_model(base, lora_config(shape))
    for name, parameter in expert.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    expert.save_pretrained(str(folder / "expert"))
    _student_model, objective = _shared_roles(shape, folder)
    views = teacher_views(make_batch(shape), objective)
    save_file(
        {str(route): view.hidden_NE for route, view in views.items() if isinstance(view, HiddenTeacher)},
        folder / "teacher_states.safetensors",
    )


def _student(shape: Shape, folder: Path) -> Backbone:
    """The base with a new student adapter on it, by the toolkit's own functions."""
    base = load_model(checkpoint(folder / "base"), LoadSettings(torch.float32))
    backbone = Backbone(checkpoint(folder / "base"), base)
    torch.manual_seed(2)
    add_student_adapter(backbone, LoraRecipe(rank=shape.lora_rank, alpha=2 * shape.lora_rank))
    return backbone


def _shared_roles(shape: Shape, folder: Path) -> tuple[nn.Module, Objective]:
    """(student, Objective): three roles on one backbone, as dae.alignment.build_roles makes them."""
    backbone = _student(shape, folder)
    name = add_frozen_adapter(backbone, checkpoint(folder / "expert"))
    reference, expert = Role("reference", backbone.model, None), Role("expert", backbone.model, name)
    return backbone.model, Objective((Route("general", reference), Route("domain", expert)), TokenLoss())


def ours(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """The step as kd.training.trainer.RoutedTrainer takes it: response tokens, route sums, one normaliser."""
    model, objective = _shared_roles(shape, folder)
    batch = make_batch(shape)

    def loss_of_step() -> Tensor:
        weights_R = objective.weights(response_token_counts(batch, len(objective.routes)))
        return (weights_R * route_sums(model, batch, objective).loss).sum()

    return model, loss_of_step


def student_only(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """The student's pass and our loss; the teachers' hidden states at response positions are given."""
    model = _student(shape, folder).model
    batch = make_batch(shape)
    teacher_states = load_file(folder / "teacher_states.safetensors")
    inputs, labels_BT = model_inputs(batch), batch["input_ids"][:, 1:]

    def loss_of_step() -> Tensor:
        hidden_BTD = final_hidden_states(model, inputs)[:, :-1]
        head = head_of(model)
        means = []
        for route in (GENERAL, DOMAIN):
            here_BT = _positions(batch, route)
            teacher = HiddenTeacher(teacher_states[str(route)], head)
            sums = token_loss_sums(hidden_BTD[here_BT], head, labels_BT[here_BT], TokenLoss(), teacher)
            means.append(sums.loss / here_BT.sum())
        return torch.stack(means).mean()

    return model, loss_of_step


def _positions(batch: Mapping[str, Tensor], route: int) -> Tensor:
    """[B, T - 1] bool: the positions of this route that predict a response token."""
    return batch["response_mask"][:, 1:] & (batch["route_ids"] == route)[:, None]


def _positions_of(batch: Mapping[str, Tensor], routes: Iterable[int]) -> dict[int, Tensor]:
    return {route: _positions(batch, route) for route in routes}


def _three_models(shape: Shape, folder: Path) -> tuple[nn.Module, dict[int, nn.Module]]:
    """(student, teacher by route) as models of their own; the expert is merged, which is its fastest form."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, use_safetensors=True)

    torch.manual_seed(2)
    student = get_peft_model(load(), lora_config(shape))
    expert = PeftModel.from_pretrained(load(), str(folder / "expert")).merge_and_unload()
    teachers = {GENERAL: load(), DOMAIN: expert}
    for teacher in teachers.values():
        teacher.eval().requires_grad_(False)
    return student, teachers


def straightforward(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """Three models, both teachers on all rows; divergence over full logits, then the mask."""
    student, teachers = _three_models(shape, folder)
    batch = make_batch(shape)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    positions = _positions_of(batch, teachers)
    weights_BT = sum(here / here.sum() / len(positions) for here in positions.values())
    is_domain_B11 = (batch["route_ids"] == DOMAIN)[:, None, None]

    def loss_of_step() -> Tensor:
        with torch.inference_mode():
            domain_BTV = teachers[DOMAIN](**inputs, use_cache=False).logits
            general_BTV = teachers[GENERAL](**inputs, use_cache=False).logits
        log_q_BTV = functional.log_softmax(torch.where(is_domain_B11, domain_BTV, general_BTV)[:, :-1], dim=-1)
        del domain_BTV, general_BTV
        log_p_BTV = functional.log_softmax(student(**inputs, use_cache=False).logits[:, :-1], dim=-1)
        kl_BT = functional.kl_div(log_p_BTV, log_q_BTV, log_target=True, reduction="none").sum(-1)
        return (weights_BT * kl_BT).sum()

    return student, loss_of_step


def both_divergences(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """Three models, both teachers on all rows; each teacher's divergence over full logits, then the masks."""
    student, teachers = _three_models(shape, folder)
    batch = make_batch(shape)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    weights_BT = {route: here / here.sum() / len(teachers) for route, here in _positions_of(batch, teachers).items()}

    def loss_of_step() -> Tensor:
        with torch.inference_mode():
            teacher_BTV = {route: teacher(**inputs, use_cache=False).logits for route, teacher in teachers.items()}
        log_p_BTV = functional.log_softmax(student(**inputs, use_cache=False).logits[:, :-1], dim=-1)
        losses = []
        for route, logits_BTV in teacher_BTV.items():
            log_q_BTV = functional.log_softmax(logits_BTV[:, :-1], dim=-1)
            kl_BT = functional.kl_div(log_p_BTV, log_q_BTV, log_target=True, reduction="none").sum(-1)
            losses.append((weights_BT[route] * kl_BT).sum())
        return torch.stack(losses).sum()

    return student, loss_of_step


def lean(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """Three models, both teachers on all rows, full logits; softmax and divergence at response positions only."""
    student, teachers = _three_models(shape, folder)
    batch = make_batch(shape)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    predicting_BT = batch["response_mask"][:, 1:]
    is_domain_N = (batch["route_ids"] == DOMAIN)[:, None].expand(predicting_BT.shape)[predicting_BT]
    weights_N = torch.where(is_domain_N, 0.5 / is_domain_N.sum(), 0.5 / (~is_domain_N).sum())

    def teacher_logits(route: int) -> Tensor:
        with torch.inference_mode():
            return teachers[route](**inputs, use_cache=False).logits[:, :-1][predicting_BT]

    def loss_of_step() -> Tensor:
        teacher_NV = torch.where(is_domain_N[:, None], teacher_logits(DOMAIN), teacher_logits(GENERAL))
        log_q_NV = functional.log_softmax(teacher_NV, dim=-1)
        log_p_NV = functional.log_softmax(student(**inputs, use_cache=False).logits[:, :-1][predicting_BT], dim=-1)
        kl_N = functional.kl_div(log_p_NV, log_q_NV, log_target=True, reduction="none").sum(-1)
        return (weights_N * kl_N).sum()

    return student, loss_of_step


BUILDERS: dict[str, Callable[[Shape, Path], tuple[nn.Module, LossOfStep]]] = {
    "ours": ours,
    "both-divergences": both_divergences,
    "straightforward": straightforward,
    "lean": lean,
    "student-only": student_only,
}


def optimizer_steps(kind: str, shape: Shape, folder: Path) -> Callable[[], float]:
    """A function that takes one optimizer step (AdamW on the student's adapter) and returns the loss before it."""
    model, loss_of_step = BUILDERS[kind](shape, folder)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> float:
        loss = loss_of_step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def count_flops(kind: str, shape: Shape, folder: Path) -> int:
    """Floating-point operations of one step's matrix products and attention."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)

    for function in (attention, attention_backward):
        setattr(function, "_get_raw", True)  # noqa: B010 - tensors in, not their shapes
    aten = torch.ops.aten
    cpu_attention = {  # torch counts only the accelerators' kernels by itself
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    step = optimizer_steps(kind, shape, folder)
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        step()
    return counter.get_total_flops()
