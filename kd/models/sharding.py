"""Weights that FSDP2 or ZeRO-3 has sharded over the ranks: which they are, how to read whole ones and to write to them.

Outside of a forward pass a sharded weight holds this rank's part: FSDP2's is a DTensor, ZeRO-3's an empty parameter
with attributes `ds_...`. Whatever reads or writes one whole is a collective call: every rank has to make it, in the
same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded the model's weights over the ranks."""
    weight = next(model.parameters(), None)  # ZeRO-3 takes all or none
    return isinstance(model, FSDPModule) or (weight is not None and _is_partitioned(weight))


def is_engine(model: nn.Module) -> bool:
    """Whether this is DeepSpeed's wrapper around a model."""
    deepspeed = sys.modules.get("deepspeed")  # imported only where a run uses it
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def class_of(module: nn.Module) -> type:
    """The class of a module before FSDP2 put one of its own in its place."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Let go of the whole weights that a forward pass has left: FSDP2's `named_parameters` would give them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for weight in model.parameters():
        if _is_partitioned(weight):
            _settled(weight).partition()


def gather(layer: nn.Module) -> None:
    """Gather the weights of a layer that is read beside its forward pass; ZeRO-3 lets go of them itself, later."""
    for weight in layer.parameters():
        if _is_partitioned(weight):
            _settled(weight).all_gather()


def whole(tensor: Tensor) -> Tensor:
    """All of a weight; the same tensor where it is not sharded, or is gathered just now.

    ZeRO-3 knows a parameter, and nothing that is detached from it.
    """
    if _is_partitioned(tensor):
        weight = _settled(tensor)
        if tensor.numel() > 0:
            return tensor
        weight.all_gather()
        copy = tensor.detach().clone()
        weight.partition()
        return copy
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of all of a weight."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a weight, which shares its memory; the same tensor where it is not sharded."""
    if _is_partitioned(tensor):
        weight: Any = tensor
        part: Tensor = weight.ds_tensor.detach()
        begin = torch.distributed.get_rank() * part.numel()
        return part[: max(0, min(part.numel(), weight.ds_numel - begin))]  # the last parts are filled up
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(weight: Tensor, value: Tensor) -> None:
    """Copy all of a weight's values into it, sharded or not; of a sharded one those of the first rank."""
    if _is_partitioned(weight):
        import deepspeed

        with deepspeed.zero.GatheredParameters([_settled(weight)], modifier_rank=0):
            weight.data.copy_(value)
        return
    if isinstance(weight, DTensor):
        value = distribute_tensor(value.to(weight.device, weight.dtype), weight.device_mesh, weight.placements)
    weight.copy_(value)


def whole_on_main(tensors: Mapping[str, Tensor], *, is_main: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, one after the other, on the CPU of the main process; the other ranks only take part."""
    for name, tensor in tensors.items():
        complete = whole(tensor).detach()
        if is_main:
            yield name, complete.cpu()


def _is_partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def _settled(weight: Any) -> Any:
    """A parameter under ZeRO-3, once it is no longer on its way: prefetched for a pass that has not come."""
    if weight in weight.ds_flights:
        weight.ds_flights.pop(weight).wait()
    return weight
