"""`dae` from outside, as a process, without importing torch anew each time.

A server process imports everything once and forks a child for every command. The child is an ordinary process with its
own output, exit status and signals; killing it is killing `dae`.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[1]
PRELOADED = ["dae.alignment", "kd.stages.sft", "transformers.models.llama.modeling_llama"]
PATIENCE = 120  # seconds after which a command of a few steps is given up as hung
FSDP_ON_CPUS = "FSDP_ON_CPUS"  # in a command's environment: accelerate shards over its CPU processes
_numbers = itertools.count()


@dataclass(frozen=True)
class Signal:
    """A signal to the process itself, before the `call`-th call of `module:attribute` (or after it).

    name: count only calls whose last argument is a path of this name.
    """

    where: str
    call: int = 1
    number: int = signal.SIGKILL
    after: bool = False
    name: str | None = None

    def arm(self) -> None:
        """Put it in place, in the process that is to get it."""
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        real = getattr(owner, attribute)
        calls = 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            counts = self.name is None or Path(arguments[-1]).name == self.name
            calls += counts
            now = counts and calls == self.call
            if now and not self.after:
                os.kill(os.getpid(), self.number)
            answer = real(*arguments, **named)
            if now and self.after:
                os.kill(os.getpid(), self.number)
            return answer

        setattr(owner, attribute, counted)


class Armed(Protocol):
    """What changes a process before it runs a command: a Signal, a fault."""

    def arm(self) -> None: ...


@dataclass(frozen=True)
class Ended:
    """How a command ended. A status below 0 is the signal that ended it."""

    status: int
    out: str
    err: str


class Running:
    """A command under way.

    proof False leaves out the fresh process that loads the finished result: five seconds of imports.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        *,
        signals: Sequence[Armed] = (),
        proof: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._said = cwd.parent / f".said-{os.getpid()}-{next(_numbers)}"
        job = (list(arguments), str(cwd), str(self._said), list(signals), proof, dict(environment or {}))
        self.process: ForkServerProcess = server().Process(target=_dae, args=job)
        self.process.start()

    def send(self, number: int) -> None:
        """A signal from outside."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP has taken hold."""
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(self.process.pid)], capture_output=True, check=False)
        return state.stdout.startswith(b"T")

    def end(self) -> Ended:
        """Wait for the end."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the command hangs; it has said:\n{self._read('err')}")
        return Ended(self.process.exitcode, self._read("out"), self._read("err"))

    def _read(self, stream: str) -> str:
        path = self._said.with_suffix(f".{stream}")
        return path.read_text() if path.exists() else ""


def dae(arguments: Sequence[str], cwd: Path, **settings: Any) -> Ended:
    """Run one command to its end; settings are those of `Running`."""
    return Running(arguments, cwd, **settings).end()


def ranks(
    arguments: Sequence[str],
    cwd: Path,
    signals: Sequence[Sequence[Armed]] = ((), ()),
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """The command on several ranks, with the environment that a launcher gives them; signals: of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(signals))
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        Running(
            arguments,
            cwd,
            proof=False,
            signals=own,
            environment={**common, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, own in enumerate(signals)
    ]
    return [one.end() for one in running]


@cache
def server() -> ForkServerContext:
    """The process that has imported all that a command imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval"), str(ROOT / "tests")])
    before = dict(os.environ)
    # As `dae` does before it imports them; and killed processes leave semaphores behind, which is nothing to warn of.
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore:resource_tracker",
    }
    os.environ.update(quiet, PYTHONPATH=path)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _dae(
    arguments: list[str], cwd: str, said: str, signals: list[Armed], proof: bool, environment: Mapping[str, str]
) -> None:
    """In the child: become `dae`, and never return."""
    status = 99
    try:
        os.chdir(cwd)
        os.environ.update(environment)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{said}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import torch

        import kd.training.publishing
        from benchmarks.fsdp_on_cpus import tell_accelerate
        from dae import cli

        if FSDP_ON_CPUS in environment:
            tell_accelerate()
        torch.set_num_threads(1)
        cli.prepare_process(os.environ)
        if not proof:
            setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # noqa: B010
        for one in signals:
            one.arm()
        status = cli.run(arguments)
    except BaseException:  # noqa: BLE001 - nothing of the command may come this far: the test sees status 99
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
