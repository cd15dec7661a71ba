"""On a CUDA device: the run of the CPU, in bfloat16, packed, checkpointed, split by FSDP2, quantised.

`make test-gpu` on a machine with one. DAE_GPU_TESTS=cpu runs the same on the CPU, so that only the device is new there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, cut, start_of, trained_steps
from pico import make_checkpoint
from processes import FSDP_ON_CPUS, dae, ranks
from worlds import align_command, make_adapter

from benchmarks.fsdp_on_cpus import FSDP2

ON_CPU = os.environ.get("DAE_GPU_TESTS") == "cpu"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or ON_CPU), reason="no CUDA device")

SIX = (*cut(8, 1), "train.max_steps=6", "start=base")
EXACT = "dtype=float32"
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
ATTENTION = ["sdpa", "eager", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]


def run(world: Path, *more: str, output: str, environment: Mapping[str, str] | None = None) -> Path:
    ended = dae(align_command(*SIX, *more, output=output), world, environment=environment)
    assert ended.status == 0, ended.err
    return Path(output)


def assert_alike(first: Path, second: Path, tolerance: float) -> None:
    """Losses and KL of every logged step."""
    for one, other in zip(trained_steps(first), trained_steps(second), strict=True):
        for key in ("loss", "grad_norm", "domain/kl", "domain/ntp"):
            assert other[key] == pytest.approx(one[key], rel=tolerance, abs=1e-5), key


@pytest.mark.parametrize("more", [["lora.rank=4", *HELD_OUT], ["lora=null", "train.learning_rate=1e-3"]], ids=str)
def test_the_device_gives_the_run_of_the_cpu(world: Path, more: list[str]) -> None:
    cpu = run(world, EXACT, *more, output="cpu", environment=WITHOUT_GPU)
    gpu = run(world, EXACT, *more, output="gpu")
    assert_alike(cpu, gpu, 1e-3)
    assert_same_student(cpu, gpu, 1e-3)


def test_bfloat16_goes_the_same_way(world: Path) -> None:
    exact, rounded = run(world, EXACT, output="exact"), run(world, "dtype=bfloat16", output="rounded")
    assert start_of(rounded)["general"] == 0.0  # the same weights on the same kernels
    assert_alike(exact, rounded, 0.1)


def test_all_weights_in_bfloat16_autocast(world: Path) -> None:
    """The default of a device that has bfloat16: float32 weights, matrix products in bfloat16."""
    more = ["lora=null", "train.learning_rate=1e-3"]
    exact = run(world, EXACT, *more, output="exact")
    assert_alike(exact, run(world, *more, output="mixed"), 0.1)


@pytest.mark.parametrize("attention", ATTENTION)
def test_packing_and_checkpointing_do_not_matter(world: Path, attention: str) -> None:
    """Flash attention where it is installed: it works in 16 bits only."""
    dtype, tolerance = ("dtype=bfloat16", 0.05) if attention.startswith("flash") else (EXACT, 1e-3)
    settings = [dtype, f"attn_implementation={attention}"]
    plain = run(world, *settings, output="plain")
    assert_alike(plain, run(world, *settings, "data.packing=true", output="packed"), tolerance)
    assert_alike(plain, run(world, *settings, "train.gradient_checkpointing=true", output="checkpointed"), tolerance)


@pytest.mark.parametrize("more", [["lora.rank=4"], ["lora=null", "train.learning_rate=1e-3"]], ids=str)
def test_fsdp2_on_one_device(world: Path, more: list[str]) -> None:
    plain = run(world, EXACT, *more, output="plain")
    plan = {**FSDP2, **({FSDP_ON_CPUS: "yes"} if ON_CPU else {})}
    (ended,) = ranks(align_command(*SIX, EXACT, *more, output="split"), world, [()], plan)
    assert ended.status == 0, ended.err
    assert "training on 1 process, FSDP2" in ended.err
    assert_alike(plain, Path("split"), 1e-4)
    assert_same_student(plain, Path("split"), 1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights(world: Path, quantization: str) -> None:
    """The reference is the quantised base, so that the untouched student is at 0 from it."""
    base = make_checkpoint(world / "base64", hidden_size=64, intermediate_size=128)
    make_adapter(world / "expert64", base)
    run(world, f"quantization={quantization}", "base=base64", "expert=expert64", output="small")
    assert start_of(Path("small"))["general"] == pytest.approx(0.0, abs=1e-6)
    losses = [step["loss"] for step in trained_steps(Path("small"))]
    assert len(losses) == 3 and all(0 < loss < start_of(Path("small"))["domain"] for loss in losses)
