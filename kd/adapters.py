"""A peft adapter on disk: its config, its base, and putting it on a model with all of its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import nn

from kd.completeness import first_line, refuse_other_weights
from kd.errors import UserError
from kd.fingerprints import resolve_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# Starts (peft's init_lora_weights) that take what the adapter begins with out of the base's weights.
STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PREFIX = "base_model.model."
_OTHER_SHAPE = re.compile(r"size mismatch for (\S+): .*torch\.Size\((\[.*?\])\).*torch\.Size\((\[.*?\])\)")


def read_adapter_config(path: str) -> dict[str, Any]:
    """An adapter's config as it is written. Raises UserError where it is no JSON object."""
    file = resolve_model(path) / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is no JSON ({error}); save or download the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no JSON object; save or download the adapter again")
    return config


def base_of(path: str) -> str | None:
    """The base that an adapter names, or None for a full checkpoint. Raises UserError where an adapter names none."""
    file = resolve_model(path) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: names no base (base_model_name_or_path)")
    return base


def refuse_changed_base(path: str) -> None:
    """Raise UserError where an adapter is counted from weights that peft made of the base's when it was begun.

    Putting it on would change the base for all roles, or mean something else than was trained.
    """
    start = read_adapter_config(path).get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(STARTS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"{path}: was begun with init_lora_weights={start}, which changes the base's weights; convert it to plain "
            "LoRA with peft (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it and pass "
            "the full checkpoint."
        )


def refuse_adapter(path: str) -> None:
    """Raise UserError where `path` is an adapter: transformers would put it on a base of its own choice."""
    if (resolve_model(path) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path}: is an adapter, where a full checkpoint is wanted; merge it into its base first.")


def has_tokenizer(path: str) -> bool:
    """Whether a tokenizer lies beside the weights."""
    folder = resolve_model(path)
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_home(path: str) -> str:
    """Where a model's tokenizer lies: beside its weights, or with the base of an adapter that brings none."""
    return path if has_tokenizer(path) else base_of(path) or path


def put_adapter(model: nn.Module, path: str, name: str, *, trainable: bool = False) -> PeftModel:
    """Put a LoRA adapter on a model, under a name; the model may lie on the meta device.

    Returns:
        The model wrapped, or the same one where it is wrapped already.

    Raises:
        UserError: the adapter's files do not hold the weights that its config describes, all of them and no others, its
            config does not fit the model, or it stands on a changed copy of the base's weights.
    """
    folder = str(resolve_model(path))
    refuse_changed_base(path)
    empty = any(parameter.is_meta for parameter in model.parameters())
    try:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = not trainable
        if empty:  # starts that are worked out from the base's weights (PiSSA and the like) would need some
            config.init_lora_weights = True
        if isinstance(model, PeftModel):
            adapted = model
            adapted.add_adapter(name, config, low_cpu_mem_usage=empty)
        else:
            adapted = PeftModelForCausalLM(model, config, name, low_cpu_mem_usage=empty)
        keys = adapted.load_adapter(folder, name, is_trainable=trainable, torch_device="cpu", low_cpu_mem_usage=empty)
    except KeyError as error:  # what a wrapped module (modules_to_save) should have found in the file
        if str(error.args[0]).startswith(_PREFIX):
            refuse_other_weights(path, ADAPTER_CONFIG, missing=[_as_saved(error.args[0], name)])
        raise
    except RuntimeError as error:
        found = _OTHER_SHAPE.findall(str(error))
        shapes = [(_as_saved(key, name), json.loads(stored), json.loads(wanted)) for key, stored, wanted in found]
        refuse_other_weights(path, ADAPTER_CONFIG, reshaped=shapes)
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{Path(path) / ADAPTER_CONFIG}: does not fit its base: {first_line(error)}") from error
    refuse_other_weights(
        path,
        ADAPTER_CONFIG,
        missing=[_as_saved(key, name) for key in keys.missing_keys],
        unknown=[_as_saved(key, name) for key in keys.unexpected_keys],
    )
    return adapted


def _as_saved(key: str, name: str) -> str:
    """A weight's name without peft's prefix and the name that the adapter was given here."""
    return key.removeprefix(_PREFIX).replace(f".{name}.", ".").removesuffix(f".{name}")
