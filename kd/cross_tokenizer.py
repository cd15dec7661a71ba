"""A teacher with a tokenizer of its own: Universal Logit Distillation (ULD, arXiv 2402.12030).

Student and teacher each read the row in their own tokens. The k-th response token of the one is set beside the k-th of
the other, and the two next-token distributions are compared as what can be compared without knowing which token is
which: their probabilities, sorted (the closed form of the Wasserstein distance where every token is equally far from
every other),

    sum_i | p_(i) - q_(i) |      with the smaller vocabulary filled up with zeros.

The paper adds lambda times this to the next-token loss; here the two have the weights lambda and 1 - lambda, as
everywhere.

What this cannot do: it says how sure the teacher is, never of what, so the next-token loss has to stay on (lambda below
1); and where the tokenizers cut a response into different numbers of tokens, the k-th tokens drift apart, and what the
longer one has over has no partner and costs nothing here.

Shape legend: B rows, T positions, M aligned response tokens, D and E widths, V and W vocabularies of student and
teacher.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd.config import DataRecipe, SourceRecipe
from kd.data import (
    BATCH_RECORDS,
    Encoded,
    SourceReport,
    encode_records,
    refuse_empty,
)
from kd.drafts import Dropped
from kd.losses import ACCELERATOR_CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS, FEWEST_CHUNK_TOKENS, Head, sum_dtype
from kd.objective import Batch, predicting_positions
from kd.records import Reading, read_records
from kd.roles import Role, final_hidden_states, head_of, speaking_as
from kd.token_rows import Ids, Mask, TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOR_TEACHER = "teacher_"  # before the names of columns that hold the teacher's tokens


@dataclass(frozen=True)
class CrossTokenizerLoss:
    """ULD as a term of the objective (kd.objective.Term); it runs the teacher itself, on the teacher's tokens."""

    weight: float
    teacher: Role
    name: str = "uld"

    @contextlib.contextmanager
    def recording(self, batch: Batch) -> Iterator[Callable[[Tensor, Head], Tensor]]:
        """Nothing needs to be noted while the student runs."""
        yield lambda hidden_BTD, head: self._summed(batch, hidden_BTD, head)

    def _summed(self, batch: Batch, hidden_BTD: Tensor, head: Head) -> Tensor:
        theirs = {key.removeprefix(FOR_TEACHER): value for key, value in batch.items() if key.startswith(FOR_TEACHER)}
        ours_BT, theirs_BT = aligned_positions(batch, theirs)
        with speaking_as(self.teacher) as model, torch.no_grad():
            inputs = {key: theirs[key] for key in ("input_ids", "attention_mask")}
            teacher_hidden_BTE = final_hidden_states(model, inputs)[:, :-1]
            teacher_head = head_of(model)
        return uld_sum(hidden_BTD[ours_BT], head, teacher_hidden_BTE[theirs_BT], teacher_head)


def aligned_positions(student: Batch, teacher: Batch) -> tuple[Tensor, Tensor]:
    """Two masks [B, T - 1], each in its own tokens: positions that predict a response token with a partner, in order.

    The k-th response token of a row is the partner of the other side's k-th.
    """
    ours_BT, theirs_BT = predicting_positions(student), predicting_positions(teacher)
    pairs_B1 = torch.minimum(ours_BT.sum(1), theirs_BT.sum(1))[:, None]
    return ours_BT & (ours_BT.cumsum(1) <= pairs_B1), theirs_BT & (theirs_BT.cumsum(1) <= pairs_B1)


def uld_sum(
    hidden_MD: Tensor, head: Head, teacher_hidden_ME: Tensor, teacher_head: Head, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over M tokens of the L1 distance between sorted probabilities (0 to 2 each), chunked over tokens.

    Each chunk's logits are made again for the backward pass instead of being kept. Between equal distributions value
    and gradient are exactly 0. M = 0 gives a zero that is still connected to the graph.
    """
    if chunk_tokens is None:
        elements = CPU_CHUNK_ELEMENTS if hidden_MD.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
        widest = max(head.weight_VD.shape[0], teacher_head.weight_VD.shape[0])
        chunk_tokens = max(FEWEST_CHUNK_TOKENS, elements // widest)

    def chunk_sum(hidden_MD: Tensor, teacher_hidden_ME: Tensor) -> Tensor:
        with torch.no_grad():
            theirs_MW = teacher_head.logits(teacher_hidden_ME).softmax(-1).sort(-1, descending=True).values
        ours_MV = differentiable_logits(head, hidden_MD).softmax(-1).sort(-1, descending=True).values
        missing = ours_MV.shape[1] - theirs_MW.shape[1]
        ours_MV = torch.nn.functional.pad(ours_MV, (0, max(-missing, 0)))
        theirs_MW = torch.nn.functional.pad(theirs_MW.to(ours_MV.dtype), (0, max(missing, 0)))
        return (ours_MV - theirs_MW).abs().sum()

    total = hidden_MD[:0].sum().to(sum_dtype(head.weight_VD.dtype))
    for ours, theirs in zip(hidden_MD.split(chunk_tokens), teacher_hidden_ME.split(chunk_tokens), strict=True):
        part: Any = checkpoint(chunk_sum, ours, theirs, use_reentrant=False, preserve_rng_state=False)
        total = total + part
    return total


def differentiable_logits(head: Head, hidden_MD: Tensor) -> Tensor:
    """`Head.logits` for autograd."""
    dtype = sum_dtype(head.weight_VD.dtype)
    logits_MV = (hidden_MD.to(head.weight_VD.dtype) @ head.weight_VD.T).to(dtype)
    if head.bias_V is not None:
        logits_MV = logits_MV + head.bias_V
    logits_MV = logits_MV * head.scale
    return logits_MV if head.softcap is None else head.softcap * torch.tanh(logits_MV / head.softcap)


class PairedRows(TokenRows):
    """R rows in the student's tokens, and the same rows in the teacher's."""

    def __init__(self, student: TokenRows, teacher: TokenRows) -> None:
        assert len(student) == len(teacher), (len(student), len(teacher))
        super().__init__(student.input_ids, student.response_mask, student.offsets)
        self.teacher = teacher

    @classmethod
    def concatenate(cls, parts: Sequence[TokenRows]) -> PairedRows:
        """The rows of all parts, in order."""
        theirs = [part.teacher for part in parts if isinstance(part, PairedRows)]
        return cls(TokenRows.concatenate(parts), TokenRows.concatenate(theirs))

    @property
    def sha256(self) -> str:
        """SHA-256 of both sides' tokens and masks."""
        return hashlib.sha256(f"{super().sha256} {self.teacher.sha256}".encode()).hexdigest()

    def columns(self, row: int) -> dict[str, Ids | Mask]:
        """Also the teacher's tokens of the row."""
        theirs = {f"{FOR_TEACHER}{name}": values for name, values in self.teacher.columns(row).items()}
        return super().columns(row) | theirs


def load_paired_rows(
    sources: Sequence[SourceRecipe],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataRecipe,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[TokenRows], list[SourceReport]]:
    """As kd.data.load_rows, each row in both sides' tokens (and, for conversations, each side's own template).

    A record that gives no row on one side is dropped. Raises UserError as that does.
    """
    rows: list[TokenRows] = []
    reports = []
    for source in sources:
        report = SourceReport(source.path)
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
