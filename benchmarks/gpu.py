"""What a step of `dae align` costs on a GPU: a Mistral of 7B with random weights, LoRA, bfloat16, 2,048 tokens a row.

    python benchmarks/gpu.py                                # all of it, on the CUDA device that is there
    python benchmarks/gpu.py --device cpu --shape tiny      # the same code in small, to see that it runs

Ways to take the same step, each in a process of its own, in alternation:

    live          three roles on one backbone, each row through its teacher, chunked loss
    cached        the teachers' hidden states are read from a cache on disk
    three-model   student, expert and reference are three models; each row's teacher is chosen, full logits

Model FLOP utilisation counts matrix products of the model alone (no recomputation): per token 2 forward and 2 backward
for each weight of the student's frozen layers, 2 for a teacher's; of the output layer at response positions, in the
three-model way at all; and attention. The loss alone is timed for several chunk sizes, with Liger's fused loss beside
it where `liger_kernel` is installed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_ways import SHAPES, Shape, flops, time_losses, work

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("live", "cached", "three-model")
# Dense bfloat16, from the makers' data sheets; the first name that the device's name contains.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss, relative


def spawn(arguments: argparse.Namespace, worker: str) -> Any:
    """Run this script as a worker and return what it printed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", worker, "--shape", arguments.shape]
    command += ["--device", arguments.device, "--steps", str(arguments.steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{worker}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways in alternation. Raises ValueError where their first losses differ."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for repeat in range(arguments.repeats):
        for kind in KINDS:
            runs[kind].append(spawn(arguments, kind))
            seconds = runs[kind][-1]["seconds"]
            print(f"repeat {repeat + 1} of {arguments.repeats}, {kind}: {seconds:.3f} s a step", flush=True)
    first = [run["losses"][0] for of in runs.values() for run in of]
    if max(first) - min(first) > TOLERANCE[dtype_of(arguments.device)] * min(first):
        raise ValueError(f"the losses differ ({min(first):.5f} to {max(first):.5f}): these are not the same steps")
    losses = spawn(arguments, "losses")
    return {"runs": runs, "loss_seconds": losses, "device": device_name(arguments.device)}


def dtype_of(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def peak_tflops(name: str, given: float | None) -> float | None:
    return given or next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a page."""
    shape = Shape(**record["shape"])
    tokens, peak = shape.rows * shape.tokens, record["peak_tflops"]
    rows = []
    for kind, runs in record["runs"].items():
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        share = f"{flops(kind, shape) / median / (peak * 1e12):.1%}" if peak else "peak unknown"
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        spread = f"{median:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        rows.append(f"| {kind} | {spread} | {tokens / median:,.0f} | {share} | {memory:.1f} |")
    timed = [
        f"| {name} | {'not installed' if seconds is None else f'{1e3 * seconds:.1f}'} |"
        for name, seconds in record["loss_seconds"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"# A step on a GPU, {record['date']}",
        "",
        f"{record['device']}, {versions}. Mistral with random weights: {shape.layers} layers, width {shape.width},",
        f"vocabulary {shape.vocabulary:,}; LoRA rank {shape.lora_rank}, {shape.rows} rows of {shape.tokens:,} tokens,",
        f"{record['dtype']}, gradient checkpointing.",
        "",
        "| way | seconds a step | tokens/s | model FLOP utilisation | peak GB |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"The loss alone, {shape.rows * (shape.tokens - shape.prompt):,} response tokens, forward and backward:",
        "",
        "| loss | ms |",
        "|---|---|",
        *timed,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps in each process, after one warm-up step")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, if not known here")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=[*KINDS, "losses"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here. `--device cpu --shape tiny` runs the same code in small.", file=sys.stderr)
        raise SystemExit(2)
    shape, dtype = SHAPES[arguments.shape], dtype_of(arguments.device)
    if arguments.worker == "losses":
        print(json.dumps(time_losses(shape, arguments.device, dtype, arguments.steps)))
    elif arguments.worker:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(work(arguments.worker, shape, arguments.device, dtype, arguments.steps, Path(name))))
    else:
        name = device_name(arguments.device)
        record = {
            "date": dt.date.today().isoformat(),
            "versions": {one: version(one) for one in ("torch", "transformers", "peft")},
            "shape": asdict(shape),
            "dtype": dtype,
            "peak_tflops": peak_tflops(name, arguments.peak_tflops),
            **measure(arguments),
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output / "gpu.md").write_text(markdown(record))
        print(markdown(record))


if __name__ == "__main__":
    main()
