"""A loss over logits that never exist all at once: tokens are taken in chunks, and a chunk is worked on in blocks.

Products with a head's weights want many tokens at once, softmaxes and divergences want few, so that they stay in a
cache. A chunk's logits live for a moment, each block's gradient takes the place of its logits, and the gradient with
respect to the hidden states (N x D) is worked out while they do.

Shape legend: S sides (student, and teacher where there is one), N response tokens, D width of the student, V vocabulary
rows that both have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kd.models.head import Head, slices, sum_dtype
from kd.models.teacher_logits import TeacherLogits

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

# (logits [S, N, V], labels [N], space [S, N, V], whether a gradient is wanted) -> (sums [3], of which the first is the
# loss; d loss / d the student's logits [N, V], or None). It may overwrite logits and space, and return a part of space.
BlockLoss = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


class ChunkedLoss(torch.autograd.Function):
    """[3] sums of a BlockLoss over all tokens; only the first carries a gradient.

    The gradients are worked out in the forward pass; backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        labels_N: Tensor,
        teacher: TeacherLogits | None,
        block_loss: BlockLoss,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Inside forward autograd is off; what the caller asked for is in needs_input_grad.
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = sum_dtype(weight_VD.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if wants_bias and bias_V is not None else None
        totals = torch.zeros(3, dtype=dtype, device=hidden_ND.device)
        # The same memory for every chunk: fresh memory can cost a CPU more in page faults than the arithmetic on it.
        sides, vocabulary, device = (1 if teacher is None else 2), weight_VD.shape[0], hidden_ND.device.type
        chunk_tokens = chunk_tokens or max(FEWEST_CHUNK_TOKENS, logits_elements(device) // vocabulary)
        block_tokens = max(1, block_elements(device) // vocabulary)
        logits_SNV = hidden_ND.new_empty(sides, min(chunk_tokens, len(labels_N)), vocabulary, dtype=dtype)
        space_SNV = hidden_ND.new_empty(sides, min(block_tokens, logits_SNV.shape[1]), vocabulary, dtype=dtype)

        for chunk in slices(len(labels_N), chunk_tokens):
            chunk_SNV = logits_SNV[:, : chunk.stop - chunk.start]
            head.logits(hidden_ND[chunk], chunk_SNV[0])
            if teacher is not None:
                teacher.put(chunk, chunk_SNV[0], chunk_SNV[1])
            for block in slices(chunk_SNV.shape[1], block_tokens):
                block_SNV, space = chunk_SNV[:, block], space_SNV[:, : block.stop - block.start]
                sums, grad_NV = block_loss(block_SNV, labels_N[chunk][block], space, any(ctx.needs_input_grad[:3]))
                totals += sums
                if grad_NV is not None:
                    _put_gradient(grad_NV, block_SNV[0], head)
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
        loss, *others = totals.unbind()
        ctx.mark_non_differentiable(*others)
        return loss.clone(), others[0], others[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND * grad_loss.to(grad_hidden_ND.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        if grad_bias_V is not None:
            grad_bias_V = (grad_bias_V * grad_loss).to(ctx.weight_dtype)
        return (grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None, None, None)


def _put_gradient(grad_NV: Tensor, logits_NV: Tensor, head: Head) -> None:
    """From d/d logits to d/d (hidden @ weight.T + bias), which takes the place of the logits."""
    if head.softcap is not None:
        grad_NV.mul_(logits_NV.div_(head.softcap).square_().neg_().add_(1.0))
    torch.mul(grad_NV, head.scale, out=logits_NV)


def logits_elements(device_type: str) -> int:
    """How many logits of one model exist at once, unless FEWEST_CHUNK_TOKENS have more."""
    return CPU_LOGITS_ELEMENTS if device_type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS


def block_elements(device_type: str) -> int:
    return CPU_BLOCK_ELEMENTS if device_type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
