"""Weights that FSDP2 has sharded over the ranks: which they are, whole ones to read, and how to write to them.

Outside of a forward pass a sharded weight is a DTensor that holds this rank's part. Whatever reads or writes one whole
is a collective call: every rank has to make it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model's weights over the ranks."""
    return isinstance(model, FSDPModule)


def class_of(module: nn.Module) -> type:
    """The class of a module before FSDP2 put one of its own in its place."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Let go of the whole weights that a forward pass has left; `named_parameters` gives them instead of the parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a weight; the same tensor where it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a weight, which shares its memory; the same tensor where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(weight: Tensor, value: Tensor) -> None:
    """Copy all of a weight's values into it, sharded or not; of a sharded one those of the first rank."""
    if isinstance(weight, DTensor):
        value = distribute_tensor(value.to(weight.device, weight.dtype), weight.device_mesh, weight.placements)
    weight.copy_(value)


def whole_on_main(tensors: Mapping[str, Tensor], *, is_main: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, one after the other, on the CPU of the main process; the other ranks only take part."""
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if is_main:
            yield name, complete.cpu()
