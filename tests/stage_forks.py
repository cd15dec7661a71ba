"""Stages of `dae run` as forks of a process that has imported everything, where real ones import for seconds each.

All else is as in dae/pipeline/stage_process.py: a process group, pipes and a lifeline of their own, the command line,
a status.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from processes import Signal


@dataclass
class Fork:
    """A forked stage, as dae.pipeline.stage_process.Child."""

    pid: int
    code: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


@dataclass(frozen=True)
class Forks:
    """To be armed in the process of `dae run`.

    to_stage: by the first word of a stage's command, a signal to the stage itself; to_pipeline: the same moments, but
    the signal goes to the process of `dae run`.
    """

    to_stage: Mapping[str, Signal] = field(default_factory=dict)
    to_pipeline: Mapping[str, Signal] = field(default_factory=dict)

    def arm(self) -> None:
        from dae.pipeline import stage_process

        setattr(stage_process, "start", self.start)  # noqa: B010

    def start(self, command: Sequence[str], lifeline: int, out: int, err: int, width: int) -> Fork:
        pipeline = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(command, lifeline, out, err, width, pipeline)
        return Fork(pid)

    def _become(self, command: Sequence[str], lifeline: int, out: int, err: int, width: int, pipeline: int) -> None:
        status = 99
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(out, 1)
            os.dup2(err, 2)
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor != lifeline:
                    try:
                        os.close(descriptor)
                    except OSError:
                        continue  # that of the listing
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ["COLUMNS"] = str(width)
            from dae import cli
            from dae.pipeline.stage_command import end_with

            end_with(lifeline)
            cli.prepare_process(os.environ)
            if command[0] in self.to_stage:
                self.to_stage[command[0]].arm()
            if command[0] in self.to_pipeline:
                send_to(pipeline, self.to_pipeline[command[0]])
            sys.argv = ["dae", *command]
            status = cli.run(command)
        except BaseException:  # noqa: BLE001 - nothing may come back into the pipeline's copy
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def send_to(pipeline: int, one: Signal) -> None:
    """Arm a signal of a stage so that it goes to the pipeline instead."""
    real, own = os.kill, os.getpid()
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        if pid != own or sent:  # a later one to itself is the lifeline's
            real(pid, number)
            return
        sent.append(number)
        real(pipeline, number)
        if number == signal.SIGKILL:
            signal.pause()  # until the lifeline ends this process, too

    setattr(os, "kill", kill)  # noqa: B010
    one.arm()
