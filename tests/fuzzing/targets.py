"""What is fuzzed: for each kind of input from outside, how one is made and what reads it.

A target may return, or refuse with UserError or MachineError; anything else, and what takes longer than SECONDS, is a
finding. Targets read only what is small: no weights are loaded.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fuzzing.mutations import Choose

from dae.exit_status import OURS, status_of
from kd.errors import MachineError, UserError

SECONDS = 10.0  # of one input


@dataclass(frozen=True)
class Target:
    """One kind of input. make: an input; read: gives it to the toolkit; slow: milliseconds instead of microseconds."""

    name: str
    make: Callable[[Choose], bytes]
    read: Callable[[bytes], object]
    slow: bool = False


@dataclass(frozen=True)
class Finding:
    """An input that was neither read nor refused. what: the error's class and place, which tell findings apart."""

    target: str
    what: str
    trace: str
    content: bytes


class TooSlowError(BaseException):
    """An input took longer than SECONDS."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Of this process's own time, so that a busy machine makes no findings; libFuzzer has SIGALRM for itself."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def silence() -> Iterator[None]:
    """No warnings about what is read."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def warm_up(target: Target) -> None:
    """Read a few inputs without a limit: libraries are imported when they are needed."""
    begin = random.Random(0)
    for _ in range(20):
        with suppress(Exception), silence():
            target.read(target.make(begin.randrange))


def try_input(target: Target, content: bytes, seconds: float = SECONDS) -> tuple[str, Finding | None]:
    """`read`, `refused` or `finding`, and the finding."""
    try:
        with silence(), time_limit(seconds):
            target.read(content)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 # tokenizers' panics are no Exceptions
        if isinstance(error, (UserError, MachineError, OSError)) and status_of(error)[0] != OURS:
            return "refused", None  # of OSErrors, names that are too long have a message of the command line
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzzing" not in frame.filename]
        ours = [f for f in frames if "site-packages" not in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        trace = "".join(traceback.format_exception(error)[-14:])
        return "finding", Finding(target.name, f"{type(error).__name__} at {place}", trace, content)
    return "read", None


@cache
def workplace() -> Path:
    """A folder for the inputs of this process, in memory where there is one."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-", dir=memory if memory.is_dir() else None))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def written(name: str, content: bytes) -> Path:
    path = workplace() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parts_of(content: bytes, *names: str) -> dict[str, bytes]:
    """An input of several files: lengths in the first line, then the files."""
    head, _, rest = content.partition(b"\n")
    try:
        lengths = [int(length) for length in json.loads(head)]
    except (ValueError, TypeError):
        return {names[0]: content}
    found, start = {}, 0
    for name, length in zip(names, lengths, strict=False):
        found[name] = rest[start : start + max(length, 0)]
        start += max(length, 0)
    return found


def together(*files: bytes) -> bytes:
    return json.dumps([len(file) for file in files]).encode() + b"\n" + b"".join(files)


MODULES = ("recipe_targets", "row_targets", "evaluation_targets", "checkpoint_targets")


def targets() -> Iterator[Target]:
    """All targets, module by module: the first ones import no torch."""
    for module in MODULES:
        yield from importlib.import_module(f"fuzzing.{module}").TARGETS
