"""The nearest low-rank update to a weight difference (Eckart, Young 1936)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One matrix's update B A: a_RI [rank, inputs], b_OR [outputs, rank], float32; squared norms of D and of B A."""

    a_RI: Tensor
    b_OR: Tensor
    whole: float
    kept: float


def low_rank(difference_OI: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The nearest update of this rank, or of the lowest rank that keeps this share of the squared norm.

    difference_OI: [outputs, inputs] float32. Exactly one of rank and energy is given.
    """
    u_OK, s_K, v_KI = torch.linalg.svd(difference_OI, full_matrices=False)
    energies_K = s_K.double().square()
    if rank is None:
        assert energy is not None
        share_K = energies_K.cumsum(0) / energies_K.sum()
        rank = int((share_K < energy).sum()) + 1
    rank = min(rank, len(s_K))
    root_R = s_K[:rank].sqrt()
    a_RI = (root_R[:, None] * v_KI[:rank]).contiguous().cpu()
    b_OR = (u_OK[:, :rank] * root_R).contiguous().cpu()
    return Factors(a_RI, b_OR, float(energies_K.sum()), float(energies_K[:rank].sum()))
