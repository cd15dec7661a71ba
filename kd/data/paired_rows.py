"""Rows in the tokens of two tokenizers."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.drafts import Dropped
from kd.data.examples import BATCH_RECORDS, Encoded, SourceReport, encode_records, refuse_empty
from kd.data.records import Reading, read_records
from kd.data.token_rows import Ids, Mask, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOR_TEACHER = "teacher_"  # before the names of columns that hold the teacher's tokens


class PairedRows(TokenRows):
    """R rows in the student's tokens, and the same rows in the teacher's."""

    def __init__(self, student: TokenRows, teacher: TokenRows) -> None:
        assert len(student) == len(teacher), (len(student), len(teacher))
        super().__init__(student.input_ids, student.response_mask, student.offsets)
        self.teacher = teacher

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> PairedRows:
        theirs = [part.teacher for part in parts if isinstance(part, PairedRows)]
        return cls(TokenRows.concatenate(parts), TokenRows.concatenate(theirs))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{super().sha256} {self.teacher.sha256}".encode()).hexdigest()

    def columns(self, row: int) -> dict[str, Ids | Mask]:
        theirs = {f"{FOR_TEACHER}{name}": values for name, values in self.teacher.columns(row).items()}
        return super().columns(row) | theirs


def load_paired_rows(
    sources: Sequence[SourceRecipe],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataRecipe,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[TokenRows], list[SourceReport]]:
    """As kd.data.examples.load_rows, each row in both sides' tokens (and, for conversations, each side's own template).

    A record that gives no row on one side is dropped. Raises UserError as that does.
    """
    rows: list[TokenRows] = []
    reports = []
    for source in sources:
        report = SourceReport(source.title)
        pairs = list(encode_pairs(source, (tokenizer, teacher_tokenizer), settings, report))
        refuse_empty(report, len(pairs), settings)
        ours, theirs = (
            TokenRows.from_rows((pair[s].input_ids, pair[s].response_mask) for pair in pairs) for s in (0, 1)
        )
        report.kept, report.tokens = len(ours), len(ours.input_ids)
        report.response_tokens = int(ours.response_mask.sum())
        rows.append(PairedRows(ours, theirs))
        reports.append(report)
    return rows, reports


def encode_pairs(
    source: SourceRecipe,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    settings: DataRecipe,
    report: SourceReport,
) -> Iterator[tuple[Encoded, Encoded]]:
    """Yields (student's, teacher's) encoding of a source's records; the report is filled in as by `encode_source`."""
    notes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    reading = Reading()
    records = read_records(source, reading)
    while batch := list(itertools.islice(records, BATCH_RECORDS)):
        pairs = zip(*(encode_records(batch, one, settings) for one in tokenizers), strict=True)
        for place, (ours, theirs) in enumerate(pairs, start=report.records):
            if isinstance(ours, Dropped):
                dropped[ours.reason] += 1
                report.dropped_at.append(place)
            elif isinstance(theirs, Dropped):
                dropped[f"in the teacher's tokens: {theirs.reason}"] += 1
                report.dropped_at.append(place)
            else:
                report.truncated += ours.truncated
                notes.update(ours.notes)
                reading.unread.update(ours.unread)
                report.conversations += ours.rendered
                yield ours, theirs
        report.records += len(batch)
    report.fill(reading, dropped, notes)
