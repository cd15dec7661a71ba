"""An accelerator that is not there: tensors with real values that say they lie on another device than the CPU.

    with Elsewhere():
        model.to(DEVICE)(input_ids.to(DEVICE))

A tensor of the CPU that meets such tensors raises RuntimeError, as it would on a GPU, with a GPU's exceptions: numbers
(0-dimensional tensors) may, except where tensors are put together, and so may indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("mps", 0)  # torch knows the name, and looks for no driver before it is asked for memory
CPU = torch.device("cpu")
MOVES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)
JOINS = (torch.ops.aten.cat, torch.ops.aten.stack)
BY_INDEX = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Placed(Tensor):
    """A tensor elsewhere. To torch's own code it is one without memory; `inner`, on the CPU, has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Placed({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside, tensors can be made on DEVICE and moved there."""

    def __enter__(self) -> Elsewhere:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=DEVICE) comes by here, too
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operation, on the CPU's values; the result lies where a GPU's would."""
    packet = func.overloadpacket
    asked = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
    any_placed = any(isinstance(leaf, Placed) for leaf in tree_leaves((args, kwargs)))
    if any_placed and packet not in MOVES:
        refuse_strangers(func, [args[0], *args[2:]] if packet in BY_INDEX else args)
    inner_args, inner_kwargs = tree_map_only(Placed, lambda tensor: tensor.inner, (args, dict(kwargs)))
    inner_args, inner_kwargs = tree_map_only(torch.device, lambda _: CPU, (inner_args, inner_kwargs))
    result = func(*inner_args, **inner_kwargs)
    if packet is torch.ops.aten.copy_:
        return args[0]
    if not (any_placed if asked is None else asked != CPU):
        return result
    result = tree_map_only(Tensor, Placed, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if any_placed else result


def refuse_strangers(func: Any, given: Sequence[Any]) -> None:
    """Raise RuntimeError where a tensor of the CPU is among those given."""
    for leaf in tree_leaves(given):
        if isinstance(leaf, Tensor) and not isinstance(leaf, Placed) and (leaf.dim() or func.overloadpacket in JOINS):
            raise RuntimeError(f"{func}: a tensor {list(leaf.shape)} on the CPU meets tensors on {DEVICE}")
