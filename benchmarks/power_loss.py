"""Power loss while a run folder is written: what was not synced is lost, and the same command goes on to the same end.

    python benchmarks/power_loss.py [--cuts 60] [--seed 0] [--output benchmarks/results]      # needs strace

`dae align` runs once under strace. After every system call that changes or syncs its folder, folders are built as a
power loss may leave them (benchmarks/lost_writes.py): one without anything that was not synced, and several drawn from
the seed. All of them are read: a checkpoint whose place was synced must be there and whole, and a folder that says
"finished" must have all that it lists. From --cuts of them, drawn from the seed, the same command runs to its end,
which must be that of the undisturbed run. Figures go into soak.json and soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # run as a script, too

from benchmarks.lost_writes import Call, FileSystem, Folder, calls, record  # noqa: E402
from benchmarks.soak import Calm, Failure, Soak, write  # noqa: E402
from benchmarks.soak_targets import TARGETS, make_soak_world  # noqa: E402
from kd.runs.checkpoints import MANIFEST, checkpoint_fault  # noqa: E402

DRAWN = 7  # folders for each cut, beside the one that lost all that was not synced
# The command that was typed, and what the process has imported: another way of starting it.
OTHER_START = ("environment.json",)


def trace(one: Soak, log: Path) -> list[Call]:
    """The calls of one whole run. Raises Failure where it does not finish."""
    one.clear()
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    words = [*one.target.command, one.target.output.format(one.output.name)]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    ended = record([sys.executable, "-m", "dae", *words], one.world, environment, log)
    if ended.returncode != 0:
        raise Failure(f"under strace the run ends with status {ended.returncode}: {ended.stderr[-2000:]}")
    recorded = list(calls(log))
    system = FileSystem(one.output)
    for call in recorded:
        system.apply(call)
    files = {str(p.relative_to(one.output)): p.read_bytes() for p in one.output.rglob("*") if p.is_file()}
    if system.files() != files:
        raise Failure("the model of the file system ends otherwise than the file system")
    return recorded


class Lasting:
    """The checkpoints that a power loss may not take."""

    def __init__(self) -> None:
        self.newest = 0

    def note(self, system: FileSystem) -> None:
        """A checkpoint counts once its folder is in its place for good."""
        checkpoints = system.top.names.get("checkpoints")
        if isinstance(checkpoints, Folder):
            lasting = [name for _, name, entry in checkpoints.log[: checkpoints.synced] if entry is not None]
            steps = [int(name.removeprefix("step-")) for name in lasting if name.startswith("step-")]
            self.newest = max([self.newest, *steps])


def check(folder: Path, newest: int) -> None:
    """Raise Failure where a checkpoint that lasts is lost, or a folder says "finished" and is not whole."""
    whole = [
        int(place.name.removeprefix("step-"))
        for place in (folder / "checkpoints").glob("step-*")
        if (place / MANIFEST).exists() and checkpoint_fault(place) is None
    ]
    if newest and max(whole, default=0) < newest:
        raise Failure(f"the checkpoint of step {newest} was in its place, and is lost; whole ones: {sorted(whole)}")


def states(system: FileSystem, folder: Path, pick: random.Random) -> Iterator[str]:
    """Build one folder after the other; which it is."""
    system.build(folder, None)
    yield "nothing that was not synced"
    for number in range(DRAWN):
        system.build(folder, pick)
        yield f"drawn {number}"


def read_all(
    one: Soak, recorded: Sequence[Call], seed: int, cuts: int, kept: Path
) -> tuple[dict[str, int], list[Path]]:
    """Build and read the folders of every cut; keep `cuts` of them to go on from. Raises Failure."""
    system, lasting, pick = FileSystem(one.output), Lasting(), random.Random(seed)
    changing = count(one, recorded)
    wanted = set(pick.sample(range(changing * (DRAWN + 1)), min(cuts, changing * (DRAWN + 1))))
    figures = {"calls": 0, "folders": 0}
    found = []
    for call in recorded:
        if not system.apply(call):
            continue
        lasting.note(system)
        figures["calls"] += 1
        for state in states(system, one.output, pick):
            try:
                check(one.output, lasting.newest)
                one.check_finished()
            except Failure as failure:
                raise Failure(f"after call {figures['calls']} ({call.name}), {state}: {failure}") from failure
            if figures["folders"] in wanted:
                place = kept / f"{figures['calls']:05d}-{state.replace(' ', '-')}"
                shutil.copytree(one.output, place) if one.output.exists() else place.mkdir(parents=True)
                found.append(place)
            figures["folders"] += 1
    return figures, found


def count(one: Soak, recorded: Sequence[Call]) -> int:
    system = FileSystem(one.output)
    return sum(system.apply(call) for call in recorded)


def go_on(one: Soak, calm: Calm, places: Sequence[Path]) -> list[str]:
    """Run the command from each of the folders; what was lost."""
    failures = []
    for place in places:
        one.clear()
        shutil.copytree(place, one.output)
        try:
            one.check_end(one.run(), calm)
        except Failure as failure:
            failures.append(f"{place.name}: {failure}")
            print(f"FAILED from {place}: {failure}", flush=True)
    return failures


def power_loss(world: Path, cuts: int, seed: int, place: Path) -> dict[str, Any]:
    """Figures and failures."""
    one = Soak("align", TARGETS["align"], world)
    calm = one.calm()
    calm = replace(calm, not_compared=(*calm.not_compared, *(f"{one.output.name}/{name}" for name in OTHER_START)))
    recorded = trace(one, place / "calls.log")
    figures, found = read_all(one, recorded, seed, cuts, place / "cuts")
    return {**figures, "resumed": len(found), "seed": seed, "failures": go_on(one, calm, found)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=60, help="folders from which the command goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    place = Path(tempfile.mkdtemp(prefix="dae-power-loss-"))
    found = power_loss(make_soak_world(place / "world"), given.cuts, given.seed, place)
    found["command"] = f"python benchmarks/power_loss.py --cuts {given.cuts} --seed {given.seed}"
    write(given.output, power_loss=found)
    print(json.dumps(found, indent=2))
    if not found["failures"]:
        shutil.rmtree(place)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
