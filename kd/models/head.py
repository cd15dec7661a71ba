"""The output layer as a value: weights, bias, scale and soft cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Vocabulary rows of one product on a CPU: its result stays in a cache until it is whole. In one piece the same product
# took 1.4 to 1.7 times as long (166 x 768 by 50,257).
CPU_PRODUCT_ROWS = 1024


@dataclass(frozen=True)
class Head:
    """The output layer of a causal LM: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    weight_VD: [V, D]; bias_V: [V] or None; scale: Cohere's `logit_scale`, Granite's 1 / `logits_scaling`;
    softcap: Gemma's `final_logit_softcapping`, None where there is none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def first_rows(self, rows: int) -> Head:
        """The same head over the first `rows` vocabulary entries (heads may be padded to different sizes)."""
        if rows == self.weight_VD.shape[0]:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:rows]
        return Head(self.weight_VD[:rows], bias_V, self.scale, self.softcap)

    def logits(self, hidden_ND: Tensor, out_NV: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, V]; the product in the weight's dtype (or autocast's), what follows in fp32 (fp64 stays fp64).

        out_NV: memory to put them in; its dtype then takes the place of that last one. Not differentiable.
        """
        dtype = sum_dtype(self.weight_VD.dtype) if out_NV is None else out_NV.dtype
        hidden_ND, weight_DV = hidden_ND.detach().to(self.weight_VD.dtype), self.weight_VD.detach().T
        if dtype == self.weight_VD.dtype and not torch.is_autocast_enabled(hidden_ND.device.type):
            logits_NV = _product(hidden_ND, weight_DV, out_NV)
        else:  # the product comes in another dtype than the sums; autocast, too, would pass over an `out`
            product_NV = hidden_ND @ weight_DV
            logits_NV = product_NV.to(dtype) if out_NV is None else out_NV.copy_(product_NV)
        if self.bias_V is not None:
            logits_NV.add_(self.bias_V.detach())
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def _product(hidden_ND: Tensor, weight_DV: Tensor, out_NV: Tensor | None) -> Tensor:
    """[N, D] @ [D, V] -> [N, V], into `out_NV` where there is one."""
    if out_NV is None or not out_NV.is_cpu:
        return torch.matmul(hidden_ND, weight_DV, out=out_NV)
    for rows in slices(weight_DV.shape[1], CPU_PRODUCT_ROWS):
        torch.matmul(hidden_ND, weight_DV[:, rows], out=out_NV[:, rows])
    return out_NV


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this one are summed: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slices(total: int, most: int) -> Iterator[slice]:
    """Cut 0..total into the fewest slices of at most `most`, all about as long."""
    count = -(-total // most)
    for index in range(count):
        yield slice(index * total // count, (index + 1) * total // count)
