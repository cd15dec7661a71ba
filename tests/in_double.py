"""float64 all the way: transformers' norms and softmaxes step down to float32 whatever their input is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Inside of it a float64 tensor stays one where it is asked for as float32.

    What float32 rounds (6e-8) depends on the shapes of a batch and on the processor, and a pico model's backward pass
    makes up to 2e-6 of it: comparisons to 1e-6 and better need it away.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if is_double and function is torch.Tensor.float:
            return args[0]
        if is_double:
            args = [torch.float64 if arg is torch.float32 else arg for arg in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))
