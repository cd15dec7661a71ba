"""What can go wrong, by whose hand: the classes decide the exit status of the command line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a command, recipe, data file or checkpoint (exit status 2).

    The message is all that the user sees: it names the file (and row), the key, the value and the remedy.
    """


class MachineError(RuntimeError):
    """The machine gave out: disk full or out of memory (exit status 4). What was saved before stays whole."""


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Training was stopped by a signal after a checkpoint was written (exit status 128 + signal number)."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
