"""What one optimizer step of `dae align` costs, beside the straightforward way to write it.

    python benchmarks/step_cost.py [--shape head|backbone|all] [--threads 1 2] [--repeats 3] [--steps 2]

Five ways to take the same step, each in a process of its own, in alternation:

    ours             kd.training.objective: three roles on one backbone, each row through its teacher, chunked loss
    both-divergences student, expert and reference are three models; both teachers see all rows; full logits; each
                     teacher's divergence (torch.nn.functional.kl_div) is taken on all rows and then masked
    straightforward  the same, but each row's teacher is chosen before the one divergence: half the softmax work
    lean             the same again, but softmax and divergence at response positions only: the best it can be
                     with three models and full logits
    student-only     our loss with the teachers' hidden states given: what any training with this loss needs at least

All start from the same checkpoint and the same expert (a LoRA adapter; the straightforward ways merge it into a
model of its own), take the same rows, and must show the same losses to 1e-4 at every optimizer step, else nothing is
reported.

The arithmetic bound is the ratio of floating-point operations in matrix products and attention, counted from the real
steps with torch's FlopCounterMode. By hand, for a backbone whose forward pass is 1 unit: the student with LoRA costs 2
(forward, and the gradient of the activations; frozen weights need none), a teacher 1 for all rows. Straightforward is
2 + 1 + 1 = 4, ours 2 + 1 = 3 since each row has one teacher. Of the head's products, straightforward has 4 (student
forward and backward, two teachers) over all positions, ours 3 over the response positions.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("head", "backbone", "tiny")  # benchmarks.step_ways says what they are
KINDS = ("ours", "both-divergences", "straightforward", "lean", "student-only")
MEASURED = ("cpu_seconds", "wall_seconds", "peak_mib")
LOSS_TOLERANCE = 1e-4


def prepare(shape_name: str, folder: Path) -> dict[str, Any]:
    """Write what the ways start from into `folder`; returns the shape and each way's operations per step."""
    from benchmarks import step_ways

    shape = step_ways.SHAPES[shape_name]
    step_ways.prepare(shape, folder)
    return {"shape": asdict(shape), "flops": {kind: step_ways.count_flops(kind, shape, folder) for kind in KINDS}}


def work(kind: str, shape_name: str, folder: Path, threads: int, steps: int) -> dict[str, Any]:
    """One warm-up step, then `steps` measured ones: CPU and wall seconds per step, MiB above imports."""
    import torch

    from benchmarks import step_ways

    torch.set_num_threads(threads)
    after_imports = resource.getrusage(resource.RUSAGE_SELF)
    step = step_ways.optimizer_steps(kind, step_ways.SHAPES[shape_name], folder)
    losses = [step()]
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    losses += [step() for _ in range(steps)]
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "losses": losses,
        "cpu_seconds": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / steps,
        "system_seconds": (after.ru_stime - before.ru_stime) / steps,
        "wall_seconds": wall / steps,
        "peak_mib": (after.ru_maxrss - after_imports.ru_maxrss) / 1024,
    }


def spawn(arguments: list[str], threads: int) -> Any:
    """Run this script as a worker and return what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins while another process has its core would count as work
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape_name: str, threads: int, repeats: int, steps: int) -> dict[str, Any]:
    """All kinds in alternation, `repeats` times. Raises ValueError when their losses differ by more than 1e-4."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        common = ["--shape", shape_name, "--folder", name, "--threads", str(threads), "--steps", str(steps)]
        prepared = spawn(["--worker", "prepare", *common], threads)
        for repeat in range(repeats):
            for kind in KINDS:
                run = spawn(["--worker", kind, *common], threads)
                runs[kind].append(run)
                what = f"{shape_name}, {threads} threads, repeat {repeat + 1} of {repeats}, {kind}"
                print(f"{what}: {run['cpu_seconds']:.2f} s CPU, {run['peak_mib']:.0f} MiB", flush=True)
    return {**prepared, "threads": threads, "steps": steps, "runs": runs, **summary(prepared["flops"], runs)}


def summary(flops: Mapping[str, int], runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios to ours, repeat by repeat (neighbours in time, so that what else the machine does cancels)."""
    losses = runs["ours"][0]["losses"]
    every = [run["losses"] for kind in KINDS for run in runs[kind]]
    difference = max(abs(a - b) / b for other in every for a, b in zip(other, losses, strict=True))
    if not difference <= LOSS_TOLERANCE:
        raise ValueError(f"the losses differ by {difference:.1e} of their size; these are not the same steps")
    ratios: dict[str, dict[str, Any]] = {}
    for kind in KINDS[1:]:
        ratios[kind] = {"arithmetic": flops[kind] / flops["ours"]}
        for what in MEASURED:
            ratios[kind][what] = _spread([a[what] / b[what] for a, b in zip(runs[kind], runs["ours"], strict=True)])
    return {"largest_relative_loss_difference": difference, "ratio_to_ours": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(date: str, results: list[dict[str, Any]]) -> str:
    """The results as a Markdown page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    difference = max(result["largest_relative_loss_difference"] for result in results)
    rows = [_table_row(result, kind) for result in results for kind in KINDS]
    return f"""# Cost of one step, {date}

{os.cpu_count()} CPU cores, fp32, {versions}. Ratios to ours, repeat by repeat: median (min to max).
Memory is the peak above that after imports. Largest relative difference between two losses: {difference:.1e}.

| shape | threads | way | CPU s per step | peak MiB | arithmetic | CPU time | wall time | memory |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _table_row(result: Mapping[str, Any], kind: str) -> str:
    def median(what: str) -> float:
        return statistics.median(run[what] for run in result["runs"][kind])

    cells = [result["shape"]["name"], str(result["threads"]), kind]
    cells += [f"{median('cpu_seconds'):.2f}", f"{median('peak_mib'):.0f}"]
    if kind == "ours":
        cells += ["1"] * 4
    else:
        ratio = result["ratio_to_ours"][kind]
        spread = "{median:.2f} ({min:.2f} to {max:.2f})"
        cells += [f"{ratio['arithmetic']:.2f}", *(spread.format(**ratio[what]) for what in MEASURED)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["all", *SHAPES], default="all", help="all: head and backbone")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured steps in each process, after one warm-up step")
    parser.add_argument("--date", default=dt.date.today().isoformat())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=["prepare", *KINDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "prepare":
        print(json.dumps(prepare(arguments.shape, arguments.folder)))
    elif arguments.worker is not None:
        run = work(arguments.worker, arguments.shape, arguments.folder, arguments.threads[0], arguments.steps)
        print(json.dumps(run))
    else:
        names = ["head", "backbone"] if arguments.shape == "all" else [arguments.shape]
        results = [measure(n, t, arguments.repeats, arguments.steps) for n in names for t in arguments.threads]
        write(arguments.output, arguments.date, results)


def write(folder: Path, date: str, results: list[dict[str, Any]]) -> None:
    """step_cost.json (every run) and step_cost.md (the table) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"date": date, "python": platform.python_version(), "torch": version("torch"), "results": results}
    (folder / "step_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "step_cost.md").write_text(table(date, results))
    print(table(date, results))


if __name__ == "__main__":
    main()
