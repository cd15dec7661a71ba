"""Divergences between the next-token distributions of the student, p, and the teacher, q: one function each.

A function takes log p and log q, both [N, V] (N response tokens, V vocabulary rows, float32 or float64), and returns
the value of each token in nats, [N]. What it reads of the recipe besides (`beta`, `skew`) are further parameters of
the same names. The first line of its docstring is shown by `dae keys`.

Autograd differentiates them, one block of tokens at a time. Where analytic_gradients.py has the same name, that runs
instead. Only methods of tensors are used here: recipes take the names from DIVERGENCES, and reading a recipe must not
import torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(q || p)."""
    return kl(log_q_NV, log_p_NV)


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q)."""
    return kl(log_p_NV, log_q_NV)


def jsd(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    Agarwal et al. 2023, arXiv 2306.13649, eq. 1; beta above 0 and below 1 (TokenLoss.kind has the two ends).
    """
    log_m_NV = log_mixture(log_q_NV, log_p_NV, beta)
    return beta * kl(log_q_NV, log_m_NV) + (1 - beta) * kl(log_p_NV, log_m_NV)


def skewed_forward_kl(log_p_NV: Tensor, log_q_NV: Tensor, skew: float) -> Tensor:
    """KL(q || skew q + (1 - skew) p).

    DistiLLM, arXiv 2402.03898; never above -log(skew).
    """
    return kl(log_q_NV, log_mixture(log_q_NV, log_p_NV, skew))


def skewed_reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q).

    DistiLLM, arXiv 2402.03898; never above -log(skew).
    """
    return kl(log_p_NV, log_mixture(log_p_NV, log_q_NV, skew))


def tvd(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Total variation distance, sum |p - q| / 2.

    Wen et al. 2023, arXiv 2307.15190, per token; never above 1.
    """
    return (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1) / 2


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "tvd": tvd,
}


def parameters_of(name: str) -> list[str]:
    """What a divergence reads of the recipe beside the two distributions."""
    return list(inspect.signature(DIVERGENCES[name]).parameters)[2:]


def kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """[N] KL(a || b)."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def log_mixture(log_a_NV: Tensor, log_b_NV: Tensor, share: float) -> Tensor:
    """[N, V] log(share a + (1 - share) b)."""
    return (log_a_NV + math.log(share)).logaddexp(log_b_NV + math.log(1 - share))
