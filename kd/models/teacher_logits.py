"""What a teacher says of response tokens, as logits for a chunk of them at a time.

Shape legend: N response tokens, E width of the teacher, V vocabulary rows that both models share, K tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kd.models.head import Head

SMALLEST = -80.0  # natural logarithm; exp of it is a normal number in fp32


class TeacherLogits(Protocol):
    """A teacher's distribution over the vocabulary at each response token."""

    @property
    def vocabulary_rows(self) -> int:
        """Of its output layer."""
        ...

    def first_rows(self, rows: int) -> TeacherLogits:
        """The same over the first rows of the vocabulary."""
        ...

    def put(self, chunk: slice, student_logits_NV: Tensor, out_NV: Tensor) -> None:
        """Write the chunk's logits into out_NV. student_logits_NV: of the same tokens, not changed."""
        ...


@dataclass(frozen=True)
class HiddenTeacher:
    """Its final hidden states [N, E] and its output layer: the whole distribution."""

    hidden_NE: Tensor
    head: Head

    @property
    def vocabulary_rows(self) -> int:
        return self.head.weight_VD.shape[0]

    def first_rows(self, rows: int) -> HiddenTeacher:
        return HiddenTeacher(self.hidden_NE, self.head.first_rows(rows))

    def put(self, chunk: slice, student_logits_NV: Tensor, out_NV: Tensor) -> None:
        self.head.logits(self.hidden_NE[chunk], out_NV)


@dataclass(frozen=True)
class TopKTeacher:
    """Its K largest probabilities, and what is left as one more class, `tail`: a divergence over K + 1 classes.

    The tail's mass is spread as the student's own: q_v = tail * p_v / sum of p over the tail. With that, and q held
    constant, value and gradient of an f-divergence over V tokens are those over the K + 1 classes. For forward KL the
    gradient is p_v - q_v in the top K and p_v (1 - tail / p_tail) elsewhere. No divergence over classes exceeds the one
    over tokens (data processing inequality).

    ids_NK int64, log_q_NK, log_tail_N: natural logarithms of probabilities.
    """

    ids_NK: Tensor
    log_q_NK: Tensor
    log_tail_N: Tensor
    vocabulary_rows: int

    def first_rows(self, rows: int) -> TopKTeacher:
        assert rows == self.vocabulary_rows, "the tail is of all rows"
        return self

    def put(self, chunk: slice, student_logits_NV: Tensor, out_NV: Tensor) -> None:
        ids_NK = self.ids_NK[chunk]
        out_NV.copy_(student_logits_NV).scatter_(1, ids_NK, -torch.inf)
        log_tail_N = self.log_tail_N[chunk].to(out_NV.dtype)
        out_NV.add_((log_tail_N - torch.logsumexp(out_NV, dim=1))[:, None])
        out_NV.scatter_(1, ids_NK, self.log_q_NK[chunk].to(out_NV.dtype))


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K] int32, log q [N, K], log of the rest [N]) of a distribution given by its logits, fp32; K < V.

    The rest has at least a probability of exp(SMALLEST), so that no logarithm is infinite.
    """
    log_q_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    log_q_NK, ids_NK = log_q_NV.topk(k, dim=-1)
    rest_NV = log_q_NV.scatter(1, ids_NK, -torch.inf)
    return ids_NK.to(torch.int32), log_q_NK, torch.logsumexp(rest_NV, dim=-1).clamp(min=SMALLEST)
