"""Ctrl-C in a command that goes on where it stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.errors import Stopped


@contextmanager
def going_on(output: Path, kept: str) -> Iterator[None]:
    """Ctrl-C is told with what is kept in `output`. Raises Stopped."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, f"stopped; {kept} in {output}. The same command goes on from there.") from None
