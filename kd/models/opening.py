"""Calls into libraries that open a user's files: whatever these raise is an error in the files.

transformers, tokenizers and peft raise arbitrary exceptions for an invalid config or tokenizer (ZeroDivisionError,
AssertionError, a Rust panic).
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.errors import MachineError, UserError

LONGEST_REASON = 300
# Keys from which transformers builds a list of that length before it looks at anything else.
_COUNTS = ("num_labels", "extra_ids", "offset")
LARGEST_COUNT = 10_000
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


@contextlib.contextmanager
def opening(what: str, remedy: str = "Save or download it again.") -> Iterator[None]:
    """Around calls into a library that read or build what a user's files describe, and nothing of ours.

    what: the beginning of the message, such as "FOLDER: cannot be read as a causal language model".

    Raises UserError for every fault but those of the machine (memory, disk), which pass.
    """
    try:
        yield
    except (UserError, MachineError, MemoryError):
        raise
    except BaseException as error:
        # tokenizers' panics are BaseExceptions of no public class.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        raise UserError(f"{what}: {reason(error)}. {remedy}") from error


def reason(error: BaseException) -> str:
    """The error's message in one line, without its full stop; with its class if the message alone is unclear."""
    words = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    if len(words) > LONGEST_REASON:
        words = f"{words[:LONGEST_REASON]}..."
    if not words:
        return type(error).__name__
    return words if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {words}"


def refuse_broken_json(folder: Path, *names: str) -> None:
    """Raise UserError where one of these files is there and is no JSON object, with the place of the mistake."""
    for name in names:
        file = folder / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: is no JSON ({reason(error)}); save or download it again") from error
        if not isinstance(value, dict):
            raise UserError(f"{file}: is no JSON object; save or download it again")


def refuse_unsafe_settings(folder: Path, trust_remote_code: bool) -> None:
    """Raise UserError for settings of a checkpoint that would fetch code from the hub, or never end.

    transformers takes OWNER/NAME as an attention for a kernel on the hub, whose code it would run. `auto_map` needs no
    check: transformers reads it with trust_remote_code only.
    """
    names = ("config.json", "tokenizer_config.json")
    refuse_broken_json(folder, *names)
    for file in (folder / name for name in names):
        for key, value in _settings(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ():
            if key in _COUNTS and isinstance(value, (int, float)) and abs(value) > LARGEST_COUNT:
                raise UserError(f"{file}: {key}: {value}: more than {LARGEST_COUNT}; correct it")
            if "attn_implementation" in key and "/" in str(value) and not trust_remote_code:
                raise UserError(
                    f"{file}: {key}: {str(value)[:80]}: is code on the hub; remove it, or trust its author with "
                    "trust_remote_code: true"
                )


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of the configs in it."""
    for key, part in value.items() if isinstance(value, dict) else ():
        yield str(key), part
        yield from _settings(part)
