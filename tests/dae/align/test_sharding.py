"""FSDP2: weights split over processes give the student of one process, and its files.

accelerate's own preparation runs on CPUs here (benchmarks/fsdp_on_cpus.py).
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, cut, merged, run
from meeting import EARLY, MET, Meets, RefusesEarly
from other_rows import OtherRows
from pico import make_checkpoint
from processes import FSDP_ON_CPUS, Ended, Signal, dae, ranks
from safetensors.torch import load_file
from worlds import align_command, make_rows, metrics_of

from benchmarks.fsdp_on_cpus import FSDP2
from dae import cli

SHARDED = {**FSDP2, FSDP_ON_CPUS: "yes"}
SIX = "train.max_steps=6"


def sharded(arguments: Sequence[str], world: Path, count: int = 2, plan: Mapping[str, str] | None = None) -> None:
    ended = ranks(arguments, world, [()] * count, {**SHARDED, **(plan or {})})
    assert [(rank.status, rank.err) for rank in ended][1:] == [(0, "")] * (count - 1), ended[0].err
    assert (ended[0].status, "Traceback" in ended[0].err) == (0, False), ended[0].err


def assert_same_run(first: Path, second: Path, count: int = 2) -> None:
    assert summary_of(second)["wrapping"] == f"{count} processes, FSDP2"
    assert_same_student(first, second)
    for one, other in zip(metrics_of(first), metrics_of(second), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"response_tokens_per_second", "peak_memory_gib", "start"}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "run.json").read_text())["summary"]
    return summary


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["start=0.3", *HELD_OUT],
        ["lora=null", "start=0.3", "train.learning_rate=1e-3"],
        ["train.gradient_checkpointing=true", "data.packing=true", "start=base"],
        ["lora.target_modules=[q_proj, lm_head]", "start=base"],
        ["budget.general=0.001", "start=base"],
        ["data.domain.0.share=0.04", "data.general.0.share=0.96", "start=base"],
    ],
    ids=str,
)
def test_two_processes_give_the_student_of_one(world: Path, more: list[str]) -> None:
    """Also with few domain rows: then a process has steps without any of them, and another has some."""
    sharded(align_command(*cut(4, 1), SIX, *more, output="two"), world)
    assert_same_run(run(*cut(8, 1), SIX, *more, output="one"), Path("two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [{"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}],
    ids=str,
)
def test_every_plan(world: Path, plan: Mapping[str, str]) -> None:
    sharded(align_command(*cut(4, 1), SIX, "start=0.3", output="two"), world, plan=plan)
    assert_same_run(run(*cut(8, 1), SIX, "start=0.3", output="one"), Path("two"))


@pytest.mark.slow
def test_four_processes_with_parts_that_are_empty(world: Path) -> None:
    """A rank of 2 over four processes: two of them hold nothing of it."""
    more = [SIX, "lora.rank=2", "start=base"]
    sharded(align_command(*cut(2, 1), *more, output="four"), world, count=4)
    assert_same_run(run(*cut(8, 1), *more, output="one"), Path("four"), count=4)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_teachers_of_their_own_are_split_too(world: Path, lora: str) -> None:
    """A full expert and a separate reference, tied embeddings among them."""
    merged("expert", "whole")
    make_checkpoint(world / "other", seed=5)
    more = [SIX, lora, "expert=whole", "reference=other", "start=base", "train.learning_rate=1e-3"]
    sharded(align_command(*cut(4, 1), *more, output="two"), world)
    assert_same_run(run(*cut(8, 1), *more, output="one"), Path("two"))


@pytest.mark.slow
def test_teachers_of_another_architecture(world: Path) -> None:
    """accelerate looks for the first model's layers in all of them."""
    make_checkpoint(world / "other", "mistral", seed=5)
    more = [SIX, "reference=other", "start=base", "lora.rank=4"]
    sharded(align_command(*cut(4, 1), *more, output="two"), world)
    assert_same_run(run(*cut(8, 1), *more, output="one"), Path("two"))


@pytest.mark.slow
def test_cached_teachers(world: Path) -> None:
    more = [SIX, "cache.path=cache", "start=base"]
    one = run(*cut(8, 1), *more, output="one")
    sharded(align_command(*cut(4, 1), *more, output="two"), world)
    assert_same_run(one, Path("two"))


@pytest.mark.slow
def test_stopped_runs_go_on_split_or_not(world: Path) -> None:
    """A checkpoint is that of one process: it goes on under another number of them with the same rows in a step."""
    one = run(*cut(8, 1), "start=base", output="one")
    in_step_five = Signal("kd.training.trainer:RoutedTrainer.training_step", 5, signal.SIGTERM)

    def stopped(output: str) -> None:
        command = align_command(*cut(4, 1), "start=base", output=output)
        ended = ranks(command, world, [[], [in_step_five]], SHARDED)
        assert [rank.status for rank in ended] == [143, 143], ended[0].err

    for output, batch, count, plan, wrapping in (
        ("again", (4, 1), 2, SHARDED, "2 processes, FSDP2"),
        ("more", (2, 1), 4, SHARDED, "4 processes, FSDP2"),
        ("whole", (2, 2), 2, {}, "2 processes, DDP"),
    ):
        stopped(output)
        ended = ranks(align_command(*cut(*batch), "start=base", output=output), world, [()] * count, plan)
        assert [rank.status for rank in ended] == [0] * count, ended[0].err
        assert summary_of(Path(output))["wrapping"] == wrapping
        assert_same_student(one, Path(output))
    stopped("alone")
    assert cli.run(align_command(*cut(4, 1), "start=base", output="alone")) == 2  # other rows in a step
    assert_same_student(one, run(*cut(8, 1), "start=base", output="alone"))


@pytest.mark.slow
def test_checkpoints_hold_what_one_process_saves(world: Path) -> None:
    for lora in ("lora.rank=4", "lora=null"):
        for folder, launch in (("one", run), ("two", None)):
            more = [*cut(8 if launch else 4, 1), SIX, lora, "start=base", "train.learning_rate=1e-3"]
            if launch:
                run(*more, output=f"{folder}-{lora}")
            else:
                sharded(align_command(*more, output=f"{folder}-{lora}"), world)
        ours, theirs = (Path(f"{name}-{lora}/checkpoints/step-000006") for name in ("one", "two"))
        same = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
        assert {p.name for p in ours.iterdir()} - same == {p.name for p in theirs.iterdir()} - same
        weights = next(p.name for p in ours.glob("*.safetensors"))
        mine, split = load_file(ours / weights), load_file(theirs / weights)
        assert mine.keys() == split.keys()
        first, second = (torch.load(p / "optimizer.pt", weights_only=True) for p in (ours, theirs))
        assert first["param_groups"] == second["param_groups"]
        for index, moments in first["state"].items():
            for key, value in moments.items():
                torch.testing.assert_close(second["state"][index][key], value, rtol=1e-3, atol=1e-5)


def refused(arguments: Sequence[str], world: Path, environment: Mapping[str, str]) -> str:
    ended: Ended = dae(arguments, world, environment=environment)
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert not (world / "student").exists()
    return ended.err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "accelerate's config asks for FSDP2, which accelerate does not support on CPUs"),
        ({"FSDP_VERSION": "1"}, "only FSDP2 is supported; set it to 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, "fsdp_cpu_ram_efficient_loading: true"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: SIZE_BASED_WRAP"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing=true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16: the recipe decides"),
    ],
    ids=str,
)
def test_less_than_asked_for_is_refused(world: Path, variables: Mapping[str, str], words: str) -> None:
    assert words in refused(align_command(), world, {**FSDP2, **variables})


def test_less_than_asked_for_can_be_allowed(world: Path) -> None:
    more = ["train.max_steps=2", "start=base", "allow_fallback=true"]
    assert dae(align_command(*more), world, proof=False, environment=FSDP2).status == 0
    assert summary_of(world / "student")["wrapping"] == "1 process"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("merge=true", "under FSDP2 no process has all weights to merge into"),
        ("quantization=nf4", "FSDP2 cannot shard quantised weights"),
        ("train.optim=adafactor", "train.optim: adafactor: was not tested with FSDP2"),
    ],
)
def test_what_split_weights_cannot_do_is_refused(world: Path, key: str, words: str) -> None:
    """By the first process only after the others have connected through its store."""
    ended = ranks(align_command(key), world, [[RefusesEarly()], [Meets()]], SHARDED)
    assert [rank.status for rank in ended] == [2, 2], ended[1].err
    assert words in ended[0].err
    assert (world / MET).exists() and not (world / EARLY).exists()
    assert not (world / "student").exists()


@pytest.mark.slow
def test_distill_with_attention_and_hidden_states(world: Path) -> None:
    """Also what trains beside the student and is no part of the result."""
    make_checkpoint(world / "wide", seed=5, hidden_size=24)
    make_rows(world / "rows.jsonl", 0)
    command = ["distill", "--base", "base", "--teacher", "wide", "--data", "general.jsonl", "attention.weight=0.5"]
    command += ["hidden.weight=0.5", "hidden.loss=mse", "train.max_steps=4", "train.learning_rate=1e-3", "lora.rank=4"]
    command += ["train.logging_steps=2", "train.save_steps=2"]
    assert cli.run([*command, "--output", "one"]) == 0
    sharded([*command, "--output", "two", "train.per_device_train_batch_size=4"], world)
    assert_same_run(Path("one"), Path("two"))
    file = "checkpoints/step-000004/training_only.safetensors"
    for name, weight in load_file(Path("one") / file).items():
        torch.testing.assert_close(load_file(Path("two") / file)[name], weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_mixed_precision_leaves_losses_and_gradients_in_float32(world: Path) -> None:
    """accelerate would round what the forward pass returns, and add up gradients in 16 bits."""
    make_checkpoint(world / "wide", seed=5, hidden_size=24)
    command = ["distill", "--base", "base", "--teacher", "wide", "--data", "general.jsonl", "hidden.weight=0.5"]
    command += [SIX, "lora=null", "train.bf16=true", "train.learning_rate=1e-3", "train.logging_steps=2"]
    assert dae([*command, *cut(8, 1), "--output", "one"], world, proof=False).status == 0
    sharded([*command, *cut(2, 2), "--output", "two"], world)
    for first, second in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        for key in ("loss", "grad_norm", "train/ntp"):
            assert second.get(key, 0.0) == pytest.approx(first.get(key, 0.0), rel=2e-2), key


@pytest.mark.slow
def test_processes_with_other_rows_are_refused(world: Path) -> None:
    """As rows in memory are after a shuffle without a seed."""
    ended = ranks(align_command(*cut(2, 2), SIX), world, [[], [OtherRows()]])
    assert [rank.status for rank in ended] == [2, 2], ended[0].err
    assert "data.general: its rows differ between processes" in ended[0].err.replace("\n", " ")
    assert not (world / "student").exists()
