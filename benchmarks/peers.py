"""`dae align` beside the trainers that people use: CPU time of a step, peak memory, time to the first step.

    make bench-peers                           # in an environment of its own, .venv-bench, with TRL
    python benchmarks/peers.py [--shape head backbone] [--repeats 3] [--no-growth] [--output benchmarks/results]
    python benchmarks/peers.py --shape tiny --repeats 1 --no-first-step --no-growth --output FOLDER     # the short form

Each way (benchmarks/peer_ways.py) trains in a process of its own, all in alternation, from the same checkpoint, with
the same LoRA, rows, order of rows, batches and optimizer. Ways that claim the same loss must show it at every step, to
1e-4, and the same gradient norms, to 1e-3; else nothing is written:

    next-token   dae-sft, trainer-sft, trl-sft
    routed       dae-align, dae-align-cached, three-models: general rows by the base, each domain's by its expert
    one teacher  dae-align-one-teacher, trl-gkd (lmbda 0, beta 0: forward KL to one expert on all rows)

All divide by the response tokens of the optimizer step, the routed ones within each route; no loss is converted.

A step's time is that between the ends of two optimizer steps; the first step is left out. CPU time is that of the whole
process. Memory is the peak above that after imports, until the last step's end; `weights` is what a way's weights take
of it. TRL's ways are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # run as a script, too

from benchmarks.peer_setting import FIRST_STEP_ONLY, MIB, SHAPES, SMALL, WAYS, Setting, available_ways  # noqa: E402

TOLERANCE = {"losses": 1e-4, "gradient_norms": 1e-3}
LEAST_LOSS = 1e-2  # losses of about nothing would agree with anything
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")

ONCE = ("dae-sft", "dae-align-one-teacher", "dae-align-auto")  # run in the first repeat only: it takes long
AGAINST_TRL = ("dae-align", "trl-sft", "trl-gkd")
FILE_ROWS = 1000  # of each file, where the time to the first step is measured

Run = dict[str, Any]
Result = dict[str, Any]


# What is varied, one thing at a time -> its ways and its settings, the smallest first.
GROWTH: dict[str, tuple[tuple[str, ...], list[Setting]]] = {
    "vocabulary": (AGAINST_TRL, [replace(SMALL, vocabulary=size) for size in (32_000, 128_000, 256_000)]),
    "rows": (AGAINST_TRL, [replace(SMALL, rows=rows) for rows in (4, 16)]),
    "tokens": (AGAINST_TRL, [replace(SMALL, tokens=tokens, prompt=tokens // 2) for tokens in (128, 512)]),
    "experts": (("dae-align", "three-models"), [replace(SMALL, rows=8, experts=experts) for experts in (1, 4)]),
}


def work(way: str, folder: Path, output: Path, started: float) -> None:
    """In a worker: train until the last step is measured, which writes the run's record to `output`.json."""
    from benchmarks import peer_ways

    setting = Setting.read(folder)

    def make_probe() -> Any:
        import torch

        from benchmarks.peer_probe import Probe

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return Probe(setting.steps, started, output.with_suffix(".json"))

    try:
        peer_ways.TRAIN[way](setting, folder, output, make_probe)
    except Exception as error:
        if type(error).__name__ != "EnoughError":  # naming its class would import transformers before the way does
            raise
    if not output.with_suffix(".json").is_file():
        raise RuntimeError(f"{way}: ended before the last step was measured")


def spawn(arguments: list[str], threads: int, hub: Path) -> str:
    """Run this script as a worker and return what it printed. hub: its empty cache of data sets."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # what `dae` sets; a spinning thread would count as work
        "HF_DATASETS_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def measure(setting: Setting, ways: Sequence[str], repeats: int, threads: int) -> Result:
    """All ways in alternation, `repeats` times. Raises ValueError where their losses differ."""
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = prepared(setting, folder, threads)
        if "dae-align-cached" in ways:
            began = time.perf_counter()
            spawn(["--worker", "fill", "--folder", name], threads, folder / "hub")
            facts["fill_seconds"] = time.perf_counter() - began
        for repeat in range(repeats):
            for way in [way for way in ways if repeat == 0 or way not in ONCE]:
                output = folder / f"run-{way}-{repeat}"
                worker = ["--worker", way, "--folder", name, "--run", str(output), "--started", str(time.time())]
                spawn(worker, threads, folder / f"hub-{way}-{repeat}")
                runs[way].append(json.loads(output.with_suffix(".json").read_text()))
                tell(setting, repeat, repeats, way, runs[way][-1])
    return result_of(setting, facts, runs, threads)


def result_of(setting: Setting, facts: dict[str, Any], runs: dict[str, list[Run]], threads: int) -> Result:
    """The record of one setting. Raises ValueError where losses or gradient norms differ."""
    differences = check_losses(runs)
    weights = {way: WAYS[way].weight_bytes(setting, facts["base_bytes"], facts["adapter_bytes"]) / MIB for way in runs}
    more = {"threads": threads, "weights_mib": weights, "largest_relative_differences": differences}
    return {"setting": asdict(setting), **facts, **more, "runs": runs}


def prepared(setting: Setting, folder: Path, threads: int) -> dict[str, Any]:
    setting.write(folder)
    printed = spawn(["--worker", "prepare", "--folder", str(folder)], threads, folder / "hub")
    facts: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return facts


def tell(setting: Setting, repeat: int, repeats: int, way: str, run: Run) -> None:
    steps = " ".join(f"{seconds:.2f}" for seconds in run["step_cpu"])
    memory = f"{run['peak_mib'] - run['imports_mib']:.0f} MiB"
    print(
        f"{setting.name} {repeat + 1}/{repeats} {way}: {steps} s CPU, {memory}, first {run['first_wall']:.1f} s",
        flush=True,
    )


def check_losses(runs: dict[str, list[Run]]) -> dict[str, float]:
    """The largest relative difference between ways that claim the same loss: of losses, of gradient norms.

    Raises ValueError where one is above its tolerance, or a loss is about 0.
    """
    largest = dict.fromkeys(TOLERANCE, 0.0)
    for loss in {WAYS[way].loss for way in runs}:
        alike = [(way, run) for way, of_way in runs.items() if WAYS[way].loss == loss for run in of_way]
        first_way, first = alike[0]
        if not min(first["losses"]) > LEAST_LOSS:
            raise ValueError(f"{first_way}: losses {first['losses']}: too small to compare")
        for way, run in alike[1:]:
            for what, tolerance in TOLERANCE.items():
                difference = max(abs(a - b) / b for a, b in zip(run[what], first[what], strict=True))
                if not difference <= tolerance:
                    words = f"{run[what]} and {first[what]}; these are not the same steps"
                    raise ValueError(f"{way} and {first_way}: {what}: {words}")
                largest[what] = max(largest[what], difference)
    return largest


def measure_growth(threads: int) -> dict[str, list[Result]]:
    """One run of each way at each setting; what several growths have in common is run once."""
    found: dict[str, list[Result]] = {}
    known: dict[tuple[Setting, tuple[str, ...]], Result] = {}
    for what, (wanted, settings) in GROWTH.items():
        ways = tuple(way for way in wanted if way in available_ways())
        for setting in settings:
            if (setting, ways) not in known:
                known[setting, ways] = measure(setting, ways, 1, threads)
            found.setdefault(what, []).append(known[setting, ways])
    return found


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := installed(name))}
    return {"cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(folder: Path, record: dict[str, Any]) -> None:
    """peers.json (every run), peers.md (the tables) and peers.svg into `folder`."""
    from benchmarks import peer_tables  # draws: workers shall not import that

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(record, indent=1) + "\n")
    peer_tables.write(record, folder)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=["head", "backbone"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--first-step", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--date", default=dt.date.today().isoformat())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=["prepare", "fill", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if chosen.worker is not None:
        as_worker(chosen)
        return
    record: dict[str, Any] = {"date": chosen.date, "machine": machine(), "shapes": []}
    for name in chosen.shape:
        record["shapes"].append(measure(SHAPES[name], available_ways(), chosen.repeats, chosen.threads))
        write(chosen.output, record)  # after each part: all of it takes long
    if chosen.first_step:
        record["first_step"] = measure_first_step(chosen.repeats, chosen.threads)
        write(chosen.output, record)
    if chosen.growth:
        record["growth"] = measure_growth(chosen.threads)
        write(chosen.output, record)
    print((chosen.output / "peers.md").read_text())


def measure_first_step(repeats: int, threads: int) -> Result:
    """From the command to the end of the first step, with files of FILE_ROWS rows: ours measures some of them first."""
    setting = replace(SHAPES["head"], name="first step", steps=1, file_rows=FILE_ROWS)
    wanted = ("dae-align", "dae-align-cached", "dae-sft", "trainer-sft", "trl-sft")
    ways = [way for way in available_ways() if way in wanted]
    return measure(setting, [*ways, *FIRST_STEP_ONLY], repeats, threads)


def as_worker(chosen: argparse.Namespace) -> None:
    if chosen.worker == "prepare":
        from benchmarks.peer_inputs import prepare

        print(json.dumps(prepare(Setting.read(chosen.folder), chosen.folder)))
    elif chosen.worker == "fill":
        from benchmarks.peer_ways import fill_cache

        fill_cache(chosen.folder)
    else:
        work(chosen.worker, chosen.folder, chosen.run, chosen.started)


if __name__ == "__main__":
    main()
