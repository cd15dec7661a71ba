"""Divergences of divergences.py with their gradients written out, for speed and for an exact zero.

A function takes log p and log q, both [N, V], and returns the sum over the N tokens and its gradient with respect to
the logits of p. It makes few tensors of this size and works in place on those. Between equal distributions the
gradient is exactly 0; autograd's is rounding noise, which AdamW turns into steps of full size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p); gradient p - q."""
    q_NV = log_q_NV.exp()
    divergence = (log_q_NV - log_p_NV).mul_(q_NV).sum()
    return divergence, log_p_NV.exp().sub_(q_NV)


def forward_kl_of_logits(
    logits_NV: Tensor, log_normaliser_N: Tensor, teacher_logits_NV: Tensor, q_NV: Tensor
) -> Tensor:
    """KL(q || p) at temperature 1, from logits and what is known of them; gradient p - q. Overwrites teacher_logits_NV.

    sum q (log q - log p) with both normalisers outside of the sum: two passes of exp instead of four.
    """
    normaliser_ratio_N = log_normaliser(teacher_logits_NV, q_NV) - log_normaliser_N
    return (teacher_logits_NV.sub_(logits_NV).mul_(q_NV).sum(-1) - normaliser_ratio_N).sum()


def log_normaliser(logits_NV: Tensor, probabilities_NV: Tensor) -> Tensor:
    """[N] log sum exp of the logits whose softmax is known; the largest probability is never 0."""
    return logits_NV.amax(-1) - probabilities_NV.amax(-1).log()


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q); gradient p (log p - log q - KL)."""
    p_NV = log_p_NV.exp()
    log_ratio_NV = log_p_NV - log_q_NV
    divergence_N = (p_NV * log_ratio_NV).sum(-1, keepdim=True)
    return divergence_N.sum(), log_ratio_NV.sub_(divergence_N).mul_(p_NV)


def jsd(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; gradient (1 - beta) p (log p/m - KL(p || m)).

    log p/m is taken from d = log q - log p, never from m itself: it is then exactly 0 where p = q.
    """
    d_NV = log_q_NV - log_p_NV
    log_p_over_m_NV = _log_mixture(d_NV, beta).neg_()
    p_NV = log_p_NV.exp()
    kl_p_m_N = (p_NV * log_p_over_m_NV).sum(-1, keepdim=True)
    kl_q_m = (log_q_NV.exp() * (d_NV + log_p_over_m_NV)).sum()
    divergence = beta * kl_q_m + (1 - beta) * kl_p_m_N.sum()
    return divergence, log_p_over_m_NV.sub_(kl_p_m_N).mul_(p_NV).mul_(1 - beta)


def skewed_forward_kl(log_p_NV: Tensor, log_q_NV: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || m), m = skew q + (1 - skew) p; with r = q/m - 1 its gradient is (1 - skew) p (sum p r - r)."""
    log_m_over_q_NV = _log_mixture(log_p_NV - log_q_NV, 1.0 - skew)
    divergence = -(log_q_NV.exp().mul_(log_m_over_q_NV)).sum()
    p_NV, r_NV = log_p_NV.exp(), log_m_over_q_NV.neg_().expm1_()
    mean_N = (p_NV * r_NV).sum(-1, keepdim=True)
    return divergence, r_NV.neg_().add_(mean_N).mul_(p_NV).mul_(1.0 - skew)


def skewed_reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || m), m = skew p + (1 - skew) q; with g = log p/m - skew (p/m - 1) its gradient is p (g - sum p g)."""
    p_NV = log_p_NV.exp()
    log_p_over_m_NV = _log_mixture(log_q_NV - log_p_NV, 1.0 - skew).neg_()
    divergence = (p_NV * log_p_over_m_NV).sum()
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


ANALYTIC: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    one.__name__: one for one in (forward_kl, reverse_kl, jsd, skewed_forward_kl, skewed_reverse_kl)
}
