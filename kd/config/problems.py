"""What is wrong with a recipe, in plain words: where it was written, key, value, remedy; all of it in one message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.errors import UserError

Key = tuple[str | int, ...]

# Marks a problem whose key has no value at all, unlike one whose value is None.
NO_VALUE = object()
# In place of a value that may hold a secret: neither it nor the `key=value` that it came in is shown.
SECRET = object()

MISSING = "is missing"

PLAIN_WORDS = {
    "string_type": "expected text",
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "dict_type": "expected a mapping",
    "mapping_type": "expected a mapping",
    "model_type": "expected a mapping",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "string_too_short": "must not be empty",
    "invalid_key": "a key is text: put it in quotes",
}
BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


@dataclass(frozen=True)
class Problem:
    """One mistake: the key it stands under, the value found there (or NO_VALUE) and what to do about it.

    `origin` is given only where it is not that of the key.
    """

    key: Key
    value: Any
    message: str
    origin: str | None = None


def as_written(key: Key) -> Key:
    """The key as a user writes it: routes stand directly under `data`."""
    return ("data", *key[2:]) if key[:2] == ("data", "routes") else key


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a sentence; empty when none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def in_plain_words(error: Mapping[str, Any], known: Iterable[str]) -> str:
    """The message for one entry of pydantic's `ValidationError.errors()`; `known` are the keys there could be."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return f"unknown key{suggestion(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return MISSING
    if kind == "value_error":
        return str(context["error"])
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        limit = context[bound]
        return f"{words} {limit:g}" if isinstance(limit, float) else f"{words} {limit}"
    if kind == "literal_error":
        names = [name.strip(" '") for name in context["expected"].replace(" or ", ",").split(",")]
        return f"expected {one_of(names)}{suggestion(value, names) if isinstance(value, str) else ''}"
    words = PLAIN_WORDS.get(kind, str(error["msg"]))
    if kind == "string_type" and isinstance(value, (int, float)):
        words += ": put it in quotes"
    return words


# Control characters (C0 and C1 except tab and newline), marks that reverse or hide text, line and paragraph separators,
# halves of surrogate pairs: they change a terminal or the text around them, or have no UTF-8 form. Joiners (U+200C and
# U+200D), which Persian, Indic scripts and emoji need, are not among them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with control characters (escapes, text direction, nulls) as `<U+202E>`."""
    return _INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text.replace("\r\n", "\n"))


def shown(value: Any) -> str:
    """The value as it would stand in a recipe, cut to one line."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


class Origins:
    """Where each key was written: `recipe.yaml:12`, `--flag` or `key=value`."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, ...], str] = {}

    def put(self, key: Key, origin: str) -> None:
        """Notes that `key` and all below it was written at `origin`, over what was there."""
        path = tuple(str(part) for part in key)
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = origin

    def of(self, key: Key) -> str | None:
        """Where the key, or the nearest key above it, was written."""
        path = tuple(str(part) for part in key)
        found = (self.places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.places)
        return next(found, None)


def report(problems: Sequence[Problem], origins: Origins, fallback: str) -> UserError:
    """One error with a line for each problem, in the order of the recipe's keys as found."""
    lines = []
    for problem in problems:
        key = as_written(problem.key)
        value = "" if problem.value is NO_VALUE or problem.value is SECRET else f" = {shown(problem.value)}"
        name = f"{'.'.join(str(part) for part in key)}{value}: " if key else ""
        origin = problem.origin or origins.of(key) or fallback
        if problem.value is SECRET:
            origin = origin.partition("=")[0]
            name = "" if origin == ".".join(str(part) for part in key) else name
        elif origin.startswith(f"{'.'.join(str(part) for part in key)}="):
            name = ""  # `key=value` already shows key and value
        lines.append(f"{origin}: {name}{problem.message}")
    unique = list(dict.fromkeys(lines))
    if len(unique) == 1:
        return UserError(unique[0])
    return UserError("\n".join([f"{len(unique)} problems in the recipe:", *(f"  {line}" for line in unique)]))
