"""Runs a stage of a pipeline in a process of its own, so that its memory is free when it ends.

It runs the command that is printed. Signals to the pipeline are passed on to it. If the pipeline's process is killed,
it ends, too.
"""

from __future__ import annotations

import codecs
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal, Protocol

Stream = Literal["out", "err"]
Tell = Callable[[Stream, str], None]
_STREAMS: tuple[Stream, Stream] = ("out", "err")
_LOOK_AGAIN = 0.5  # seconds: a grandchild may keep the pipes open after the stage has ended


class Child(Protocol):
    """The part of subprocess.Popen that is used here."""

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int) -> None: ...


class Signals:
    """Ctrl-C and SIGTERM of the pipeline, recorded and passed on to the running stage."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.child: Child | None = None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        if self.child is not None:
            self.child.send_signal(number)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the context, signals do nothing else."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_command(command: Sequence[str], tell: Tell, signals: Signals, width: int) -> int:
    """Run one command of `dae` (without that word); its exit status, 128 + n if signal n ended it.

    tell: called with every line of output; width: of the terminal.
    """
    lifeline, ours = os.pipe()
    pipes = {name: os.pipe() for name in _STREAMS}
    try:
        try:
            child = start(command, lifeline, pipes["out"][1], pipes["err"][1], width)
        finally:
            for descriptor in (lifeline, pipes["out"][1], pipes["err"][1]):
                os.close(descriptor)
        signals.child = child
        if signals.received is not None:  # received while the process was starting
            child.send_signal(signals.received)
        pass_on(child, {name: pipes[name][0] for name in _STREAMS}, tell)
        code = child.wait()
    finally:
        signals.child = None
        for descriptor in (ours, pipes["out"][0], pipes["err"][0]):
            os.close(descriptor)
    return code if code >= 0 else 128 - code


def start(command: Sequence[str], lifeline: int, out: int, err: int, width: int) -> Child:
    """Start the process in its own process group, so that a terminal's signals reach it once, through the pipeline."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-m", "dae.pipeline.stage_command", str(lifeline), *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        pass_fds=[lifeline],
        process_group=0,
        env={**environment, "COLUMNS": str(width), "PYTHONUNBUFFERED": "1"},
    )


def pass_on(child: Child, descriptors: dict[Stream, int], tell: Tell) -> None:
    """Pass on the child's output line by line until it has ended."""
    with selectors.DefaultSelector() as selector:
        lines: dict[int, Lines] = {}
        for stream, descriptor in descriptors.items():
            lines[descriptor] = Lines(stream, tell)
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_LOOK_AGAIN)
            if not ready and child.poll() is not None:
                break
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                lines[key.fd].add(data)
                if not data:
                    selector.unregister(key.fd)
        for rest in lines.values():
            rest.end()


class Lines:
    """Splits one stream into lines."""

    def __init__(self, stream: Stream, tell: Tell) -> None:
        self.stream = stream
        self.tell = tell
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def add(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + self._decode(data)).split("\n")
        for line in whole:
            self.tell(self.stream, line)

    def end(self) -> None:
        if self._rest:
            self.tell(self.stream, self._rest)
        self._rest = ""
