"""How the work is cut does not matter: accumulation, ranks, packing, checkpointing, dtype, architecture."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, cut, held_out, run, start_of, trained_steps
from pico import FAMILIES, make_checkpoint
from processes import ROOT, Signal, dae, ranks
from safetensors.torch import load_file
from worlds import align_command, make_adapter, metrics_of

from dae import cli


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "micro_batches"), [("routes", (4, 2, 1)), ("tokens", (1,))])
def test_accumulation_does_not_matter(world: Path, weights: str, micro_batches: Sequence[int]) -> None:
    whole = run(*cut(8, 1), f"weights={weights}", output="whole")
    for micro_batch in micro_batches:
        parts = run(*cut(micro_batch, 8 // micro_batch), f"weights={weights}", output=f"by{micro_batch}")
        assert_same_student(whole, parts)
        for one, other in zip(trained_steps(whole), trained_steps(parts), strict=True):
            for key in ("loss", "grad_norm", "general/kl", "domain/kl"):
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6)
            for key in ("general/tokens", "domain/tokens"):
                assert other[key] == one[key]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["train.gradient_checkpointing=true"],
        ["lora=null"],
        ["weights=tokens", HELD_OUT[0]],
        ["budget.general=0.001", "start=0.3"],
    ],
    ids=str,
)
def test_two_ranks_give_the_student_of_one(world: Path, more: list[str]) -> None:
    more = [*more, "train.max_steps=6"]
    one = run(*cut(8, 1), *more, output="one")
    ended = ranks(align_command(*cut(4, 1), *more, output="two"), world)
    assert [(rank.status, "Traceback" in rank.err) for rank in ended] == [(0, False)] * 2, ended
    assert ended[1].out == ""
    assert ended[1].err == ""
    assert_same_student(one, Path("two"))
    for first, second in zip(metrics_of(one), metrics_of(Path("two")), strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"response_tokens_per_second", "peak_memory_gib", "start"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-6), key


def test_two_ranks_end_together(world: Path) -> None:
    refused = ranks(align_command("data.max_length=3"), world)
    assert [rank.status for rank in refused] == [2, 2]
    assert [rank.err.count("\n") for rank in refused] == [1, 0]
    (world / "student").mkdir()
    (world / "student" / "mine").touch()
    refused = ranks(align_command(), world)
    assert [rank.status for rank in refused] == [2, 2]
    assert "holds files that this command did not write" in refused[0].err
    assert refused[1].err == ""


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step_and_go_on_together(world: Path) -> None:
    one = run(*cut(8, 1), output="one")
    command = align_command(*cut(4, 1), output="two")
    in_step_five = Signal("kd.training.trainer:RoutedTrainer.training_step", 5, signal.SIGTERM)
    stopped = ranks(command, world, [[], [in_step_five]])
    assert [rank.status for rank in stopped] == [143, 143]
    assert stopped[0].err.splitlines()[-1].startswith("dae align: stopped after step 5 of 12")
    assert cli.run(command) == 2  # alone it would take half as many rows for a step
    assert [rank.status for rank in ranks(command, world)] == [0, 0]
    assert_same_student(one, Path("two"))


@pytest.mark.slow
def test_torchrun(world: Path) -> None:
    one = run(*cut(8, 1), "train.max_steps=6", output="one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dae"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    done = subprocess.run(
        [*launcher, *align_command(*cut(4, 1), "train.max_steps=6", output="two")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same_student(one, Path("two"))


def test_gradient_checkpointing_does_not_matter(world: Path) -> None:
    plain = run(output="plain")
    assert_same_student(plain, run("train.gradient_checkpointing=true", output="checkpointed"))
    new_name = ["train.activation_checkpointing=true", "train.activation_checkpointing_kwargs={every_n_layers: 2}"]
    assert_same_student(plain, run(*new_name, output="every second layer"))


def test_packing_does_not_matter(world: Path) -> None:
    plain = run(*cut(4, 2), output="plain")
    packed = run("data.packing=true", *cut(4, 2), HELD_OUT[0], output="packed")
    assert_same_student(plain, packed, 1e-4)
    padded = run(*cut(4, 2), HELD_OUT[0], output="padded")
    for one, other in zip(held_out(packed), held_out(padded), strict=True):
        assert one["eval_domain_kl"] == pytest.approx(other["eval_domain_kl"], rel=1e-4)


def test_bfloat16_goes_the_same_way_on_a_cpu(world: Path) -> None:
    exact, rounded = run(output="exact"), run("dtype=bfloat16", output="rounded")
    assert [line["domain/tokens"] for line in trained_steps(rounded)] == [
        line["domain/tokens"] for line in trained_steps(exact)
    ]
    last = [trained_steps(folder)[-1]["domain/kl"] for folder in (exact, rounded)]
    assert last[1] == pytest.approx(last[0], rel=0.2)
    full = run("dtype=bfloat16", "lora=null", "train.learning_rate=1e-3", output="full")
    dtypes = {tensor.dtype for tensor in load_file(full / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("lora", ["lora.rank=2", "lora=null"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(world: Path, family: str, lora: str) -> None:
    shutil.rmtree("base")
    shutil.rmtree("expert")
    make_adapter(world / "expert", make_checkpoint(world / "base", family))
    command = [word for word in align_command("train.max_steps=4") if word != "lora.rank=4"]
    assert cli.run([*command, lora, "start=base", "train.gradient_checkpointing=true"]) == 0
    assert start_of(Path("student"))["general"] == 0
    assert math.isfinite(trained_steps(Path("student"))[-1]["loss"])


@pytest.mark.slow
def test_mixed_precision_of_all_weights_is_proved_in_their_own(world: Path) -> None:
    """The default of a GPU: float32 weights, products in bfloat16. The result is compared as anybody opens it."""
    more = ["lora=null", "train.bf16=true", "train.learning_rate=1e-3", "train.max_steps=2", "start=base"]
    ended = dae(align_command(*more), world)  # with the fresh process
    assert ended.status == 0, ended.err


@pytest.mark.slow
def test_a_stopped_mixture_goes_on_with_its_experts(world: Path) -> None:
    """transformers publishes a mixture's experts under other names than they have in the model."""
    for folder, seed in (("base", 0), ("expert", 3)):
        shutil.rmtree(world / folder)
        make_checkpoint(world / folder, "mixtral", seed=seed)
    more = [*cut(8, 1), "lora=null", "start=base", "train.learning_rate=1e-3", "train.max_steps=6"]
    command = [word for word in align_command(*more, output="stopped") if word != "lora.rank=4"]
    stop = Signal("kd.training.trainer:RoutedTrainer.training_step", 4, signal.SIGTERM)
    assert dae(command, world, signals=[stop], proof=False).status == 143
    assert cli.run(command) == 0
    assert cli.run([*command, "--output", "one"]) == 0
    assert_same_student(Path("one"), Path("stopped"))
