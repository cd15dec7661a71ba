"""What is measured inside each way's process: losses, CPU and wall time of each step, peak memory, the first step."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class EnoughError(Exception):
    """The last step is measured: what a run does after it is not our question."""


@dataclass
class Record:
    """One process. Times in seconds; `first_*`: from the start of the command to the end of the first step."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)
    step_wall: list[float] = field(default_factory=list)
    first_cpu: float = 0.0
    first_wall: float = 0.0
    imports_mib: float = 0.0
    peak_mib: float = 0.0
    steps_mib: float = 0.0  # the peak after the first step: what loading took, the checkpoint's pages too, is not in it


def cpu_seconds() -> float:
    """Of this process and the finished ones that it started."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def peak_mib() -> float:
    """Peak resident memory. From /proc where there is one: ru_maxrss counts what a parent held before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Let `peak_mib` start again from now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Probe(TrainerCallback):
    """Writes a Record after the last step's loss, and leaves by EnoughError.

    A step lasts from the end of the optimizer step before it to the end of its own: batches and logging are in it.
    """

    def __init__(self, steps: int, started: float, output: Path) -> None:
        """started: time.time() when the command was given. Made after the imports, whose memory is noted here."""
        self._steps = steps
        self._started = started
        self._output = output
        self._before: tuple[float, float] | None = None
        self.record = Record(imports_mib=peak_mib())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = cpu_seconds(), time.perf_counter()
        if self._before is None:
            self.record.first_cpu, self.record.first_wall = now[0], time.time() - self._started
            self.record.peak_mib = peak_mib()
            forget_peak()
        else:
            self.record.step_cpu.append(now[0] - self._before[0])
            self.record.step_wall.append(now[1] - self._before[1])
        self._before = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.record.losses.append(logs["loss"])
        self.record.gradient_norms.append(logs["grad_norm"])
        if len(self.record.losses) == self._steps:
            self.record.steps_mib = peak_mib()
            self.record.peak_mib = max(self.record.peak_mib, self.record.steps_mib)
            self._output.write_text(json.dumps(asdict(self.record)))
            raise EnoughError
