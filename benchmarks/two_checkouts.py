"""Whether two checkouts compute the same: losses of every step and SHA-256 of what runs publish, to the last bit.

    python benchmarks/two_checkouts.py OLD [NEW] [--work FOLDER]

OLD and NEW are folders with a checkout each (NEW: this one). The same pico world is given to both. Compared are

    runs      sft, distill (attention and hidden states too), align in three variants: every figure of metrics.jsonl but
              those of the clock, and the SHA-256 of all published safetensors files
    report    every number of report.json
    resumed   runs begun with OLD, stopped by SIGTERM after a checkpoint and gone on with by NEW, against OLD's own

Exit status: 0 where all is bit-identical, 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from golden_runs import REPORT, RUNS, figures, make_golden_world  # noqa: E402

RESUMED = ("sft", "distill-layers", "align-shared", "align-reference", "align-all-weights")
CLOCK = ("second", "memory", "time", "date")  # keys of report.json with any of these words are left out


def environment(checkout: Path) -> dict[str, str]:
    """One thread, nothing from a hub, and the packages of this checkout."""
    path = os.pathsep.join([str(checkout), str(checkout / "eval")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(checkout: Path, command: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """`dae` of a checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "dae", *command],
        cwd=cwd,
        env=environment(checkout),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(running: subprocess.Popen[str], statuses: Sequence[int], what: str) -> None:
    """Wait for the end. Raises RuntimeError for any status but these."""
    said, _ = running.communicate()
    if running.returncode not in statuses:
        raise RuntimeError(f"{what}: exit status {running.returncode}\n{said}")


def run_all(checkout: Path, world: Path) -> None:
    """Every run, and the report."""
    for name, command in RUNS.items():
        finish(start(checkout, [*command, "--output", name], world), (0,), f"{checkout}: {name}")
    finish(start(checkout, REPORT, world), (0, 1), f"{checkout}: report")


def begin(checkout: Path, name: str, world: Path) -> None:
    """Begin a run and stop it after its first checkpoint. Raises RuntimeError where it was not stopped in time."""
    running = start(checkout, [*RUNS[name], "--output", name], world)
    while running.poll() is None and not any((world / name / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    finish(running, (128 + signal.SIGTERM,), f"{checkout}: {name}, stopped")


def published(run: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file but those of checkpoints."""
    files = [file for file in sorted(run.rglob("*.safetensors")) if "checkpoints" not in file.parts]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in a report, with its place."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        if isinstance(value, (int, float)) and not any(word in key for word in CLOCK):
            yield key, value
        return
    for part, inside in parts:
        yield from numbers(inside, f"{key}.{part}")


def difference(old: Any, new: Any) -> str:
    """The first place at which two runs' figures differ; empty where none does."""
    if old == new:
        return ""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        return f"{keys[0]}: {old.get(keys[0])} -> {new.get(keys[0])}"
    if len(old) != len(new):
        return f"{len(old)} lines -> {len(new)} lines"
    return next(f"line {i}: {difference(a, b)}" for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)


def compare(what: str, run: str, old: Path, new: Path) -> list[str]:
    """Compare one run in two folders; prints a line, and returns what differs."""
    found = [difference(figures(old / run), figures(new / run)), difference(published(old / run), published(new / run))]
    found = [text for text in found if text]
    count = len(figures(old / run))
    sha256 = next(iter(published(old / run).values()))[:16]
    verdict = "; ".join(found) or f"bit-identical ({count} lines of metrics, SHA-256 {sha256}...)"
    print(f"{what:<8} {run:<18} {verdict}", flush=True)
    return found


def compare_reports(old: Path, new: Path) -> list[str]:
    """Compare every number of two reports."""
    one, two = (dict(numbers(json.loads((side / "report" / "report.json").read_text()))) for side in (old, new))
    found = [difference(one, two)] if one != two else []
    print(f"{'report':<8} {'report.json':<18} {found[0] if found else f'bit-identical ({len(one)} numbers)'}")
    return found


def main() -> int:
    """Run both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--work", type=Path, help="where the runs go; OLD's are kept and used again there")
    arguments = parser.parse_args()
    old, new = arguments.old.resolve(), arguments.new.resolve()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="two-checkouts-"))
    if not (work / "old-done").exists():
        shutil.rmtree(work, ignore_errors=True)
        make_golden_world(work / "world")
        shutil.copytree(work / "world", work / "old")
        shutil.copytree(work / "world", work / "begun")
        run_all(old, work / "old")
        for name in RESUMED:
            begin(old, name, work / "begun")
        (work / "old-done").touch()
    for side in ("new", "resumed"):
        shutil.rmtree(work / side, ignore_errors=True)
    shutil.copytree(work / "world", work / "new")
    shutil.copytree(work / "begun", work / "resumed")
    run_all(new, work / "new")
    found = [text for name in RUNS for text in compare("runs", name, work / "old", work / "new")]
    found += compare_reports(work / "old", work / "new")
    for name in RESUMED:
        finish(start(new, [*RUNS[name], "--output", name], work / "resumed"), (0,), f"{new}: {name}, resumed")
        found += compare("resumed", name, work / "old", work / "resumed")
    print("all bit-identical" if not found else f"{len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
