"""One living process to a place: a lock that ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd.errors import UserError
from kd.runs.files import disk_errors

# A forked child (a data loader's worker) shares the lock's open file and would keep the place held after its parent was
# killed, so it closes its copies.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(lock_file: Path, held: str) -> Iterator[None]:
    """Hold `lock_file` (flock) while the context lasts; it names the holder's process and host meanwhile.

    held: what is held, as a message names it.

    Raises:
        UserError: a live process holds it, or the file cannot be written or locked.
    """
    with disk_errors(lock_file):
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The earlier holder may have removed the file between our opening and locking it.
        if os.fstat(descriptor).st_nlink == 0:
            raise BlockingIOError
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "its number is not known"
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise UserError(
                f"{lock_file}: this file system cannot lock files ({error.strerror}); choose another place"
            ) from error
        raise UserError(
            f"{held}: held by a live process ({holder}); wait for it, stop it, or choose another --output"
        ) from error
    _held.add(descriptor)
    try:
        with disk_errors(lock_file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not so in a forked child
            _held.discard(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)  # the host's name is not for publishing
            os.close(descriptor)
