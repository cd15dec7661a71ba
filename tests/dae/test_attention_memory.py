"""What the loss between attention maps holds is what `dae check` says, counted on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model
from stages import plan_of

import kd.losses.attention
from dae.checking.estimates import held_for_maps, memory
from kd.losses.attention import AttentionLoss, attention_loss
from kd.losses.layer_pairs import layer_pairs
from kd.losses.token_loss import TokenLoss
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.stages.distill_recipe import DistillRecipe
from kd.training.objective import Objective, Route, route_sums

ROWS, TOKENS = 2, 48


def roles(checkpointed: bool) -> tuple[Role, Role]:
    """A student of 2 layers with LoRA, and a wider teacher of 4."""
    student = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).train()
    if checkpointed:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.enable_input_require_grads()
    teacher = make_model(hidden_size=32, num_hidden_layers=4, num_attention_heads=8).requires_grad_(False)
    return Role("student", student, STUDENT_ADAPTER), Role("teacher", teacher, None)


def loss_of(student: Role, teacher: Role) -> AttentionLoss:
    return attention_loss(1.0, student, teacher, layer_pairs("even", 2, 4, ""))


def held_bytes(student: Role, teacher: Role, monkeypatch: pytest.MonkeyPatch, *, with_maps: bool) -> int:
    """Storage that is alive when the loss is there, weights aside: kept for backward, or noted for the maps."""
    ids = torch.randint(3, 288, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": mask}
    batch["route_ids"] = torch.zeros(ROWS, dtype=torch.int64)
    held: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real = kd.losses.attention.map_kl_sum

    def noting(ours: Any, theirs: Any, rows: Any) -> torch.Tensor:
        for inputs in (ours, theirs):
            hold(inputs.query_BHTC)
            hold(inputs.key_BKTC)
        return real(ours, theirs, rows)

    monkeypatch.setattr(kd.losses.attention, "map_kl_sum", noting)
    terms = (loss_of(student, teacher),) if with_maps else ()
    objective = Objective((Route("train", teacher),), TokenLoss(), terms=terms)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        _sums = route_sums(student.model, batch, objective)
    monkeypatch.undo()
    weights = {weight.untyped_storage().data_ptr() for role in (student, teacher) for weight in role.model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_held_for_attention_maps(monkeypatch: pytest.MonkeyPatch, checkpointed: bool) -> None:
    models = roles(checkpointed)
    real = held_bytes(*models, monkeypatch, with_maps=True) - held_bytes(*models, monkeypatch, with_maps=False)
    estimated = ROWS * TOKENS * held_for_maps(loss_of(*models), torch.float32, checkpointed)
    assert real == pytest.approx(estimated, rel=0.05)


def test_the_estimate_of_a_distillation_has_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Q?", "completion": " ten"}\n' * 20)
    make_checkpoint(tmp_path / "base")
    needed = []
    for attention in (None, {"weight": 0.5}):
        recipe = DistillRecipe(
            base=tmp_path / "base", teacher=tmp_path / "base", output="o", data={"train": rows}, attention=attention
        )  # type: ignore[arg-type]
        plan = plan_of(recipe)
        needed.append({i.name: i.bytes for i in memory(plan)})
    (added,) = needed[1].keys() - needed[0].keys() - {"logits or attention maps, one chunk at a time"}
    assert added == "attention: queries and keys until the loss, and their gradients"
    # Of 8 rows at a time, 4 + 2 heads of width 4, in 2 layers: once the teacher's, once gradients.
    assert needed[1][added] == 8 * plan.data.longest * (4 + 2) * 4 * 2 * (4 + 4)
