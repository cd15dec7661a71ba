"""`kill -9` at random moments, hundreds of times: the same command goes on to the same end, and nothing is lost.

    python benchmarks/soak.py --kills 100 --seed 1 [--target align,sample] [--output benchmarks/results]

Each command runs as a process of its own in its own process group, forked from one that has imported everything
(tests/processes.py); the group gets SIGKILL. Moments are drawn from the seed: at a time within the duration of an
undisturbed run, or as soon as the n-th file or folder has appeared below the output. An output is killed one to four
times, then the same command runs to its end.

After every kill: no torn checkpoint, no earlier step than before, no kept file gone, and a folder that says "finished"
has all that it lists. At the end: exit status, names and SHA-256 of every file are those of the undisturbed run, and no
temporary file or lock is left. Times and memory in JSON files and cards are ignored. Files that differ between two
undisturbed runs are listed, and not compared. The check in a fresh process, which only reads, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # run as a script, too

from benchmarks.soak_targets import TARGETS, Marks, Target, make_soak_world  # noqa: E402

from claims import written  # noqa: E402  # isort: skip  (tests/, on the path by now)
from processes import Ended, Running  # noqa: E402  # isort: skip
from stage_forks import Forks  # noqa: E402  # isort: skip

from kd.runs.checkpoints import checkpoint_fault  # noqa: E402
from kd.runs.files import file_sha256  # noqa: E402

CLOCK = ("second", "memory", "time", "date", "flos")  # in keys of JSON files
# run.json has their SHA-256, which differ: cards report memory, and adapter configs list sets in any order.
LISTED = ("README.md", "adapter_config.json")
SETS = ("target_modules",)
LEFTOVERS = (".tmp", ".staging", ".publishing", ".drop-")
MOST_KILLS_OF_AN_OUTPUT = 4
HELD = "held by a live process"
POLL = 0.002


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: its status, seconds, how many paths appeared, and its files that are compared."""

    status: int
    seconds: float
    paths: int
    files: Mapping[str, str]
    not_compared: tuple[str, ...]


@dataclass(frozen=True)
class Moment:
    """When to kill: after so many seconds, or once so many paths have appeared."""

    seconds: float | None = None
    paths: int | None = None

    @property
    def words(self) -> str:
        return f"after {self.seconds:.3f} s" if self.seconds is not None else f"once {self.paths} paths had appeared"


class Failure(Exception):  # noqa: N818 - found, not raised by mistake
    """A run lost something, or ended differently."""


@dataclass
class Soak:
    """One target in its world."""

    name: str
    target: Target
    world: Path

    @property
    def output(self) -> Path:
        return self.world / f"out{self.target.suffix}"

    def start(self) -> Running:
        words = [*self.target.command, self.target.output.format(self.output.name)]
        armed: list[Any] = [Forks()] if self.target.forks else []
        self.phase_file.write_text("start")
        armed.append(Marks(str(self.phase_file), self.target.phases))
        return Running(words, self.world, signals=armed, proof=False)

    @property
    def phase_file(self) -> Path:
        return self.world.parent / "phase"

    def run(self) -> Ended:
        """To the end. The stage of a pipeline that was just killed may hold its folder for a moment."""
        while HELD in (ended := self.start().end()).err:
            time.sleep(0.1)
        return ended

    def clear(self) -> None:
        for place in written(self.output):
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    def paths(self) -> set[str]:
        found: set[str] = set()
        for place in written(self.output):
            found.add(place.name)
            for folder, folders, files in os.walk(place):
                found |= {os.path.join(folder, name) for name in (*folders, *files)}
        return found

    def watch(self, running: Running, until: Moment) -> int:
        """Wait for the moment or the end; how many paths have appeared."""
        seen: set[str] = set()
        begin = time.monotonic()
        while running.process.is_alive():
            if until.seconds is not None and time.monotonic() - begin >= until.seconds:
                break
            if until.seconds is None:
                with contextlib.suppress(FileNotFoundError):  # it has been renamed meanwhile
                    seen |= self.paths()
                if until.paths is not None and len(seen) >= until.paths:
                    break
            time.sleep(POLL)
        return len(seen)

    # -- the undisturbed run -------------------------------------------------------------------------------------------

    def calm(self) -> Calm:
        """Two undisturbed runs."""
        found = []
        for _ in range(2):
            self.clear()
            begin = time.monotonic()
            running = self.start()
            paths = self.watch(running, Moment())
            ended = running.end()
            if ended.status not in (0, 1):
                raise Failure(f"{self.name}: an undisturbed run ends with status {ended.status}: {ended.err}")
            found.append((ended.status, time.monotonic() - begin, paths, self.files()))
        (_, _, _, first), (status, seconds, paths, second) = found
        if first.keys() != second.keys():
            raise Failure(f"{self.name}: two undisturbed runs write {sorted(first.keys() ^ second.keys())}")
        differing = tuple(sorted(name for name in first if first[name] != second[name]))
        return Calm(status, seconds, paths, first, differing)

    def files(self) -> dict[str, str]:
        """SHA-256 of the content of every file of the output."""
        places = [file for place in written(self.output) for file in (place, *place.rglob("*")) if file.is_file()]
        return {str(file.relative_to(self.world)): content_sha256(file) for file in places}

    # -- kills ---------------------------------------------------------------------------------------------------------

    def kill_at(self, moment: Moment) -> str | None:
        """Start, and kill at the moment; the phase it was in, None where it had ended by then."""
        running = self.start()
        self.watch(running, moment)
        pid = running.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group of its own yet, or has ended
                os.kill(pid, signal.SIGKILL)
        ended = running.end()
        if HELD in ended.err:
            return None
        if ended.status not in (-signal.SIGKILL, 0, 1):
            raise Failure(f"status {ended.status}: {ended.err}")
        return self.phase_file.read_text().strip() if ended.status == -signal.SIGKILL else None

    def steps(self) -> dict[str, int]:
        """The newest checkpoint of every run folder. Raises Failure where one is torn."""
        newest: dict[str, int] = {}
        for checkpoint in sorted(self.world.glob(f"{self.output.name}/**/step-*")):
            if (fault := checkpoint_fault(checkpoint)) is not None:
                raise Failure(f"{checkpoint}: {fault}")
            newest[str(checkpoint.parent)] = int(checkpoint.name.removeprefix("step-"))
        return newest

    def kept(self) -> set[str]:
        found = (file for pattern in self.target.kept for file in self.output.glob(pattern))
        return {str(file) for file in found if not file.name.startswith(LEFTOVERS)}

    def check_finished(self) -> None:
        """Raise Failure where a folder that says "finished" lacks a file that it lists."""
        for record in self.world.glob(f"{self.output.name}/**/run.json"):
            for name, sha256 in json.loads(record.read_text())["files"].items():
                file = record.parent / name
                if not file.is_file() or (file.suffix == ".safetensors" and file_sha256(file) != sha256):
                    raise Failure(f"{record}: says finished, and {name} is not as it says")

    def check_end(self, ended: Ended, calm: Calm) -> None:
        """Raise Failure unless all is as in the undisturbed run."""
        if ended.status != calm.status:
            raise Failure(f"the end has status {ended.status}, not {calm.status}: {ended.err}")
        files = self.files()
        left = [name for name in files if Path(name).name.startswith(LEFTOVERS) or name.endswith(".lock")]
        if left:
            raise Failure(f"left over: {left}")
        if files.keys() != calm.files.keys():
            raise Failure(f"other files: {sorted(files.keys() ^ calm.files.keys())}")
        differing = [name for name in files if files[name] != calm.files[name] and name not in calm.not_compared]
        if differing:
            raise Failure(f"other content: {differing}")

    def one_output(self, calm: Calm, moments: Sequence[Moment]) -> Iterator[tuple[Moment, str]]:
        """Kill a new output at each moment, then let it end; yields moment and phase of each kill."""
        self.clear()
        steps: dict[str, int] = {}
        kept: set[str] = set()
        for moment in moments:
            phase = self.kill_at(moment)
            if phase is None:
                break
            yield moment, phase
            now = self.steps()
            lost = [place for place, step in steps.items() if now.get(place, 0) < step]
            if lost or not kept <= self.kept():
                raise Failure(f"lost: {lost or sorted(kept - self.kept())}")
            steps, kept = now, self.kept()
            self.check_finished()
        self.check_end(self.run(), calm)


def content_sha256(file: Path) -> str:
    """Of a file's bytes; of JSON and model cards, without what depends on the clock and the machine."""
    if file.suffix not in (".json", ".jsonl", ".md"):
        return file_sha256(file)
    text = file.read_text()
    if file.suffix == ".md":
        lines = [line for line in text.splitlines() if not any(word in line for word in CLOCK)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    values = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    return hashlib.sha256(json.dumps(without_clock(values), sort_keys=True).encode()).hexdigest()


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        kept = (key for key in value if key not in LISTED and not any(word in key for word in CLOCK))
        return {key: sorted(value[key]) if key in SETS else without_clock(value[key]) for key in kept}
    return [without_clock(part) for part in value] if isinstance(value, list) else value


def draw(pick: random.Random, calm: Calm) -> Moment:
    if pick.random() < 0.5:
        return Moment(seconds=pick.uniform(0, calm.seconds))
    return Moment(paths=pick.randint(1, calm.paths))


def soak(name: str, world: Path, kills: int, seed: int, failed: Path) -> dict[str, Any]:
    """Kill one target so many times; figures and failures."""
    one, pick = Soak(name, TARGETS[name], world), random.Random(f"{seed} {name}")
    calm = one.calm()
    done, phases, kinds, outputs, failures = 0, Counter[str](), Counter[str](), 0, []
    while done < kills:
        moments = [draw(pick, calm) for _ in range(min(pick.randint(1, MOST_KILLS_OF_AN_OUTPUT), kills - done))]
        history = []
        outputs += 1
        try:
            for moment, phase in one.one_output(calm, moments):
                done += 1
                phases[phase] += 1
                kinds["aimed" if moment.seconds is None else "random"] += 1
                history.append(f"{moment.words} ({phase})")
        except Failure as failure:
            place = failed / f"{name.replace(' ', '-')}-{outputs}"
            for kept in written(one.output):
                to = place / kept.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copytree(kept, to) if kept.is_dir() else shutil.copy2(kept, to)
            failures.append({"output": outputs, "kills": history, "words": str(failure)})
            print(f"FAILED {name}, seed {seed}, output {outputs}, killed {history}: {failure}\n  kept in {place}")
    print(f"{name}: {done} kills of {outputs} outputs, {len(failures)} failures; {dict(phases)}", flush=True)
    return {
        "kills": done,
        "outputs": outputs,
        "random": kinds["random"],
        "aimed": kinds["aimed"],
        "phases": dict(phases.most_common()),
        "seconds_undisturbed": round(calm.seconds, 1),
        "files_compared": len(calm.files) - len(calm.not_compared),
        "not_compared": list(calm.not_compared),
        "failures": failures,
    }


def page(record: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Nothing lost", ""]
    if "targets" in record:
        lines += kills_lines(record["targets"])
    if "power_loss" in record:
        lines += power_loss_lines(record["power_loss"])
    return "\n".join(lines)


def kills_lines(targets: Mapping[str, Any]) -> list[str]:
    lines = [
        "## kill -9 at random moments",
        "",
        *(f"    {command}" for command in dict.fromkeys(one["command"] for one in targets.values())),
        "",
        "Each output was killed one to four times, then the same command ran to its end. Compared with an undisturbed",
        "run: exit status, names of all files, SHA-256 of their content.",
        "",
        "| target | date | kills | random, aimed | outputs | files compared | something lost | phases of the kills |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in targets.items():
        phases = ", ".join(f"{phase} {count}" for phase, count in one["phases"].items())
        kinds, lost = f"{one['random']}, {one['aimed']}", len(one["failures"])
        cells = (name, one["date"], one["kills"], kinds, one["outputs"], one["files_compared"], lost, phases)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kills, lost = sum(one["kills"] for one in targets.values()), sum(len(one["failures"]) for one in targets.values())
    aside = sorted({Path(name).name for one in targets.values() for name in one["not_compared"]})
    return [
        *lines,
        "",
        f"{kills} kills in all, {lost} outputs ended otherwise. Phases are those of the functions in soak_targets.py;",
        "`start`: before the command begins, `other`: between them. Not compared, as two undisturbed runs differ:",
        f"{', '.join(aside) or 'nothing'}.",
        "",
    ]


def power_loss_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        "## Power loss",
        "",
        f"`{found['command']}`",
        "",
        f"`dae align` made {found['calls']} system calls that change or sync its folder. After each, folders were",
        f"built that lack what was not synced: {found['folders']} in all. None had lost a checkpoint that was in its",
        f"place, or said finished and was not whole. From {found['resumed']} of them the command ran on:",
        f"{len(found['failures'])} ended otherwise than the undisturbed run.",
        "",
    ]


def write(output: Path, targets: Mapping[str, Any] | None = None, power_loss: Mapping[str, Any] | None = None) -> None:
    """Put figures into the results; those of other targets stay."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "soak.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if targets is not None:
        known = record.get("targets", {}) | targets
        record["targets"] = {name: known[name] for name in TARGETS if name in known}
    if power_loss is not None:
        record["power_loss"] = power_loss
    file.write_text(json.dumps(record, indent=2) + "\n")
    (output / "soak.md").write_text(page(record))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default=",".join(TARGETS), help="names, comma-separated (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    names = given.target.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--target: unknown: {', '.join(unknown)}; one of {', '.join(TARGETS)}")
    place = Path(tempfile.mkdtemp(prefix="dae-soak-"))
    world = make_soak_world(place / "world")
    facts = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": f"python benchmarks/soak.py --kills {given.kills} --seed {given.seed}",
    }
    failures = 0
    for name in names:
        found = soak(name, world, given.kills, given.seed, place / "failed")
        write(given.output, targets={name: facts | found})
        failures += len(found["failures"])
    if not failures:
        shutil.rmtree(place)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
