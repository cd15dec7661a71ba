"""A loss beside the token loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kd.data.batches import Batch
from kd.models.head import Head


class AuxiliaryLoss(Protocol):
    """A loss between student and teacher beside the token loss, such as that of attention maps; logged by its name.

    It is a sum over the response tokens of a batch, so that the trainer's one normaliser is its normaliser, too.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def recording(self, batch: Batch) -> contextlib.AbstractContextManager[Callable[[Tensor, Head], Tensor]]:
        """Both models run on the batch inside of it, the teacher first; afterwards the function gives the sum.

        The function takes the student's final hidden states [B, T - 1, D] and its head.
        """
        ...
