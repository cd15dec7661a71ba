"""An architecture without its weights, on the meta device: what `dae check` and all other checks look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kd.errors import UserError
from kd.models.checkpoint_files import weight_files
from kd.models.opening import opening, refuse_unsafe_settings

_MANY_LAYERS = 1000


def meta_model(folder: Path, name: str, trust_remote_code: bool = False) -> nn.Module:
    """The architecture of the full checkpoint in a folder, without memory for its weights.

    name: of the checkpoint, for messages. Raises UserError where it is no causal language model.
    """
    refuse_unsafe_settings(folder, trust_remote_code)
    with opening(
        f"{name}: cannot be read as a causal language model", "Correct its config.json, or save the checkpoint again."
    ):
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        _refuse_endless_layers(folder, name, config)
        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except AssertionError:
            _refuse_padding_outside(name, config)
            raise
    return model


def meta_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the files of a checkpoint hold, by name, without memory."""
    tensors = {}
    for file_name in weight_files(folder):
        if file_name.endswith(".safetensors"):
            with safe_open(folder / file_name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    tensors[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    return tensors


def _refuse_padding_outside(name: str, config: Any) -> None:
    """Raise UserError for a padding token that the embeddings have no row for; not every architecture needs one."""
    text = config.get_text_config()
    token, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(token, int) and isinstance(rows, int) and token >= rows:
        words = f"the vocabulary has {rows} rows; set it below {rows}, or to null"
        raise UserError(f"{name}: config.json: pad_token_id: {token}: {words}")


def _refuse_endless_layers(folder: Path, name: str, config: Any) -> None:
    """Raise UserError for a config with far more layers than its files can hold, which would take hours to build."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MANY_LAYERS and layers > (held := len(meta_tensors(folder))):
        raise UserError(
            f"{name}: config.json: num_hidden_layers: {layers}: its files hold {held} tensors; correct config.json, or "
            "save the checkpoint again."
        )
