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
ABSENT = -1e30  # a logit whose probability is exactly 0; finite, so that 0 times it is 0


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


@dataclass(frozen=True)
class SampledTeacher:
    """S tokens drawn from it at each position (arXiv 2503.16870): q' = how often each was drawn / S.

    The expectation of q' is q, so forward KL's gradient p - q' is unbiased. So is its value, once the entropy of q'
    gives way to the teacher's own: -H(q) - sum q' log p, which may be below 0 for a token. Both hold for a student that
    does not depend on the draws: not for one that has learnt from them. No other divergence is linear in q.

    ids_NS int64, each position's in ascending order; entropy_N: of the whole distribution, in nats.
    """

    ids_NS: Tensor
    entropy_N: Tensor
    vocabulary_rows: int

    def first_rows(self, rows: int) -> SampledTeacher:
        assert rows == self.vocabulary_rows, "samples are of all rows"
        return self

    def put(self, chunk: slice, student_logits_NV: Tensor, out_NV: Tensor) -> None:
        ids_NS = self.ids_NS[chunk]
        share = torch.full((1, 1), 1.0 / ids_NS.shape[1], dtype=out_NV.dtype, device=out_NV.device)
        out_NV.zero_().scatter_add_(1, ids_NS, share.expand_as(ids_NS)).log_().clamp_(min=ABSENT)

    def entropy_gap(self) -> Tensor:
        """Sum over tokens of H(q') - H(q): what makes KL(q' || p) an unbiased estimate of KL(q || p)."""
        ids_NS = self.ids_NS.contiguous()  # in order, as they are drawn
        count_NS = torch.searchsorted(ids_NS, ids_NS, right=True) - torch.searchsorted(ids_NS, ids_NS)
        share_NS = count_NS.to(self.entropy_N.dtype) / ids_NS.shape[1]
        return (-share_NS.log().mean(-1) - self.entropy_N).sum()


def systematic_samples(logits_NV: Tensor, offsets_N: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """S equidistant draws from a distribution given by its logits: (ids [N, S] int32, ascending; entropy [N] fp32).

    offsets_N: uniform in 0..1, fp64. Draw i is the token at (i + offset) / S of the cumulative distribution. So a token
    is drawn S * q times on average, and always less than one time more or fewer; independent draws scatter more.
    """
    log_q_NV = torch.log_softmax(logits_NV.double(), dim=-1)
    q_NV = log_q_NV.exp()
    cumulative_NV = q_NV.cumsum(dim=-1)
    points_NS = (offsets_N[:, None] + torch.arange(samples, device=offsets_N.device)) / samples
    ids_NS = torch.searchsorted(cumulative_NV, points_NS * cumulative_NV[:, -1:], right=True)
    # Rounding may put the last point at the end, after the last token that has a probability.
    last_N1 = cumulative_NV.argmax(dim=-1, keepdim=True)
    return torch.minimum(ids_NS, last_N1).to(torch.int32), torch.special.entr(q_NV).sum(-1).float()


def top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, K] int32, log q [N, K], log of the rest [N]) of a distribution given by its logits, fp32; K < V.

    The rest has at least a probability of exp(SMALLEST), so that no logarithm is infinite.
    """
    log_q_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    log_q_NK, ids_NK = log_q_NV.topk(k, dim=-1)
    rest_NV = log_q_NV.scatter(1, ids_NK, -torch.inf)
    return ids_NK.to(torch.int32), log_q_NK, torch.logsumexp(rest_NV, dim=-1).clamp(min=SMALLEST)
