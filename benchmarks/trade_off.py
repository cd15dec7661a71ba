"""What different ways to a student give on the domain and cost elsewhere: the trade-off, in miniature.

    python benchmarks/trade_off.py [--jobs 2] [--seeds 0 1 2] [--parts alignment distillation mixture]
        [--pairs world real] [--demo-runs runs/demo_seeds] [--real-runs runs/real_pair] [--shared ../shared]
        [--work runs/trade_off] [--output benchmarks/results]
    python benchmarks/trade_off.py --results-only   # tables and picture anew, from what is finished

- alignment: DAE against next-token loss on the same mixed rows and on domain rows alone, and against merges, over the
  share or weight of domain rows or the merge's coefficient;
- distillation: KD from a larger teacher against next-token loss on the same rows, with and without attention loss;
- mixture: the mixture of base and expert against the dense base, as the student of `dae align`.

On the embedded world and on stories260k with product questions. Both sides of every comparison have equal rows and
steps; each has its learning rate chosen by the same search on validation documents, with the first seed. Finished runs
of `dae demo` and real_pair.py are used where they lie. Every run is a job; what is finished is passed over, so the same
call goes on after a stop, and results are written anew after every run from what is there. Ctrl-C or SIGTERM stop it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.trade_off_commands import Command, Job, jobs, making
from benchmarks.trade_off_plan import BLOCKS, ENDS, GRID, Plan, Rates, grid_runs, planned_runs, tuned_ways
from benchmarks.trade_off_plot import write_picture
from benchmarks.trade_off_scores import chosen_rates, collect, grids, tuning
from benchmarks.trade_off_tables import markdown
from kd.runs.files import write_text_durably

PACKAGES = ("torch", "transformers", "peft", "mergekit", "lm-eval")
STOPPED = 130
RESULTS_AFTER = ("score-", "validate-")
PARTS = tuple(dict.fromkeys(part for part, _, _ in BLOCKS))
PAIRS = tuple(dict.fromkeys(pair for _, pair, _ in BLOCKS))


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Which jobs run or have ended, shared by the workers; `changed` is held while it is looked at."""

    running: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    writing: threading.Lock = field(default_factory=threading.Lock)


def run_all(plan: Plan, workers: int, output: Path) -> list[str]:
    """Run all jobs, so many at a time. Returns the names of those that failed or could not start."""
    progress = Progress()
    threads = [threading.Thread(target=work, args=(plan, output, progress), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():  # a join without a timeout would not hear Ctrl-C
                thread.join(timeout=1.0)
    except KeyboardInterrupt:
        stop(progress, threads)
        raise
    planned = jobs_now(plan)
    return [job.name for job in planned if job.name not in progress.done]


def stop(progress: Progress, threads: Sequence[threading.Thread]) -> None:
    """Let running commands end with a checkpoint: nobody can go on in a folder that a live process holds."""
    progress.stopped = True
    for process in list(progress.processes.values()):
        process.terminate()
    for thread in threads:
        thread.join()


def work(plan: Plan, output: Path, progress: Progress) -> None:
    """One worker: takes the most wanted job that can start, until there is none and none can come."""
    while True:
        with progress.changed:
            job = take(plan, progress)
            while job is None and progress.running and not progress.stopped:
                progress.changed.wait()
                job = take(plan, progress)
            if job is None or progress.stopped:
                progress.changed.notify_all()
                return
            progress.running.add(job.name)
        finished = all(run_logged(plan, job.name, command, progress) for command in job.commands)
        with progress.changed:
            progress.running.remove(job.name)
            (progress.done if finished else progress.failed).add(job.name)
            if finished:
                write_note(plan, job)
            outcome = "done" if finished else f"FAILED: {log_file(plan, job.name)}"
            print(f"{datetime.now():%H:%M:%S}  {job.name}  {outcome}", flush=True)
            progress.changed.notify_all()
        if finished and job.name.startswith(RESULTS_AFTER):
            with progress.writing:
                write_results(plan, output)


def take(plan: Plan, progress: Progress) -> Job | None:
    """The first job of the plan that is not finished, not running, and whose inputs are there."""
    for job in jobs_now(plan):
        if job.name in progress.done | progress.running | progress.failed:
            continue
        if is_finished(plan, job):
            progress.done.add(job.name)
        elif progress.done.issuperset(job.after):
            return job
    return None


def jobs_now(plan: Plan) -> list[Job]:
    """The jobs that can be named with the scores that are there."""
    tuned = tuning(plan)
    return jobs(plan, chosen_rates(tuned), grids(tuned))


def is_finished(plan: Plan, job: Job) -> bool:
    """Whether an earlier call has finished this job, with these very commands."""
    if job.made:
        return all(path.exists() for path in job.made)
    note = note_file(plan, job)
    return note.is_file() and note.read_text(encoding="utf-8") == note_of(job)


def write_note(plan: Plan, job: Job) -> None:
    note_file(plan, job).parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(note_file(plan, job), note_of(job))


def note_of(job: Job) -> str:
    return "".join(f"{shlex.join(command)}\n" for command in job.commands)


def note_file(plan: Plan, job: Job) -> Path:
    return plan.work / "finished" / f"{job.name}.txt"


def log_file(plan: Plan, name: str) -> Path:
    return plan.work / "logs" / f"{name}.log"


def run_logged(plan: Plan, name: str, command: Command, progress: Progress) -> bool:
    """Run one command in one thread of computation, its output at the end of the job's log."""
    if progress.stopped:
        return False
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {"OMP_NUM_THREADS": "1", **offline, **os.environ}
    log_file(plan, name).parent.mkdir(parents=True, exist_ok=True)
    with log_file(plan, name).open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        with subprocess.Popen(as_process(command), env=environment, stdout=log, stderr=log) as process:
            progress.processes[name] = process
            status = process.wait()
    del progress.processes[name]
    return status == 0


def as_process(command: Command) -> list[str]:
    """A command as printed, as arguments of a process in this interpreter."""
    if command[0] == "dae":
        return [sys.executable, "-m", "dae", *command[1:]]
    return [sys.executable, *command[1:]]


# -- results -----------------------------------------------------------------------------------------------------------


def write_results(plan: Plan, output: Path) -> None:
    """Write trade_off.json, .md, .svg and .png from the scores that are there, whichever parts are being run."""
    found = collect(replace(plan, parts=PARTS, pairs=PAIRS))
    if not found["results"]:
        return
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "grid": list(GRID),
        "trial_steps": plan.steps,
        **found,
        "commands": example_commands(replace(plan, parts=PARTS, pairs=PAIRS), chosen_rates(found["tuning"])),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_picture(record, output)
    write_text_durably(output / "trade_off.json", json.dumps(record, indent=1) + "\n")
    write_text_durably(output / "trade_off.md", markdown(record))


def example_commands(plan: Plan, rates: Rates) -> list[str]:
    """One command of each kind, with the first seed, as they read with the default folders."""
    usual = arguments([])
    places = {"shared": usual.shared, "work": usual.work, "demo_runs": usual.demo_runs, "real_runs": usual.real_runs}
    first = replace(plan, seeds=plan.seeds[:1], **places)
    known = dict.fromkeys(tuned_ways(first), GRID[1]) | dict(rates)
    planned = jobs(first, known, {})
    runs = [run for run in planned_runs(first, known) if run.way not in ENDS]
    made = {run.name for pair, way in tuned_ways(first) for run in grid_runs(first, pair, way)} | {r.name for r in runs}
    scoring = [job for job in planned if job.name.startswith(RESULTS_AFTER)]
    found = [command for job in planned if job.name not in made and job not in scoring for command in job.commands]
    found += {(run.pair, run.way): making(first, run) for run in reversed(runs)}.values()
    found += {(job.name.split("-")[0], job.commands[0][1]): job.commands[0] for job in scoring}.values()
    return [shlex.join(command) for command in found]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the real model and rows")
    parser.add_argument("--demo-runs", type=Path, default=Path("runs/demo_seeds"), help="runs of demo_seeds.py")
    parser.add_argument("--real-runs", type=Path, default=Path("runs/real_pair"), help="runs of real_pair.py")
    parser.add_argument("--work", type=Path, default=Path("runs/trade_off"), help="where runs, scores and logs go")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--steps", type=int, help="steps of every training here, for a trial of the script")
    parser.add_argument("--limit", type=int, default=600, help="first documents of each task of the real pair")
    parser.add_argument("--results-only", action="store_true", help="run nothing, write the results anew")
    return parser.parse_args(words)


def main() -> int:
    """Run the plan; exit status 1 where a job failed."""
    given = arguments()
    plan = Plan(
        shared=given.shared,
        work=given.work,
        demo_runs=given.demo_runs,
        real_runs=given.real_runs,
        seeds=tuple(given.seeds),
        parts=tuple(given.parts),
        pairs=tuple(given.pairs),
        steps=given.steps,
        limit=given.limit,
    )
    if given.results_only:
        write_results(plan, given.output)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with the first one ignored
        signal.signal(number, signal.default_int_handler)
    try:
        failed = run_all(plan, given.jobs, given.output)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
