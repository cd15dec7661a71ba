"""Rows in memory, in a recipe where a path could stand: the rows, and the SHA-256 of their content."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from kd.errors import UserError

_RECORDED = re.compile(r"in memory, \d+ rows, sha256 [0-9a-f]{64}")


class InMemoryRows:
    """Rows of a `datasets.Dataset` or a list of dicts; takes the place of a path in a recipe.

    Recipes, run folders and cards hold `str(rows)`, never the rows: number of rows and SHA-256. A Dataset and a list
    with equal rows have equal SHA-256: nulls are no part of it, since Arrow fills up objects with them, nor is the
    order of keys, nor whether a number is 1 or 1.0.
    """

    def __init__(self, rows: Any, name: str = "rows") -> None:
        """Take the rows as they are now.

        Args:
            rows: a `datasets.Dataset` or a list of dicts.
            name: what messages call them.

        Raises:
            UserError: `rows` is something else, or a row holds values that cannot be fingerprinted.
        """
        if (refused := why_no_rows(rows)) is not None:
            raise UserError(f"{name}: {refused}")
        self.name = name
        # A Dataset may be set to give tensors; a list may change after this.
        self._rows = rows.with_format(None) if is_dataset(rows) else tuple(rows)
        self.features: Mapping[str, Any] = rows.features if is_dataset(rows) else {}
        self.sha256 = self._fingerprint()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __str__(self) -> str:
        return f"in memory, {len(self)} rows, sha256 {self.sha256}"

    def __repr__(self) -> str:
        return f"InMemoryRows({self.name}: {len(self)} rows, sha256 {self.sha256[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemoryRows) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def location(self, index: int) -> str:
        """A row in messages; rows count from 0, as in Python."""
        return f"{self.name}, row {index}"

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, row in enumerate(self._rows):
            try:
                text = json.dumps(comparable(row), sort_keys=True, default=as_json)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{self.location(index)}: cannot be fingerprinted ({error}); a row holds text, numbers, lists and "
                    "dicts: remove other columns (`Dataset.remove_columns`)"
                ) from error
            digest.update(f"{text}\n".encode())
        return digest.hexdigest()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = core_schema.to_string_ser_schema(when_used="always")
        return core_schema.is_instance_schema(cls, serialization=shown)


def recorded_in_memory(path: str) -> bool:
    """Whether a recorded path stands for rows that were in memory."""
    return _RECORDED.fullmatch(path) is not None


def is_dataset(value: Any) -> bool:
    """Whether a value is a `datasets.Dataset`; `datasets` is not imported for this."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(value, library.Dataset)


def why_no_rows(value: Any) -> str | None:
    """Why a value cannot be read as rows, and what to pass instead; None if it can."""
    if is_dataset(value) or (isinstance(value, Sequence) and not isinstance(value, (str, bytes))):
        return None
    kind = type(value).__name__
    expected = f"expected a path, a datasets.Dataset or a list of dicts, not {kind}"
    if kind in ("DatasetDict", "IterableDatasetDict"):
        return f"{expected}; pass one of its splits: {', '.join(map(str, value))}"
    if kind == "IterableDataset":
        return f"{expected}; a run reads rows in any order: load it without `streaming`"
    if kind == "DataFrame":
        return f"{expected}; use `datasets.Dataset.from_pandas(frame)` or `frame.to_dict('records')`"
    return expected


def comparable(value: Any) -> Any:
    """A row without what Arrow changes: keys that are null are left out, and 1.0 is 1."""
    if isinstance(value, Mapping):
        return {key: comparable(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_json(value: Any) -> Any:
    """Numbers and arrays of numpy, and dates, as JSON has them. Raises TypeError for other objects."""
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"it holds an object of class {type(value).__name__}")
