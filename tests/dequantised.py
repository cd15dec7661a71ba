"""Checkpoints with the weights that a quantised model computes with, as ordinary float32 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pico import make_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_adapter, make_world

from kd.config.stage_recipe import Quantization
from kd.models.checkpoint import checkpoint
from kd.models.roles import LoadSettings, load_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def quantised(folder: Path, quantization: Quantization, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(checkpoint(folder), LoadSettings(dtype, quantization=quantization))


def whole_weight(layer: Any) -> Tensor:
    """[outputs, inputs] of a layer of bitsandbytes, from the definition of its format."""
    if layer.weight.dtype == torch.int8:
        scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        weight: Tensor = layer.weight.data.float() * scale[:, None] / 127
        return weight
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    blocks = state.code.float()[codes].reshape(-1, state.blocksize) * state.absmax[:, None]
    return blocks.reshape(state.shape)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The quantised layers of a model by name."""
    return {
        name: layer for name, layer in model.named_modules() if type(layer).__name__.startswith(("Linear4", "Linear8"))
    }


def write_dequantised(source: Path, target: Path, quantization: Quantization) -> Path:
    """The checkpoint at `source` with the quantised weights in place of its own, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in layers_of(quantised(source, quantization)).items():
            weight = model.get_submodule(name).weight
            rounded = whole_weight(layer)
            weight.copy_(rounded if isinstance(model.get_submodule(name), nn.Linear) else rounded.T)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def make_wide_world(folder: Path) -> Path:
    """`make_world` with models of width 64, and `other`, a full checkpoint of width 128."""
    make_world(folder)
    for name in ("base", "expert"):
        for file in (folder / name).iterdir():
            file.unlink()
    make_adapter(folder / "expert", make_checkpoint(folder / "base", **WIDE))
    make_checkpoint(folder / "other", seed=3, hidden_size=128, intermediate_size=256)
    return folder
