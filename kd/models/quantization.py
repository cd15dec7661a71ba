"""Frozen weights in 4 or 8 bits (bitsandbytes), under an adapter that trains.

    nf4    4 bits a weight, and a float32 maximum for every 64 of them (QLoRA, arXiv 2305.14314)
    int8   8 bits a weight, and a float32 maximum for every output (the weights of LLM.int8, arXiv 2208.07339)

Quantised are the weights of linear layers. Embeddings, output layer, norms, biases and experts that are no linear
layers (those of a mixture in transformers 5) stay as they are.

A layer gives the product with its dequantised weights, in training and in evaluation, on every device: student,
reference and expert are the same function of the same weights. By itself bitsandbytes has two exceptions, which
`with_exact_products` removes:

- On CPUs with AVX512-BF16 a 4-bit layer that runs in eval mode, as a teacher does, changes its layout for good. Its
  products are then in bfloat16 and have no gradient, so that adapters below it would learn nothing from it, silently.
- An 8-bit layer rounds its inputs, too (not in training on a CPU), except for columns with outliers anywhere in the
  batch. Student and reference would differ on a CPU, and everywhere a row's answer would depend on its neighbours.

Shape legend: O outputs, I inputs of a layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from kd.config.stage_recipe import Quantization
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.forward import unwrapped
from kd.models.tensor_files import refuse_not_finite, stored_tensors
from kd.runs.files import read_json

EXTRA = "pip install -e '.[quantization]'"
NF4_BLOCK = 64  # weights that share a maximum
NF4_TABLE = 16  # float32 values that each layer keeps
LARGEST_INT8 = torch.finfo(torch.float16).max  # bitsandbytes goes through float16


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are, in part, integers; for FSDP, which must not shard such weights."""
    return any(not weight.is_floating_point() for weight in model.parameters())


def check_quantization(
    quantization: Quantization | None, inputs: Mapping[str, Checkpoint], *, trust_remote_code: bool = False
) -> None:
    """Raise UserError where the checkpoints of a run cannot be quantised. Reads no weights."""
    if quantization is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization: {quantization}: needs the package bitsandbytes: {EXTRA}")
    for role, one in inputs.items():
        if not one.is_adapter and read_json(one.folder / "config.json").get("quantization_config") is not None:
            raise UserError(
                f"quantization: {quantization}: {role} {one}: its files are quantised already (quantization_config in "
                "config.json); remove `quantization`, or give the checkpoint that it was made from"
            )
        if quantization == "nf4" and not one.is_adapter and not torch.cuda.is_available():
            refuse_uneven_rows(f"{role} {one}", quantised_shapes(one.meta_model(trust_remote_code)))


def refuse_uneven_rows(model: str, shapes: Iterable[tuple[int, int]]) -> None:
    """Raise UserError for layers that bitsandbytes would dequantise to wrong weights on a CPU, silently.

    With AVX512 its kernel takes a row of weights for whole blocks (0.50.2). shapes: (outputs, inputs).
    """
    for _, inputs in shapes:
        if inputs % NF4_BLOCK:
            raise UserError(
                f"quantization: nf4: {model} has a layer with {inputs} inputs, no multiple of {NF4_BLOCK}, which "
                "bitsandbytes computes wrongly on CPUs; use int8, or a GPU"
            )


def loading_settings(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of transformers.BitsAndBytesConfig. dtype: of the weights that stay, and of products."""
    if quantization == "int8":
        return {"load_in_8bit": True}
    name = str(dtype).removeprefix("torch.")
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": name}


def refuse_unquantisable(source: Checkpoint, quantization: Quantization) -> None:
    """Raise UserError where a weight in the files cannot be quantised: afterwards it would look like any other."""
    largest = LARGEST_INT8 if quantization == "int8" else torch.inf
    for name, tensor in stored_tensors(source.folder):
        refuse_not_finite(source, name, tensor)
        if tensor.numel() and float(tensor.abs().max()) > largest:
            raise UserError(
                f"quantization: {quantization}: {source}: {name} has values above {largest:g}; use nf4, or remove "
                "`quantization`"
            )


# -- products ----------------------------------------------------------------------------------------------------------


def with_exact_products(model: nn.Module, source: str) -> None:
    """Let the layers of bitsandbytes compute with their dequantised weights, and nothing else (see above).

    Also where the files were quantised. source: the model, in the error for layers that cannot.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            if module.weight.device.type == "cpu":
                refuse_uneven_rows(source, [(module.out_features, module.in_features)])
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.forward = MethodType(_int8_forward, module)  # type: ignore[method-assign]


def _int8_forward(layer: Any, x: Tensor) -> Tensor:
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    product: Tensor = _Int8Product.apply(x, layer.state.CB, layer.state.SCB, layer.bias)
    return product


class _Int8Product(torch.autograd.Function):
    """x W' + b with W = scale * codes / 127, made anew for backward; b does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes_OI, scale_O)
        bias_O = None if bias_O is None else bias_O.to(x.dtype)
        return functional.linear(x, _dequantised_int8(codes_OI, scale_O).to(x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ _dequantised_int8(*ctx.saved_tensors).to(gradient.dtype), None, None, None


def _dequantised_int8(codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight_OI: Tensor = int8_vectorwise_dequant(codes_OI, scale_O)
    return weight_OI


# -- memory ------------------------------------------------------------------------------------------------------------


def quantised_shapes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of each layer that is quantised when this model is opened so; it may lie on `meta`."""
    base = unwrapped(model)
    kept = get_keys_to_not_convert(base)
    adapters = {*getattr(model, "peft_config", ())}
    for name, layer in base.named_modules():
        if adapters & {*name.split(".")} or not should_convert_module(name.removesuffix(".base_layer"), kept):
            continue
        if isinstance(layer, Conv1D):
            yield int(layer.weight.shape[1]), int(layer.weight.shape[0])
        elif type(layer) is nn.Linear:
            yield layer.out_features, layer.in_features


def quantised_bytes(outputs: int, inputs: int, quantization: Quantization) -> int:
    """Of a layer's weights and what is needed to dequantise them."""
    elements, float32 = outputs * inputs, torch.float32.itemsize
    if quantization == "int8":
        return elements + outputs * float32
    return -(-elements // 2) + (-(-elements // NF4_BLOCK) + NF4_TABLE) * float32
