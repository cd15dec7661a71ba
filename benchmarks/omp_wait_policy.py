"""What it costs that OpenMP's threads spin while they wait, alone and beside busy neighbours on the same cores.

    python benchmarks/omp_wait_policy.py [--repeats 4] [--steps 15]

The same optimizer steps of a small transformer with two threads, each time in a process of its own, on two cores:

    default   OMP_WAIT_POLICY is not set: libgomp's threads spin for a while, then sleep
    ACTIVE    they spin as long as libgomp lets them
    PASSIVE   they sleep; what `dae` sets unless the user chose otherwise

The three follow each other within a repeat, in an order that turns from repeat to repeat; a ratio is between runs of
the same repeat. `beside neighbours` has one endless Python loop on each of the two cores.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ("default", "ACTIVE", "PASSIVE")
SITUATIONS = ("alone", "beside neighbours")
THREADS = 2

Runs = dict[str, dict[str, list[dict[str, float]]]]


def work(steps: int) -> dict[str, float]:
    """Take the steps; wall and CPU seconds of one, without the first."""
    import torch
    from torch import nn

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(128, 4, 384, dropout=0.0, batch_first=True) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(512, 128), *layers, nn.Linear(128, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(512, (4, 96))
    wall = cpu = 0.0
    for step in range(steps + 1):
        if step == 1:
            wall, cpu = time.perf_counter(), time.process_time()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"wall": (time.perf_counter() - wall) / steps, "cpu": (time.process_time() - cpu) / steps}


def measured(policy: str, steps: int, cores: Sequence[int]) -> dict[str, float]:
    """The steps in a process of their own."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["OMP_NUM_THREADS"] = str(THREADS)
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    ran = subprocess.run(
        [sys.executable, __file__, "--work", "--steps", str(steps)],
        env=environment, capture_output=True, text=True, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


@contextmanager
def neighbours(cores: Sequence[int]) -> Iterator[None]:
    """A busy loop on each core."""
    busy = []
    try:
        for core in cores:
            # It ends with this process, however that ends.
            code = (
                f"import os; os.sched_setaffinity(0, [{core}])\nwhile os.getppid() == {os.getpid()}: sum(range(10**5))"
            )
            busy.append(subprocess.Popen([sys.executable, "-c", code]))
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(repeats: int, steps: int, cores: Sequence[int]) -> Iterator[Runs]:
    """All runs so far, after each repeat: situation -> policy -> one entry for each repeat."""
    runs: Runs = {situation: {policy: [] for policy in POLICIES} for situation in SITUATIONS}
    for repeat in range(repeats):
        turn = repeat % len(POLICIES)
        order = [*POLICIES[turn:], *POLICIES[:turn]]
        for situation in SITUATIONS:
            with neighbours(cores if situation == "beside neighbours" else []):
                for policy in order:
                    runs[situation][policy].append(measured(policy, steps, cores))
                    print(repeat, situation, policy, runs[situation][policy][-1], file=sys.stderr)
        yield runs


def table(runs: Runs) -> str:
    """Medians in ms, and ratios to PASSIVE with their range."""
    lines = [
        "| situation | policy | wall ms a step | to PASSIVE | CPU ms a step | to PASSIVE |",
        "|---|---|---|---|---|---|",
    ]
    for situation, policies in runs.items():
        for policy, found in policies.items():
            cells = [situation, policy]
            for kind in ("wall", "cpu"):
                mine, passive = ([run[kind] for run in some] for some in (found, policies["PASSIVE"]))
                ratios = [a / b for a, b in zip(mine, passive, strict=True)]
                cells.append(f"{1000 * statistics.median(mine):.0f}")
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def written(runs: Runs, repeats: int, steps: int, day: dt.date) -> str:
    """The page of results."""
    return f"""# Threads that spin while they wait, {day}

    python benchmarks/omp_wait_policy.py --repeats {repeats} --steps {steps}

A transformer of 4 layers and width 128, {steps} optimizer step(s) of 4 x 96 tokens,
after one that is not counted, with {THREADS} threads on two virtual
cores; torch {version("torch")}. Medians over {repeats} repeats; ratios are to PASSIVE in the same repeat (range). The
machine was shared with others' work all the time: `alone` means without neighbours of ours.

{table(runs)}
"""


def main() -> None:
    """Measure, and write results/omp_wait_policy.md; with --work, be the process that is measured."""
    parser = argparse.ArgumentParser(description="the cost of spinning OpenMP threads")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.steps)))
        return
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    day = dt.datetime.now(dt.UTC).date()
    for repeats, runs in enumerate(measure(arguments.repeats, arguments.steps, cores), start=1):
        page = written(runs, repeats, arguments.steps, day)
        (ROOT / "benchmarks" / "results" / "omp_wait_policy.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
