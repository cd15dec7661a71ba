"""Token rows: input ids, and which of them are response tokens.

Legend: T positions of a row, R rows. mask_T[t] says that token t is a response token, which the logits of position
t - 1 predict. mask_T[0] is False in every row: nothing predicts token 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRow:
    """One row: input_ids [T], and response_mask [T], True for response tokens and never at position 0."""

    input_ids: list[int]
    response_mask: list[bool]


class TokenRows:
    """R rows in flat arrays: input_ids int32 and response_mask bool over all tokens, offsets int64 [R + 1]."""

    def __init__(self, input_ids: Ids, response_mask: Mask, offsets: npt.NDArray[np.int64]) -> None:
        assert len(input_ids) == len(response_mask) == offsets[-1], (len(input_ids), len(response_mask), offsets[-1])
        self.input_ids = input_ids
        self.response_mask = response_mask
        self.offsets = offsets

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Sequence[int], npt.ArrayLike]]) -> TokenRows:
        """Rows given as (input_ids, response_mask)."""
        ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for row_ids, row_mask in rows:
            ids.append(np.asarray(row_ids, np.int32))
            masks.append(np.asarray(row_mask, np.bool_))
        offsets = np.cumsum([len(row) for row in ids], dtype=np.int64)
        return cls(np.concatenate(ids), np.concatenate(masks), offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """The rows of all parts, in order."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        ids = np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)])
        mask = np.concatenate([np.zeros(0, np.bool_), *(part.response_mask for part in parts)])
        return cls(ids, mask, np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def arrays(self, row: int) -> tuple[Ids, Mask]:
        """(input_ids [T], response_mask [T]) of one row, as views."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.input_ids[part], self.response_mask[part]

    def columns(self, row: int) -> dict[str, Ids | Mask]:
        """What a row is made of, by the name of its column in a batch."""
        input_ids, response_mask = self.arrays(row)
        return {"input_ids": input_ids, "response_mask": response_mask}

    def __getitem__(self, row: int) -> TokenRow:
        ids, mask = self.arrays(row)
        return TokenRow(ids.tolist(), mask.tolist())

    @property
    def sha256(self) -> str:
        """SHA-256 of all tokens and masks."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.input_ids, self.response_mask):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[R] tokens of each row."""
        return np.diff(self.offsets)

    @property
    def response_counts(self) -> npt.NDArray[np.int64]:
        """[R] response tokens of each row."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.response_mask, dtype=np.int64)])
        return np.diff(before[self.offsets])
