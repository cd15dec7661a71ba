"""Teachers that do not fit beside the student: their layers wait in the CPU's memory or on disk (accelerate's offload).

Embeddings, norms and output layer stay on the device, as the loss reads the output layer; the layers between come one
at a time in each forward pass. So a pass moves nearly all of a teacher's weights, however few rows it reads.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.config.stage_recipe import Offload
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.completeness import opened_whole
from kd.models.forward import unwrapped
from kd.models.tensor_files import refuse_not_finite, stored_tensors
from kd.runs.files import read_json

logger = logging.getLogger("dae")


def layers_of(model: nn.Module) -> list[str]:
    """The modules that are moved as a whole, which the architecture names itself; empty where it names none."""
    kinds = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    return [name for name, module in unwrapped(model).named_modules() if type(module).__name__ in kinds]


def layer_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that wait elsewhere when this model is opened so; it may lie on `meta`."""
    for name in layers_of(model):
        yield from unwrapped(model).get_submodule(name).parameters()


def check_offload(
    place: Offload | None, teachers: Mapping[str, Checkpoint], device: str, *, trust_remote_code: bool
) -> None:
    """Raise UserError where a recipe's `offload_teachers` would do nothing, or is not possible. Reads no weights.

    teachers: by role, those that are loaded with weights of their own.
    """
    if place is None:
        return
    if not teachers:
        raise UserError(
            f"offload_teachers: {place}: every teacher is on the student's base weights or on a server, and has no "
            "weights to offload; remove it"
        )
    if place == "cpu" and device == "cpu":
        raise UserError(
            "offload_teachers: cpu: this machine has no GPU, so the weights are in the CPU's memory anyway; use disk, "
            "or remove it"
        )
    for role, one in teachers.items():
        if read_json(one.folder / "config.json").get("quantization_config") is not None:
            raise UserError(
                f"offload_teachers: {place}: {role} {one}: its files are quantised (quantization_config in "
                "config.json), and quantised layers cannot be moved; remove offload_teachers"
            )
        if not layers_of(one.meta_model(trust_remote_code)):
            raise UserError(
                f"offload_teachers: {place}: {role} {one}: its architecture does not say which layers can be moved "
                "(_no_split_modules); remove it. With cache.path=DIR one teacher at a time is in memory."
            )


def device_map(source: Checkpoint, place: Offload, device: str, trust_remote_code: bool) -> dict[str, str]:
    """transformers' device_map: layers at `place`, everything else on the device."""
    model = unwrapped(source.meta_model(trust_remote_code))
    layers = layers_of(model)

    def places(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if name in layers:
            yield name, place
        elif not any(layer.startswith(f"{name}.") for layer in layers):
            yield name, device
        else:
            for child, inner in module.named_children():
                yield from places(f"{name}.{child}", inner)

    return {part: where for child, inner in model.named_children() for part, where in places(child, inner)}


def open_offloaded(
    source: Checkpoint, open_model: Callable[..., Any], place: Offload, device: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """`opened_whole` for a model whose layers wait elsewhere.

    On disk, layers are read from the checkpoint's own files, and weights that transformers joins on loading (a
    mixture's experts) from copies in a temporary folder, which goes with the model.

    Raises UserError as `opened_whole`, and for weights in the files that are not finite.
    """
    for name, tensor in stored_tensors(source.folder):
        refuse_not_finite(source, name, tensor)
    copies = tempfile.mkdtemp(prefix="dae-offload-")
    try:
        places = device_map(source, place, device, trust_remote_code)
        model = opened_whole(source, partial(open_model, device_map=places, offload_folder=copies))
    except BaseException:
        shutil.rmtree(copies, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, copies, ignore_errors=True)
    moved = sum(weight.numel() for weight in layer_weights(model)) * model.dtype.itemsize
    where = "in the CPU's memory" if place == "cpu" else "on disk"
    logger.info("%s: its layers wait %s; each pass moves %.3g GB", source, where, moved / 1e9)
    return model


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A weight by its name, wherever it waits; not detached, as a sharded one is known by its parameter."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        weight: Tensor = getattr(module, attribute)
    return weight
