"""The loss of response tokens, from hidden states and heads.

    l_t = (1 - lambda) * NTP_t + lambda * T^2 * D( teacher, student )_t,  both distributions softened by T in D

D is a divergence (divergences.py), with a gradient of analytic_gradients.py or by autograd. No tensor of N x V is made
(chunked.py). Every function returns sums over tokens; the trainer divides once, by the count of the whole optimizer
step.

Shape legend: S sides (student, and teacher where there is one), N response tokens, D width of the student, V vocabulary
rows that both have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kd.losses.analytic_gradients import ANALYTIC, forward_kl_of_logits, log_normaliser
from kd.losses.chunked import ChunkedLoss
from kd.losses.divergences import DIVERGENCES, parameters_of
from kd.models.head import Head
from kd.models.teacher_logits import SampledTeacher, TeacherLogits


@dataclass(frozen=True)
class TokenLoss:
    """What one response token costs: (1 - lambda) * NTP + lambda * T^2 * divergence at temperature T.

    weight: lambda, the weight of the divergence in 0..1 (0 is plain next-token prediction).
    divergence: a name in DIVERGENCES.
    beta: only for `jsd`: 0 is forward KL, 1 is reverse KL, between them the formula, whose limits at 0 and 1 are 0.
    skew: only for the skewed divergences, above 0 and below 1.
    """

    weight: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1

    @property
    def kind(self) -> str:
        """The divergence after the convention on beta's two ends."""
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        return self.divergence

    @property
    def is_reported_kl(self) -> bool:
        """Whether the divergence is the KL that is reported in any case: forward, at temperature 1."""
        return self.temperature == 1.0 and self.kind == "forward_kl"


@dataclass(frozen=True)
class LossSums:
    """Sums over response tokens, in nats. Only `loss` carries a gradient.

    loss: as TokenLoss defines it; kl: KL(teacher || student) at temperature 1, NaN without a teacher;
    ntp: -log p_student(label). All 0-dimensional, fp32 (fp64 for fp64 inputs).
    """

    loss: Tensor
    kl: Tensor
    ntp: Tensor


def token_loss_sums(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    token_loss: TokenLoss,
    teacher: TeacherLogits | None = None,
    *,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Sum the loss of N response tokens from final hidden states; DAE's eq. for one route (arXiv 2406.19112).

    hidden_ND [N, D] (any float dtype) and what the teacher says stand at the positions that predict labels_N [N] int64.
    The heads may differ in width and in padding: both distributions are over the rows they have in common, which must
    hold every label. N = 0 gives zeros that are still connected to the graph.

    Gradients reach hidden_ND and head.weight_VD / bias_V where they ask for it, never the teacher's side. They are
    worked out in the forward pass, so the product is formed even if backward is never called (not under no_grad).
    """
    assert teacher is not None or token_loss.weight == 0.0, "a divergence needs a teacher"
    if teacher is not None:
        rows = min(head.weight_VD.shape[0], teacher.vocabulary_rows)
        head, teacher = head.first_rows(rows), teacher.first_rows(rows)
    weight_VD, bias_V = head.weight_VD, head.bias_V
    if not torch.is_grad_enabled():  # a weight that trains would ask for its gradient even so
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    loss, kl, ntp = ChunkedLoss.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        head,
        labels_N,
        teacher,
        partial(block_sums, token_loss),
        chunk_tokens,
    )
    if teacher is None:
        return LossSums(loss, torch.full_like(kl, math.nan), ntp)
    if isinstance(teacher, SampledTeacher):
        assert token_loss.weight == 0.0 or token_loss.is_reported_kl, "samples are unbiased for forward KL only"
        gap = teacher.entropy_gap().to(kl.dtype)
        return LossSums(loss + token_loss.weight * gap, kl + gap, ntp)
    return LossSums(loss, kl, ntp)


def block_sums(
    token_loss: TokenLoss, logits_SNV: Tensor, labels_N: Tensor, space_SNV: Tensor, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """([loss, kl, ntp] summed over the block, d loss / d the student's logits where wanted): a chunked.BlockLoss."""
    logits_NV, p_NV = logits_SNV[0], space_SNV[0]
    torch.softmax(logits_NV, dim=-1, out=p_NV)
    log_normaliser_N = log_normaliser(logits_NV, p_NV)
    ntp = (log_normaliser_N - logits_NV.gather(1, labels_N[:, None])[:, 0]).sum()
    if len(logits_SNV) == 1:
        sums = torch.stack([ntp, torch.zeros_like(ntp), ntp])
        return sums, subtract_at_labels(p_NV, labels_N, 1.0) if wants_grad else None

    teacher_logits_NV, q_NV = logits_SNV[1], space_SNV[1]
    weight, temperature = token_loss.weight, token_loss.temperature
    divergence, divergence_grad_NV = torch.zeros_like(ntp), None
    if weight > 0.0 and not token_loss.is_reported_kl:
        divergence, divergence_grad_NV = divergence_sum(token_loss, logits_NV, teacher_logits_NV, wants_grad)
    torch.softmax(teacher_logits_NV, dim=-1, out=q_NV)
    kl = forward_kl_of_logits(logits_NV, log_normaliser_N, teacher_logits_NV, q_NV)

    loss = weight * temperature**2 * (kl if token_loss.is_reported_kl else divergence)
    if weight < 1.0:
        loss = loss + (1.0 - weight) * ntp
    sums = torch.stack([loss, kl, ntp])
    if not wants_grad:
        return sums, None
    if token_loss.is_reported_kl:  # weight * (p - q) + (1 - weight) * p
        grad_NV = p_NV.sub_(q_NV, alpha=weight)
    else:
        grad_NV = p_NV.mul_(1.0 - weight)
        if divergence_grad_NV is not None:  # T^2 from the loss, 1/T from logits / T
            grad_NV.add_(divergence_grad_NV, alpha=weight * temperature)
    return sums, subtract_at_labels(grad_NV, labels_N, 1.0 - weight) if weight < 1.0 else grad_NV


def divergence_sum(
    token_loss: TokenLoss, logits_NV: Tensor, teacher_logits_NV: Tensor, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence summed over tokens, and its gradient with respect to the student's logits / T."""
    name = token_loss.kind
    settings = {key: getattr(token_loss, key) for key in parameters_of(name)}
    log_q_NV = torch.log_softmax(teacher_logits_NV / token_loss.temperature, dim=-1)
    if name in ANALYTIC:
        return ANALYTIC[name](torch.log_softmax(logits_NV / token_loss.temperature, dim=-1), log_q_NV, **settings)
    with torch.set_grad_enabled(wants_grad):  # off inside of an autograd function
        scaled_NV = (logits_NV / token_loss.temperature).requires_grad_(wants_grad)
        divergence = DIVERGENCES[name](torch.log_softmax(scaled_NV, dim=-1), log_q_NV, **settings).sum()
    return divergence.detach(), torch.autograd.grad(divergence, scaled_NV)[0] if wants_grad else None


def subtract_at_labels(values_NV: Tensor, labels_N: Tensor, amount: float) -> Tensor:
    return values_NV.scatter_add_(1, labels_N[:, None], torch.full_like(values_NV[:, :1], -amount))
