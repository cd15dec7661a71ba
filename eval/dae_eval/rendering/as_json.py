"""report.json: the report as data for other programs (docs/report-schema.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dae_eval.report import SCHEMA_VERSION, Report

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def render(report: Report) -> str:
    """The file's text. A number that is not finite becomes null, because JSON cannot express it."""
    content = {"schema_version": SCHEMA_VERSION, **_plain(report)}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Half of a surrogate pair, which byte-level models may write, has no UTF-8 form; JSON's escape keeps it.
    return _HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


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
