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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd.data.batches import Batch, predicting_positions
from kd.data.paired_rows import FOR_TEACHER
from kd.losses.chunked import ACCELERATOR_CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS, FEWEST_CHUNK_TOKENS
from kd.models.forward import final_hidden_states, head_of
from kd.models.head import Head, sum_dtype
from kd.models.roles import Role, activate


@dataclass(frozen=True)
class CrossTokenizerLoss:
    """ULD as a term of the objective (auxiliary.py); it runs the teacher itself, on the teacher's tokens."""

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
        with activate(self.teacher) as model, torch.no_grad():
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
