"""A loss or gradient that is not finite, or a loss that explodes, stops a run before the step that it would spoil."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import cut, merged, run
from bad_gradients import NanGradients
from pico import make_checkpoint
from processes import FSDP_ON_CPUS, ranks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from worlds import align_command, make_adapter, metrics_of

from benchmarks.fsdp_on_cpus import FSDP2, zero
from dae import cli
from kd.data.stage_data import SAMPLED_ROWS
from kd.runs.checkpoints import checkpoint_fault
from kd.training import objective
from kd.training.loss_watch import fault_of
from kd.training.trainer import RoutedTrainer

TRAP = "~"  # a token of no other row
ROWS = (41, 63, 97)  # lines that have it; even lines: what is measured before the first step are odd ones
ONE_LORA = ("start=base", "train.save_steps=1", "train.logging_steps=3")


def trap_rows(path: Path) -> None:
    """Put the token into some rows."""
    assert SAMPLED_ROWS == 64, "of 120 rows every second one is measured"
    lines = path.read_text().splitlines()
    for number in ROWS:
        row = json.loads(lines[number])
        lines[number] = json.dumps(row | {"prompt": f"{TRAP} {row['prompt']}"})
    path.write_text("\n".join(lines) + "\n")


def trap_token(folder: Path) -> int:
    return int(AutoTokenizer.from_pretrained(folder)(TRAP)["input_ids"][-1])


def trap_model(folder: Path) -> None:
    """Give the token an embedding that is finite and overflows in the first norm of a GPT-2."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    weights[name][trap_token(folder)] = 1e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def told_rows(message: str) -> set[int]:
    """The 0-based rows of general.jsonl that a message names."""
    return {int(number) - 1 for number in re.findall(r"general\.jsonl:(\d+) \(general: ", message)}


def assert_kept(student: Path, message: str) -> int:
    """The message names the last checkpoint, which is whole and finite; its step."""
    checkpoints = sorted((student / "checkpoints").glob("step-*"))
    assert str(checkpoints[-1].relative_to(student.parent)) in message
    for checkpoint in checkpoints:
        assert checkpoint_fault(checkpoint) is None
        weights = load_file(next(checkpoint.glob("*.safetensors")))
        assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert not (student / "run.json").exists()
    return int(checkpoints[-1].name.removeprefix("step-"))


def gpt2_world(world: Path) -> None:
    """Base and expert are a GPT-2: its norm subtracts a mean, and so overflows to NaN."""
    for name in ("base", "expert"):
        for file in (world / name).iterdir():
            file.unlink()
    make_checkpoint(world / "base", "gpt2")
    make_adapter(world / "expert", world / "base")


@pytest.mark.parametrize(
    "more",
    [
        [*cut(8, 1), "lora.rank=4"],
        [*cut(2, 4), "lora.rank=4"],
        [*cut(4, 2), "dtype=bfloat16", "lora.rank=4"],
        [*cut(4, 2), "train.bf16=true", "lora=null"],
    ],
    ids=["one batch", "one bad micro-batch of four", "bfloat16", "autocast, all weights"],
)
def test_the_rows_are_named_before_any_weight_changes(
    world: Path, capfd: pytest.CaptureFixture[str], more: list[str]
) -> None:
    gpt2_world(world)
    trap_rows(world / "general.jsonl")
    trap_model(world / "base")
    assert cli.run(align_command(*ONE_LORA, *more)) == 2
    message = capfd.readouterr().err
    step = int(re.search(r"stopped before step (\d+): the loss is nan, not finite", message)[1])  # type: ignore[index]
    assert told_rows(message) and told_rows(message) <= set(ROWS), message
    assert "domain" not in message.split("Rows of this step")[1]  # the others of the step are finite
    assert assert_kept(world / "student", message) == step - 1
    assert "try train.learning_rate=0.00" in message


@pytest.mark.parametrize("gone", [True, False], ids=["removed", "shortened"])
def test_rows_whose_file_has_changed_are_told_by_their_number(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    gpt2_world(world)
    trap_rows(world / "general.jsonl")
    trap_model(world / "base")
    real = RoutedTrainer.train

    def train(self: RoutedTrainer, *arguments: Any, **named: Any) -> Any:
        (world / "general.jsonl").unlink() if gone else (world / "general.jsonl").write_text("")
        return real(self, *arguments, **named)

    monkeypatch.setattr(RoutedTrainer, "train", train)
    assert cli.run(align_command(*ONE_LORA, *cut(8, 1), "lora.rank=4")) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "the loss is nan" in message and "source 0, whose file has changed since" in message


def test_a_gradient_that_is_not_finite_under_a_finite_loss(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trap_rows(world / "general.jsonl")
    monkeypatch.setattr(objective, "_losses", objective._losses)  # to be taken back
    NanGradients(trap_token(world / "base")).arm()
    assert cli.run(align_command(*ONE_LORA, *cut(2, 4))) == 2
    message = capfd.readouterr().err
    assert "the gradient norm is nan, not finite (the loss is " in message
    assert told_rows(message) and told_rows(message) <= set(ROWS), message
    assert "gradient not finite)" in message
    assert_kept(world / "student", message)


def test_a_teacher_that_is_not_finite_is_named(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trap_rows(world / "general.jsonl")
    make_checkpoint(world / "other", "gpt2", seed=5)
    trap_model(world / "other")
    assert cli.run(align_command(*ONE_LORA, "reference=other")) == 2
    message = capfd.readouterr().err
    assert "dae align: route general: reference: stopped before step" in message
    assert "The teacher's output is not finite. Save its checkpoint again" in message
    assert told_rows(message) and told_rows(message) <= set(ROWS), message
    assert_kept(world / "student", message)


def test_a_step_size_that_is_far_too_large_is_told(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = align_command("train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup_steps=4", *ONE_LORA)
    assert cli.run(command) == 2
    message = capfd.readouterr().err
    assert "train.learning_rate: 1e+30: " in message
    tried = float(re.search(r"try train\.learning_rate=(\S+)", message)[1])  # type: ignore[index]
    assert tried < 1e30 / 3  # it happened in the warm-up
    assert assert_kept(world / "student", message) < 12


def test_an_exploded_loss_is_stopped_while_it_is_finite(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = align_command("train.learning_rate=1000", "lora=null", "train.lr_scheduler_type=constant", *ONE_LORA)
    assert cli.run([*command, "train.warmup_steps=0"]) == 2
    message = capfd.readouterr().err
    found = re.search(
        r"stopped before step (\d+): the loss has exploded: (\S+), after (\S+) at the first step", message
    )
    assert found is not None, message
    assert float(found[2]) > 10 * float(found[3])
    assert found[1] != "2" or "No checkpoint was written before" in message  # that of step 1 has the weights at fault


def test_what_is_no_explosion() -> None:
    """A spike, a single odd token, a loss that began high."""
    assert fault_of(60.0, 1e9, 2.0, 32000) is None
    assert fault_of(150.0, 1.0, 100.0, 32000) is None
    assert fault_of(104.0, 1.0, 2.0, 32000) is not None


def test_the_criterion_goes_on_after_a_stop(world: Path) -> None:
    """What training began with is in the checkpoint."""
    folder = run("train.max_steps=4", *ONE_LORA)
    states = [json.loads((c / "trainer_state.json").read_text()) for c in sorted(folder.glob("checkpoints/step-*"))]
    watched = [state["stateful_callbacks"]["LossWatch"]["attributes"] for state in states]
    assert watched[0]["first_loss"] == watched[1]["first_loss"] > 0


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(
    world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An infinite step from a finite gradient; the last one of the run, which no further loss would show."""
    merged("expert", "whole")
    more = ["train.optim=sgd", "train.max_grad_norm=0", "train.max_steps=1", "train.warmup_steps=0", "lora=null"]
    assert cli.run(align_command(*more, "expert=whole", "train.learning_rate=3e38", "train.weight_decay=100")) == 2
    message = capfd.readouterr().err
    assert "weights are not finite after step 1, and nothing is written of them" in message
    assert not list((world / "student").glob("**/*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{}, {**FSDP2, FSDP_ON_CPUS: "yes"}], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_all_processes_stop_alike(world: Path, plan: Mapping[str, str], kind: str) -> None:
    """The bad row is on one of them."""
    trap_rows(world / "general.jsonl")
    if kind == "loss":
        gpt2_world(world)
        trap_model(world / "base")
    armed = [] if kind == "loss" else [NanGradients(trap_token(world / "base"))]
    ended = ranks(align_command(*cut(2, 2), *ONE_LORA, "lora=null"), world, [armed, armed], plan)
    assert [rank.status for rank in ended] == [2, 2], ended[0].err
    message = ended[0].err
    assert f"the {kind} is nan" in message
    assert told_rows(message) and told_rows(message) <= set(ROWS), message
    assert_kept(world / "student", message)
    step = re.search(r"stopped before step (\d+)", message)
    assert step is not None and metrics_of(world / "student")[-1]["step"] == int(step[1]) - 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="make test-zero installs DeepSpeed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_under_zero_nothing_is_written_of_harmed_weights(world: Path, stage: int, kind: str) -> None:
    """The engine takes its step inside of the backward pass: before it the loss is known, the gradient is not."""
    trap_rows(world / "general.jsonl")
    if kind == "loss":
        gpt2_world(world)
        trap_model(world / "base")
    armed = [] if kind == "loss" else [NanGradients(trap_token(world / "base"))]
    plan = {**zero(stage), FSDP_ON_CPUS: "yes"}
    ended = ranks(align_command(*cut(2, 2), *ONE_LORA, "lora=null"), world, [armed, armed], plan)
    assert [rank.status for rank in ended] == [2, 2], ended[0].err
    message = ended[0].err
    words = "stopped before step" if kind == "loss" else "DeepSpeed has taken the step"
    flat = " ".join(message.split())
    value = "is nan" if kind == "loss" else "is inf"  # the engine's word for any norm that is not finite
    assert words in flat and f"the {kind} " in flat and f"{value}, not finite" in flat
    if kind == "loss":
        assert told_rows(message) and told_rows(message) <= set(ROWS), message
    else:
        assert "general.jsonl:" in message.split("Rows of this step:")[1], message
    assert_kept(world / "student", message)
