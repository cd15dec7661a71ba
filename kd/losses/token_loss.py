"""Divergences between two next-token distributions, from hidden states and heads, chunked over tokens.

Shape legend: N response tokens, D width of the student, E width of the teacher, V vocabulary rows that both heads have.

Nothing here makes a tensor of N x V: tokens are taken in chunks, each chunk's logits live for a moment, and the
gradient with respect to the hidden states (N x D) is worked out while they do. Products with a head's weights want many
tokens at once, softmaxes and divergences want few, so that they stay in a cache: a chunk is worked on block by block,
and each block's gradient takes the place of its logits. The backward pass is written out instead of recorded, so
KL(p, p) has a gradient of exactly zero (autograd's is rounding noise, which AdamW blows up to full-size steps).

Every function returns sums over tokens; the trainer divides once, by the count of the whole optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kd.models.head import Head, slices, sum_dtype

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"]

# Elements of a chunk where several tensors of its size live at once (16 MiB each in fp32 on a CPU, 256 MiB on an
# accelerator), and where only both sides' logits do. Of fewer tokens, reading the head's weights costs more than
# multiplying by them.
CPU_CHUNK_ELEMENTS = 2**22
CPU_LOGITS_ELEMENTS = 2**23
ACCELERATOR_CHUNK_ELEMENTS = 2**26
FEWEST_CHUNK_TOKENS = 64
# Elements of one block of a chunk: what a CPU's cache holds; on an accelerator, what makes a kernel worth its launch.
CPU_BLOCK_ELEMENTS = 2**18
ACCELERATOR_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class TokenLoss:
    """What one response token costs: (1 - lambda) * NTP + lambda * T^2 * divergence at temperature T.

    weight: lambda, the weight of the divergence in 0..1 (0 is plain next-token prediction).
    beta: only for `jsd`: 0 is forward KL, 1 is reverse KL, between them the generalised Jensen-Shannon divergence
    beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) * student
    (Agarwal et al. 2023, arXiv 2306.13649, eq. 1). The limits 0 and 1 of that formula are 0, hence the convention.
    skew: only for the skewed divergences of DistiLLM (arXiv 2402.03898), above 0 and below 1: how much of the first
    distribution is mixed into the second; skewed_forward_kl is KL(teacher || skew * teacher + (1 - skew) * student),
    skewed_reverse_kl is KL(student || skew * student + (1 - skew) * teacher).
    """

    weight: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1

    @property
    def kind(self) -> Divergence:
        """The divergence after the convention on beta's two ends."""
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        return self.divergence


@dataclass(frozen=True)
class LossSums:
    """Sums over response tokens, in nats. Only `loss` carries a gradient.

    loss: what TokenLoss says; kl: KL(teacher || student) at temperature 1, NaN without a teacher;
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
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: Head | None = None,
    *,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Sum the loss of N response tokens from final hidden states; DAE's eq. for one route (arXiv 2406.19112).

    hidden_ND [N, D] and teacher_hidden_NE [N, E] (any float dtype) stand at the positions that predict labels_N [N]
    int64. The heads may differ in width and in padding: both distributions are over the rows they have in common, which
    must hold every label. N = 0 gives zeros that are still connected to the graph.

    Gradients reach hidden_ND and head.weight_VD / bias_V where they ask for it, never the teacher's side. They are
    worked out in the forward pass, so the product is formed even if backward is never called (not under no_grad).
    """
    assert (teacher_hidden_NE is None) == (teacher_head is None), "a teacher is hidden states and a head"
    assert teacher_head is not None or token_loss.weight == 0.0, "a divergence needs a teacher"
    if teacher_head is not None:
        rows = min(head.weight_VD.shape[0], teacher_head.weight_VD.shape[0])
        head, teacher_head = head.first_rows(rows), teacher_head.first_rows(rows)
    if chunk_tokens is None:
        chunk_tokens = max(FEWEST_CHUNK_TOKENS, logits_elements(hidden_ND.device.type) // head.weight_VD.shape[0])
    loss, kl, ntp = _ChunkedLoss.apply(
        hidden_ND,
        head.weight_VD,
        head.bias_V,
        head,
        labels_N,
        token_loss,
        None if teacher_hidden_NE is None else teacher_hidden_NE.detach(),
        teacher_head,
        chunk_tokens,
    )
    return LossSums(loss, kl, ntp)


class _ChunkedLoss(torch.autograd.Function):
    """Forward over chunks with the gradients worked out on the way; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        labels_N: Tensor,
        token_loss: TokenLoss,
        teacher_hidden_NE: Tensor | None,
        teacher_head: Head | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inside forward autograd is off; what the caller asked for is in needs_input_grad.
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = sum_dtype(weight_VD.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if wants_bias and bias_V is not None else None
        totals = torch.zeros(3, dtype=dtype, device=hidden_ND.device)
        # The same memory for every chunk: fresh memory can cost a CPU more in page faults than the arithmetic on it.
        sides, vocabulary = (1 if teacher_head is None else 2), weight_VD.shape[0]
        block_tokens = max(1, block_elements(hidden_ND.device.type) // vocabulary)
        logits_SNV = hidden_ND.new_empty(sides, min(chunk_tokens, len(labels_N)), vocabulary, dtype=dtype)
        space_SNV = hidden_ND.new_empty(sides, min(block_tokens, logits_SNV.shape[1]), vocabulary, dtype=dtype)

        for chunk in slices(len(labels_N), chunk_tokens):
            chunk_SNV = logits_SNV[:, : chunk.stop - chunk.start]
            head.logits(hidden_ND[chunk], chunk_SNV[0])
            if teacher_head is not None and teacher_hidden_NE is not None:
                teacher_head.logits(teacher_hidden_NE[chunk], chunk_SNV[1])
            for block in slices(chunk_SNV.shape[1], block_tokens):
                totals += _block_sums(
                    chunk_SNV[:, block],
                    labels_N[chunk][block],
                    head,
                    token_loss,
                    wants_hidden or wants_weight or wants_bias,
                    space_SNV[:, : block.stop - block.start],
                )
            grad_NV = chunk_SNV[0]
            if grad_bias_V is not None:
                grad_bias_V += grad_NV.sum(0)
            if grad_hidden_ND is None and grad_weight_VD is None:
                continue
            grad_NV = grad_NV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = (grad_NV @ weight_VD).to(hidden_ND.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_NV.T @ hidden_ND[chunk].to(weight_VD.dtype)

        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.weight_dtype = weight_VD.dtype
        loss, kl, ntp = totals.unbind()
        if teacher_head is None:
            kl = torch.full_like(kl, math.nan)
        ctx.mark_non_differentiable(kl, ntp)
        return loss.clone(), kl, ntp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _kl: Tensor, _ntp: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND * grad_loss.to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        if grad_bias_V is not None:
            grad_bias_V = (grad_bias_V * grad_loss).to(ctx.weight_dtype)
        return (grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None, None, None, None)


def _block_sums(
    logits_SNV: Tensor, labels_N: Tensor, head: Head, token_loss: TokenLoss, wants_grad: bool, space_SNV: Tensor
) -> Tensor:
    """[loss, kl, ntp] summed over the block; where wanted, d loss / d (hidden @ weight.T + bias) replaces the logits.

    logits_SNV: the student's and, with a teacher, the teacher's; both are overwritten. space_SNV: memory for p and q.
    """
    logits_NV, p_NV = logits_SNV[0], space_SNV[0]
    torch.softmax(logits_NV, dim=-1, out=p_NV)
    normaliser_N = _log_normaliser(logits_NV, p_NV)
    ntp = (normaliser_N - logits_NV.gather(1, labels_N[:, None])[:, 0]).sum()
    if len(logits_SNV) == 1:
        if wants_grad:
            _put_gradient(_subtract_at_labels(p_NV, labels_N, 1.0), logits_NV, head)
        return torch.stack([ntp, torch.zeros_like(ntp), ntp])

    teacher_logits_NV, q_NV = logits_SNV[1], space_SNV[1]
    weight, temperature = token_loss.weight, token_loss.temperature
    is_reported_kl = temperature == 1.0 and token_loss.kind == "forward_kl"
    divergence, divergence_grad_NV = torch.zeros_like(ntp), None
    if not is_reported_kl and weight > 0.0:
        log_p_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
        log_q_NV = torch.log_softmax(teacher_logits_NV / temperature, dim=-1)
        divergence, divergence_grad_NV = _divergence(log_p_NV, log_q_NV, token_loss, wants_grad)

    torch.softmax(teacher_logits_NV, dim=-1, out=q_NV)
    # sum q (log q - log p), with both normalisers outside of the sum: two passes of exp instead of four.
    normaliser_ratio_N = _log_normaliser(teacher_logits_NV, q_NV) - normaliser_N
    kl = (teacher_logits_NV.sub_(logits_NV).mul_(q_NV).sum(-1) - normaliser_ratio_N).sum()
    if is_reported_kl:
        divergence = kl
    loss = weight * temperature**2 * divergence
    if weight < 1.0:
        loss = loss + (1.0 - weight) * ntp
    if wants_grad:
        if is_reported_kl:  # weight * (p - q) + (1 - weight) * p
            grad_NV = p_NV.sub_(q_NV, alpha=weight)
        else:
            grad_NV = p_NV.mul_(1.0 - weight)
            if divergence_grad_NV is not None:  # T^2 from the loss, 1/T from logits / T
                grad_NV.add_(divergence_grad_NV, alpha=weight * temperature)
        if weight < 1.0:
            _subtract_at_labels(grad_NV, labels_N, 1.0 - weight)
        _put_gradient(grad_NV, logits_NV, head)
    return torch.stack([loss, kl, ntp])


def _log_normaliser(logits_NV: Tensor, probabilities_NV: Tensor) -> Tensor:
    """[N] log sum exp of the logits whose softmax is known; the largest probability is never 0."""
    return logits_NV.amax(-1) - probabilities_NV.amax(-1).log()


def _subtract_at_labels(values_NV: Tensor, labels_N: Tensor, amount: float) -> Tensor:
    """Subtract from each row's label, in place."""
    return values_NV.scatter_add_(1, labels_N[:, None], torch.full_like(values_NV[:, :1], -amount))


def _divergence(
    log_p_NV: Tensor, log_q_NV: Tensor, token_loss: TokenLoss, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The chosen divergence between student p and teacher q, and its gradient with respect to p's logits."""
    if token_loss.kind == "forward_kl":
        return _forward_kl(log_p_NV, log_q_NV, wants_grad)
    if token_loss.kind == "reverse_kl":
        return _reverse_kl(log_p_NV, log_q_NV, wants_grad)
    if token_loss.kind == "skewed_forward_kl":
        return _skewed_forward_kl(log_p_NV, log_q_NV, token_loss.skew, wants_grad)
    if token_loss.kind == "skewed_reverse_kl":
        return _skewed_reverse_kl(log_p_NV, log_q_NV, token_loss.skew, wants_grad)
    return _jsd(log_p_NV, log_q_NV, token_loss.beta, wants_grad)


def _forward_kl(log_p_NV: Tensor, log_q_NV: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q || p) = sum q (log q - log p); gradient p - q."""
    q_NV = log_q_NV.exp()
    divergence = (log_q_NV - log_p_NV).mul_(q_NV).sum()
    return divergence, log_p_NV.exp().sub_(q_NV) if wants_grad else None


def _reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p || q) = sum p (log p - log q); gradient p (log p - log q - KL)."""
    p_NV = log_p_NV.exp()
    log_ratio_NV = log_p_NV - log_q_NV
    divergence_N = (p_NV * log_ratio_NV).sum(-1, keepdim=True)
    return divergence_N.sum(), log_ratio_NV.sub_(divergence_N).mul_(p_NV) if wants_grad else None


def _jsd(log_p_NV: Tensor, log_q_NV: Tensor, beta: float, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; gradient (1 - beta) p (log p/m - KL(p || m)).

    log p/m is taken from d = log q - log p, never from m itself: it is then exactly 0 where p = q.
    """
    d_NV = log_q_NV - log_p_NV
    log_p_over_m_NV = _log_mixture(d_NV, beta).neg_()
    p_NV = log_p_NV.exp()
    kl_p_m_N = (p_NV * log_p_over_m_NV).sum(-1, keepdim=True)
    kl_q_m = (log_q_NV.exp() * (d_NV + log_p_over_m_NV)).sum()
    divergence = beta * kl_q_m + (1 - beta) * kl_p_m_N.sum()
    if not wants_grad:
        return divergence, None
    return divergence, log_p_over_m_NV.sub_(kl_p_m_N).mul_(p_NV).mul_(1 - beta)


def _skewed_forward_kl(
    log_p_NV: Tensor, log_q_NV: Tensor, skew: float, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL(q || m), m = skew q + (1 - skew) p; with r = q/m - 1 its gradient is (1 - skew) p (sum p r - r)."""
    log_m_over_q_NV = _log_mixture(log_p_NV - log_q_NV, 1.0 - skew)
    divergence = -(log_q_NV.exp().mul_(log_m_over_q_NV)).sum()
    if not wants_grad:
        return divergence, None
    p_NV, r_NV = log_p_NV.exp(), log_m_over_q_NV.neg_().expm1_()
    mean_N = (p_NV * r_NV).sum(-1, keepdim=True)
    return divergence, r_NV.neg_().add_(mean_N).mul_(p_NV).mul_(1.0 - skew)


def _skewed_reverse_kl(
    log_p_NV: Tensor, log_q_NV: Tensor, skew: float, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL(p || m), m = skew p + (1 - skew) q; with g = log p/m - skew (p/m - 1) its gradient is p (g - sum p g)."""
    p_NV = log_p_NV.exp()
    log_p_over_m_NV = _log_mixture(log_q_NV - log_p_NV, 1.0 - skew).neg_()
    divergence = (p_NV * log_p_over_m_NV).sum()
    if not wants_grad:
        return divergence, None
    g_NV = log_p_over_m_NV - log_p_over_m_NV.expm1().mul_(skew)
    mean_N = (p_NV * g_NV).sum(-1, keepdim=True)
    return divergence, g_NV.sub_(mean_N).mul_(p_NV)


def _log_mixture(d_NV: Tensor, share: float) -> Tensor:
    """log(1 - share + share e^d): exactly 0 at d = 0 and finite however far d is from it (share below 1)."""
    return torch.where(
        d_NV <= 0,
        torch.log1p(share * torch.expm1(d_NV.clamp(max=0))),
        d_NV + torch.log1p((1 - share) * torch.expm1(-d_NV.clamp(min=0))),
    )


def _put_gradient(grad_NV: Tensor, logits_NV: Tensor, head: Head) -> None:
    """From d/d logits to d/d (hidden @ weight.T + bias), which takes the place of the logits."""
    if head.softcap is not None:
        grad_NV.mul_(logits_NV.div_(head.softcap).square_().neg_().add_(1.0))
    torch.mul(grad_NV, head.scale, out=logits_NV)


def logits_elements(device_type: str) -> int:
    """How many logits of one model exist at once, at the fewest tokens' more."""
    return CPU_LOGITS_ELEMENTS if device_type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS


def block_elements(device_type: str) -> int:
    """How many of them are worked on at once."""
    return CPU_BLOCK_ELEMENTS if device_type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
