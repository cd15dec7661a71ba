"""One living process to a place: a lock that ends with its holder, however that ends.

The lock itself is filelock's: flock, which the system takes away with a killed holder and which a forked child (a data
loader's worker) does not keep. Here it gets the holder's name and the messages.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kd.errors import UserError
from kd.runs.files import disk_errors

_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


class HeldError(UserError):
    """A live process holds the place."""


@contextmanager
def hold(lock_file: Path, held: str) -> Iterator[None]:
    """Hold `lock_file` while the context lasts; it names the holder's process and host meanwhile, and then is gone.

    held: what is held, as a message names it.

    Raises:
        HeldError: a live process holds it.
        UserError: the file cannot be written or locked.
    """
    descriptors: list[int] = []

    def sign(descriptor: int) -> None:
        descriptors.append(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    holder = os.getpid()
    # No soft lock where the file system has no flock: that one outlives its holder.
    lock = FileLock(lock_file, blocking=False, fallback_to_soft=False, on_acquired=sign)
    with disk_errors(lock_file):
        try:
            lock.acquire()
        except Timeout as error:
            raise HeldError(
                f"{held}: held by a live process ({_holder(lock_file)}); wait for it, stop it, or choose another output"
            ) from error
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            raise UserError(
                f"{lock_file}: this file system cannot lock files ({error.strerror}); choose another place"
            ) from error
    try:
        yield
    finally:
        if os.getpid() == holder:  # not so in a forked child
            with suppress(OSError):
                os.ftruncate(descriptors[0], 0)  # the host's name is not for publishing, wherever the file is moved
                if os.path.samestat(os.fstat(descriptors[0]), lock_file.stat()):
                    lock_file.unlink()
            lock.release()


def _holder(lock_file: Path) -> str:
    with suppress(OSError):
        if name := lock_file.read_text(errors="replace")[:200].strip():
            return name
    return "its number is not known"
