"""benchmarks/gpu.py, in small and on the CPU: its ways take the same step; without a device it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

SCRIPT = Path(gpu.__file__)


def test_it_runs_in_small_and_its_ways_have_one_loss(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--shape", "tiny", "--repeats", "1", "--steps", "2", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    losses = {kind: runs[0]["losses"] for kind, runs in record["runs"].items()}
    assert losses["live"][0] > 1e-3
    for kind in gpu.KINDS:
        assert losses[kind] == pytest.approx(losses["live"], rel=1e-4)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {kind} | " in page for kind in gpu.KINDS) and "ours, chunks of 256" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("no CUDA device") and "Traceback" not in done.stderr


def test_products_are_those_of_the_docstring() -> None:
    """7B: 7.2 billion weights, of which the input embedding is not multiplied by."""
    shape = gpu.SHAPES["7b"]
    head = shape.vocabulary * shape.width
    assert shape.layer_weights + 2 * head == pytest.approx(7.24e9, rel=0.01)
    step = {kind: gpu.flops(kind, shape) for kind in gpu.KINDS}
    assert step["cached"] < step["live"] < step["three-model"]
    assert step["live"] / step["cached"] == pytest.approx(1.5, rel=0.03)  # 3 units to 2


def test_the_peak_of_a_device() -> None:
    assert gpu.peak_tflops("NVIDIA H100 80GB HBM3", None) == 989 and gpu.peak_tflops("another", None) is None
    assert gpu.peak_tflops("another", 100.0) == 100.0
