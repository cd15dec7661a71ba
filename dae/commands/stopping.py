"""Ctrl-C in a command that resumes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.errors import Stopped


@contextmanager
def going_on(output: Path, kept: str) -> Iterator[None]:
    """Turn Ctrl-C into a message that names what is kept in `output`. Raises Stopped."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, f"stopped; {kept} in {output}. Run the same command to resume.") from None
