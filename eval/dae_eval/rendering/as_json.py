"""report.json: the report as data, for other programs and to render it again (docs/report-schema.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dae_eval.report import SCHEMA_VERSION, Report
from kd.errors import UserError

VERSION_KEY = "schema_version"

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def render(report: Report) -> str:
    """The file's text. A number that is not finite becomes null: JSON has no word for it."""
    content = {VERSION_KEY: SCHEMA_VERSION, **_plain(report)}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Half of a surrogate pair, as a model that writes bytes may leave one, has no UTF-8: as JSON's escape it survives.
    return _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def load_report(path: Path) -> Report:
    """Read a report.json that `render` wrote. Where a number is null that was not finite, it is NaN.

    Raises:
        UserError: it cannot be read, is of another schema version, or something in it is not as the schema says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the report again with `dae report`") from error
    if not isinstance(content, dict) or VERSION_KEY not in content:
        raise UserError(
            f"{path}: has no `{VERSION_KEY}`, so it is no report.json; give the one that `dae report` wrote"
        )
    version = content.pop(VERSION_KEY)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: {VERSION_KEY}: {version!r} is not {SCHEMA_VERSION}, the version that is read here; "
            "write the report again with `dae report`"
        )
    try:
        report = _typed(Report, content, "")
    except _SchemaError as error:
        raise UserError(f"{path}: {error}; write the report again with `dae report`") from error
    assert isinstance(report, Report)
    return report


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _SchemaError(ValueError):
    """Something in the file that is not as the schema says: where, what, and what was expected."""

    def __init__(self, where: str, value: object, expected: str) -> None:
        super().__init__(f"{where or 'the report'}: {str(value)[:60]!r} is not {expected}")


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value` (JSON) as `kind`, one of the types that Report is made of."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)
    if origin in (Union, types.UnionType):
        optional = next(part for part in inner if part is not type(None))
        return None if value is None else _typed(optional, value, where)
    if origin is Literal:
        return _checked(value in inner, value, where, f"one of {', '.join(inner)}")
    if origin is tuple:
        return _sequence(inner, value, where)
    if origin is not None and issubclass(origin, Mapping):
        _checked(isinstance(value, dict), value, where, "an object")
        return {key: _typed(inner[1], part, f"{where}.{key}") for key, part in value.items()}
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return math.nan if value is None else float(_checked(number, value, where, "a number"))
    return _checked(type(value) is kind, value, where, f"of type {kind.__name__}")


def _object(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    _checked(isinstance(value, dict), value, where, "an object")
    if value.keys() != hints.keys():
        wrong = ", ".join(sorted(value.keys() ^ hints.keys()))
        raise _SchemaError(where, wrong, "as the schema says (keys missing or unknown)")
    return kind(**{key: _typed(hint, value[key], f"{where}.{key}".lstrip(".")) for key, hint in hints.items()})


def _sequence(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _checked(isinstance(value, list), value, where, "a list")
    parts = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    _checked(len(parts) == len(value), value, where, f"a list of {len(parts)}")
    return tuple(_typed(part, one, f"{where}[{i}]") for i, (part, one) in enumerate(zip(parts, value, strict=True)))


def _checked(holds: bool, value: Any, where: str, expected: str) -> Any:
    if not holds:
        raise _SchemaError(where, value, expected)
    return value
