"""ZeRO-2 and ZeRO-3: two processes give the student of one, and its files.

accelerate's own preparation runs on CPUs here (benchmarks/fsdp_on_cpus.py). `make test-zero` installs DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, cut, merged, run
from pico import make_checkpoint
from processes import FSDP_ON_CPUS, Ended, Signal, dae, ranks
from safetensors.torch import load_file
from worlds import FORGETTING, align_command, metrics_of

from benchmarks.fsdp_on_cpus import zero
from dae import cli
from kd.errors import UserError
from kd.training.zero import refuse_other_dtypes

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; make test-zero does it"
)
SIX = "train.max_steps=6"
STAGES = pytest.mark.parametrize("stage", [2, 3])


def launched(
    arguments: Sequence[str], world: Path, stage: int, signals: Sequence[Sequence[Signal]] = ((), ())
) -> list[Ended]:
    return ranks(arguments, world, signals, {**zero(stage), FSDP_ON_CPUS: "yes"})


def trained(arguments: Sequence[str], world: Path, stage: int) -> None:
    ended = launched(arguments, world, stage)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err + ended[1].err


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "run.json").read_text())["summary"]
    return summary


def assert_same_run(one: Path, two: Path, stage: int) -> None:
    assert summary_of(two)["wrapping"] == f"2 processes, ZeRO-{stage}"
    assert_same_student(one, two)
    for ours, theirs in zip(metrics_of(one), metrics_of(two), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"response_tokens_per_second", "peak_memory_gib", "start"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key


@needs_deepspeed
@pytest.mark.slow
@STAGES
@pytest.mark.parametrize(
    "more",
    [
        ["start=0.3", *HELD_OUT],
        ["lora=null", "start=0.3", "train.learning_rate=1e-3", "train.optim=sgd"],
        ["train.gradient_checkpointing=true", "data.packing=true", "start=base", "train.max_grad_norm=0.05"],
        ["lora.target_modules=[q_proj, lm_head]", "start=base"],
        ["data.domain.0.share=0.04", "data.general.0.share=0.96", "budget.general=0.001", "start=base"],
    ],
    ids=str,
)
def test_two_processes_give_the_student_of_one(world: Path, stage: int, more: list[str]) -> None:
    """Also with few domain rows: then a process has steps without any of them. Two micro-batches in a step."""
    trained(align_command(*cut(2, 2), SIX, *more, output="two"), world, stage)
    assert_same_run(run(*cut(8, 1), SIX, *more, output="one"), Path("two"), stage)


@needs_deepspeed
@pytest.mark.slow
@STAGES
@pytest.mark.parametrize("lora", ["lora.rank=3", "lora=null"])
def test_teachers_of_their_own(world: Path, stage: int, lora: str) -> None:
    """A full expert and a reference of another architecture; weights that two processes cannot share evenly."""
    merged("expert", "whole")
    make_checkpoint(world / "other", "mistral", seed=5)
    more = [SIX, lora, "expert=whole", "reference=other", "start=base", "train.learning_rate=1e-3"]
    trained(align_command(*cut(4, 1), *more, output="two"), world, stage)
    assert_same_run(run(*cut(8, 1), *more, output="one"), Path("two"), stage)


@needs_deepspeed
@pytest.mark.slow
@STAGES
def test_distill_with_attention_and_hidden_states(world: Path, stage: int) -> None:
    """Also what trains beside the student and is no part of the result."""
    make_checkpoint(world / "wide", seed=5, hidden_size=24)
    command = ["distill", "--base", "base", "--teacher", "wide", "--data", "general.jsonl", "attention.weight=0.5"]
    command += ["hidden.weight=0.5", "hidden.loss=mse", "train.max_steps=4", "train.learning_rate=1e-3", "lora.rank=4"]
    command += ["train.logging_steps=2", "train.save_steps=2"]
    assert cli.run([*command, "--output", "one"]) == 0
    trained([*command, "--output", "two", "train.per_device_train_batch_size=4"], world, stage)
    assert_same_run(Path("one"), Path("two"), stage)
    file = "checkpoints/step-000004/training_only.safetensors"
    for name, weight in load_file(Path("one") / file).items():
        torch.testing.assert_close(load_file(Path("two") / file)[name], weight, rtol=0, atol=1e-4)


@needs_deepspeed
@pytest.mark.slow
@STAGES
def test_sft(world: Path, stage: int) -> None:
    command = ["sft", "--base", "base", "--data", "shop.jsonl", SIX, "train.learning_rate=1e-2", "lora.rank=4"]
    assert cli.run([*command, "--output", "one"]) == 0
    trained([*command, "--output", "two", "train.per_device_train_batch_size=4"], world, stage)
    assert_same_run(Path("one"), Path("two"), stage)


@needs_deepspeed
@pytest.mark.slow
@STAGES
def test_the_best_step_is_kept(world: Path, stage: int) -> None:
    more = [SIX, *FORGETTING, "start=base"]
    trained(align_command(*cut(4, 1), *more, output="two"), world, stage)
    one = run(*cut(8, 1), *more, output="one")
    assert summary_of(one)["best_step"] == summary_of(Path("two"))["best_step"] == 2
    assert_same_student(one, Path("two"))


@needs_deepspeed
@pytest.mark.slow
@STAGES
@pytest.mark.parametrize("lora", ["lora.rank=3", "lora=null"])
def test_checkpoints_hold_what_one_process_saves(world: Path, stage: int, lora: str) -> None:
    more = [SIX, lora, "start=base", "train.learning_rate=1e-3"]
    one = run(*cut(8, 1), *more, output="one")
    trained(align_command(*cut(4, 1), *more, output="two"), world, stage)
    ours, theirs = (Path(name) / "checkpoints/step-000006" for name in (one, "two"))
    same = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {p.name for p in ours.iterdir()} - same == {p.name for p in theirs.iterdir()} - same
    weights = next(p.name for p in ours.glob("*.safetensors"))
    assert load_file(ours / weights).keys() == load_file(theirs / weights).keys()
    first, second = (torch.load(p / "optimizer.pt", weights_only=True) for p in (ours, theirs))
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, moments in first["state"].items():
        assert moments.keys() == second["state"][index].keys()
        for key, value in moments.items():
            torch.testing.assert_close(second["state"][index][key], value, rtol=1e-3, atol=1e-5)
    assert torch.load(ours / "scheduler.pt") == torch.load(theirs / "scheduler.pt")


@needs_deepspeed
@pytest.mark.slow
@STAGES
def test_stopped_runs_go_on(world: Path, stage: int) -> None:
    """A checkpoint is that of one process: another number of them, another plan or none goes on from it."""
    one = run(*cut(8, 1), "start=base", output="one")
    in_step_five = Signal("kd.training.trainer:RoutedTrainer.training_step", 5, signal.SIGTERM)

    def stopped(output: str) -> None:
        command = align_command(*cut(4, 1), "start=base", output=output)
        assert [rank.status for rank in launched(command, world, stage, [[], [in_step_five]])] == [143, 143]

    for output, stage_then in (("again", stage), ("other", 5 - stage)):
        stopped(output)
        trained(align_command(*cut(4, 1), "start=base", output=output), world, stage_then)
        assert summary_of(Path(output))["wrapping"] == f"2 processes, ZeRO-{stage_then}"
        assert_same_student(one, Path(output))
    stopped("alone")
    assert cli.run(align_command(*cut(4, 1), "start=base", output="alone")) == 2  # other rows in a step
    assert_same_student(one, run(*cut(8, 1), "start=base", output="alone"))


@needs_deepspeed
@pytest.mark.slow
@STAGES
def test_bfloat16(world: Path, stage: int) -> None:
    """Frozen weights in bfloat16 under an adapter in float32; all weights in float32 under autocast."""
    for output, more in (("lora", ["dtype=bfloat16"]), ("all", ["lora=null", "train.bf16=true"])):
        command = ["start=base", SIX, "train.learning_rate=1e-3", *more]
        assert dae(align_command(*cut(8, 1), *command, output=f"{output}-one"), world, proof=False).status == 0
        trained(align_command(*cut(4, 1), *command, output=f"{output}-two"), world, stage)
        for first, second in zip(metrics_of(Path(f"{output}-one")), metrics_of(Path(f"{output}-two")), strict=True):
            for key in ("loss", "grad_norm", "domain/ntp"):
                assert second.get(key, 0.0) == pytest.approx(first.get(key, 0.0), rel=2e-2), key


def test_weights_that_train_in_other_dtypes_are_refused() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    refuse_other_dtypes(layer.requires_grad_(False))
    with pytest.raises(UserError, match="dtype: weight trains in bfloat16"):
        refuse_other_dtypes(layer.requires_grad_(True))


def refused(arguments: Sequence[str], world: Path, environment: Mapping[str, str]) -> str:
    ended = dae(arguments, world, environment=environment)
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert not (world / "student").exists()
    return ended.err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage: 1: only ZeRO-2 and ZeRO-3 are supported"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file: ds.json: the recipe decides"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: cpu: is not supported"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device: nvme: is not supported"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: true: leaves no process with whole weights"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4: the recipe decides"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: 1.0: the recipe decides"),
    ],
    ids=str,
)
def test_other_configs_are_refused(world: Path, variables: Mapping[str, str], words: str) -> None:
    assert words in refused(align_command(), world, {**zero(3), **variables})


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_missing_package_is_said(world: Path) -> None:
    assert "not installed: pip install -e '.[deepspeed]'" in refused(align_command(), world, zero(3))


@needs_deepspeed
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "asks for ZeRO-3, which accelerate does not support on CPUs"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16: the recipe decides"),
    ],
    ids=str,
)
def test_less_than_asked_for_is_refused(world: Path, variables: Mapping[str, str], words: str) -> None:
    assert words in refused(align_command(), world, {**zero(3), **variables})


@needs_deepspeed
def test_less_than_asked_for_can_be_allowed(world: Path) -> None:
    more = ["train.max_steps=2", "start=base", "allow_fallback=true"]
    assert dae(align_command(*more), world, proof=False, environment=zero(3)).status == 0
    assert summary_of(world / "student")["wrapping"] == "1 process"


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "keys", "words"),
    [
        (3, ["merge=true"], "under ZeRO-3 no process has all weights to merge into"),
        (3, ["quantization=nf4"], "ZeRO-3 cannot shard quantised weights"),
        (2, ["train.optim=adafactor"], "train.optim: adafactor: was not tested with DeepSpeed"),
        (2, ["lora=null", "dtype=bfloat16"], "dtype: bfloat16: with `lora: null` DeepSpeed would train other weights"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(world: Path, stage: int, keys: list[str], words: str) -> None:
    ended = launched(align_command(*keys), world, stage)
    assert [rank.status for rank in ended] == [2, 2]
    assert words in ended[0].err
    assert not (world / "student").exists()
