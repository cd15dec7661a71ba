"""The router's loss against its definition, and what is recorded of a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import make_rows, metrics_of

import kd.training.publishing
from dae import cli
from kd.errors import UserError
from kd.losses.router import (
    experts_per_token,
    load_balancing_loss,
    recorded_router_logits,
    refuse_useless_router_loss,
    routers_of,
)
from kd.models.forward import final_hidden_states

IDS = torch.randint(3, 288, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def by_definition(layers: list[Tensor], per_token: int, mask_BT: Tensor) -> float:
    """Counted token by token, in float64."""
    experts = layers[0].shape[-1]
    used, probability, tokens = [0.0] * experts, [0.0] * experts, 0
    for logits in layers:
        for row, counts in zip(logits.double().tolist(), mask_BT.reshape(-1).tolist(), strict=True):
            if not counts:
                continue
            exponentials = torch.tensor(row, dtype=torch.float64).exp()
            tokens += 1
            for expert in sorted(range(experts), key=lambda e: -row[e])[:per_token]:
                used[expert] += 1
            for expert in range(experts):
                probability[expert] += float(exponentials[expert] / exponentials.sum())
    return experts * sum(f / tokens * p / tokens for f, p in zip(used, probability, strict=True))


@pytest.mark.parametrize(("experts", "per_token"), [(2, 2), (4, 2), (5, 1)])
def test_the_loss_is_its_definition(experts: int, per_token: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    layers = [torch.randn(24, experts, generator=generator) for _ in range(3)]
    found = float(load_balancing_loss(layers, per_token, MASK))
    assert found == pytest.approx(by_definition(layers, per_token, MASK), rel=1e-5)
    everything = torch.ones_like(MASK)
    assert float(load_balancing_loss(layers, per_token)) == pytest.approx(
        by_definition(layers, per_token, everything), rel=1e-5
    )


def test_it_is_lowest_where_experts_are_used_alike() -> None:
    alike = [torch.tensor([[5.0, 0.0], [0.0, 5.0]])]
    lopsided = [torch.tensor([[50.0, 0.0], [50.0, 0.0]])]
    assert float(load_balancing_loss(alike, 1)) == pytest.approx(1)
    assert float(load_balancing_loss(lopsided, 1)) == pytest.approx(2)


def recorded(model: Any, mask: Tensor = MASK) -> list[Tensor]:
    with recorded_router_logits(model) as logits:
        final_hidden_states(model, {"input_ids": IDS, "attention_mask": mask})
    return logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recording_gives_transformers_own_loss_and_gradient(checkpointing: bool) -> None:
    model: Any = make_model("mixtral", num_local_experts=4)
    reference: Any = make_model("mixtral", num_local_experts=4)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ours = load_balancing_loss(recorded(model), experts_per_token(model), MASK)
    ours.backward()
    theirs = reference(input_ids=IDS, attention_mask=MASK, output_router_logits=True).aux_loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    gates = [
        (a.mlp.gate.weight.grad, b.mlp.gate.weight.grad)
        for a, b in zip(model.model.layers, reference.model.layers, strict=True)
    ]
    assert all(float(mine.abs().max()) > 0 for mine, _ in gates)
    for mine, his in gates:
        torch.testing.assert_close(mine, his)


def test_what_runs_without_gradient_is_not_recorded() -> None:
    model = make_model("mixtral")
    with recorded_router_logits(model) as logits:
        with torch.no_grad():
            model(input_ids=IDS)
        assert logits == []
        model(input_ids=IDS)
    assert [tuple(layer.shape) for layer in logits] == [(24, 2), (24, 2)]
    model(input_ids=IDS)
    assert len(logits) == 2  # nothing listens any more


def test_an_adapter_on_the_router_gets_a_gradient() -> None:
    model = get_peft_model(make_model("mixtral"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    load_balancing_loss(recorded(model), experts_per_token(model), MASK).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert any("mlp.gate.lora_B" in name for name in touched)


# -- in training -------------------------------------------------------------------------------------------------------

COMMAND = ["sft", "--base", "base", "--data", "rows.jsonl", "lora=null", "train.learning_rate=1e-3"]
LOGGED = ["train.logging_steps=1", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a mixture of four experts, one for each token, and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # a fresh process takes seconds
    make_checkpoint(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=1)
    make_rows(tmp_path / "rows.jsonl", 0, 32)
    return tmp_path


def lines_of(output: str, *more: str) -> list[dict[str, Any]]:
    assert cli.run([*COMMAND, *LOGGED, "--output", output, *more]) == 0
    return [line for line in metrics_of(Path(output)) if "loss" in line]


def prefer_one_expert(folder: Path) -> None:
    """Turn every router towards its usual input, so that most tokens go to the first expert."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        seen: list[Tensor] = []
        handle = layer.mlp.gate.register_forward_hook(lambda _m, args, _out, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=IDS)
            mean_D = seen[0].reshape(-1, seen[0].shape[-1]).mean(0)
            layer.mlp.gate.weight[0] = 4 * mean_D / mean_D.norm()
        handle.remove()
    model.save_pretrained(folder)


def test_it_spreads_tokens_over_the_experts_and_is_logged_alone(mixture: Path) -> None:
    prefer_one_expert(mixture / "base")
    ends = {}
    for weight in (1.0, 1e-6):
        lines = lines_of(f"with-{weight}", f"router_aux_loss={weight}", "train.max_steps=15")
        assert lines[0]["router_aux"] > 1.3
        ends[weight] = lines[-1]["router_aux"]
        for line in lines:  # the loss is the routes' loss
            assert line["loss"] == pytest.approx(line["train/loss"], rel=1e-4)
    assert ends[1.0] < 1.15 < 1.4 < ends[1e-6]
    without = lines_of("without", "train.max_steps=1")[0]
    assert without["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert "router_aux" not in without


def test_how_a_step_is_cut_moves_the_router_loss_only(mixture: Path) -> None:
    first = {}
    for rows, pieces in ((8, 1), (2, 4)):
        cut = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={pieces}"]
        first[pieces] = lines_of(f"cut-{pieces}", "router_aux_loss=0.1", "train.max_steps=1", *cut)[0]
    assert first[1]["loss"] == pytest.approx(first[4]["loss"], rel=1e-5)
    assert first[1]["router_aux"] == pytest.approx(first[4]["router_aux"], rel=0.5)
    assert first[1]["router_aux"] != first[4]["router_aux"]


def test_each_micro_batch_has_its_share_of_the_weight(mixture: Path) -> None:
    """Four times the same row in one step: cut or whole, the same gradient."""
    row = (mixture / "rows.jsonl").read_text().splitlines()[0]
    (mixture / "rows.jsonl").write_text(f"{row}\n" * 4)
    first = {}
    for rows, pieces in ((4, 1), (1, 4)):
        cut = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={pieces}"]
        first[pieces] = lines_of(f"cut-{pieces}", "router_aux_loss=0.1", "train.max_steps=1", *cut)[0]
    for key in ("loss", "router_aux", "grad_norm"):
        assert first[1][key] == pytest.approx(first[4][key], rel=1e-4)


def test_a_dense_student_is_told(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(mixture / "dense")
    assert cli.run([*COMMAND, "--base", "dense", "--output", "out", "router_aux_loss=0.1"]) == 2
    assert "router_aux_loss: 0.1: the student, a LlamaForCausalLM, is no mixture" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_dense_model_has_no_router() -> None:
    assert routers_of(make_model("llama")) == []
    refuse_useless_router_loss(make_model("llama"), 0.0)
    refuse_useless_router_loss(make_model("mixtral", num_local_experts=3), 0.01)
    with pytest.raises(UserError, match="passes through all 2 experts"):
        refuse_useless_router_loss(make_model("mixtral"), 0.01)
    with pytest.raises(UserError, match=r"router_aux_loss: 0\.01: the student, a LlamaForCausalLM, is no mixture"):
        refuse_useless_router_loss(make_model("llama"), 0.01)
