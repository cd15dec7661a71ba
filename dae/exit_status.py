"""Exit statuses: 0 done, 1 a verdict, 2 a user's mistake, 3 an internal error, 4 the machine, 128 + n signal n."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.exceptions import Abort, TyperException

from kd.errors import MachineError, Stopped, UserError

USER, OURS, MACHINE, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 130, 141
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
SMALLER_STEP = (
    "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps (the result is the same), "
    "or set train.gradient_checkpointing=true"
)


def status_of(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an error; the message is empty for internal errors."""
    if isinstance(error, Stopped):
        return 128 + error.signal_number, str(error)
    if isinstance(error, (KeyboardInterrupt, Abort)):
        return INTERRUPTED, "stopped; run the same command to continue"
    if isinstance(error, UserError):
        return USER, str(error)
    if isinstance(error, TyperException):
        return USER, usage_message(error)
    if isinstance(error, MachineError):
        return MACHINE, str(error)
    if is_out_of_memory(error):
        return MACHINE, f"out of memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}; {SMALLER_STEP}"
    if isinstance(error, OSError):
        return status_of_os_error(error)
    return OURS, ""


@contextmanager
def as_own_errors() -> Iterator[None]:
    """Around a call from Python: what the command line gives a message for is UserError or MachineError here."""
    try:
        yield
    except (OSError, MemoryError) as error:
        status, message = status_of(error)
        if status == USER:
            raise UserError(message) from error
        if status == MACHINE:
            raise MachineError(message) from error
        raise


def usage_message(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dae"
    return f"{error.format_message()} (see `{command} --help`)"


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on the host or the accelerator."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def status_of_os_error(error: OSError) -> tuple[int, str]:
    """A full disk is the machine's, missing permission the user's, and anything else an internal error."""
    place = error.filename or "the output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MACHINE, f"{place}: the disk is full; free some space, then run the same command to resume"
    if error.errno == errno.ENOMEM:
        return MACHINE, f"out of memory; {SMALLER_STEP}"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return USER, f"{str(place)[:80]}: {os.strerror(error.errno).lower()}; use another name"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return USER, f"{place}: {os.strerror(error.errno).lower()}; use another folder"
    return OURS, ""


def traceback_log(error: BaseException) -> str:
    """Write the traceback to a new file; one line that names the file."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    what = f"{type(error).__name__}{where}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dae-", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    except OSError as failure:
        return f"internal error, please report: {what} (the log could not be written: {failure.strerror})"
    return f"internal error, please report: {what}; traceback in {log.name}"
