"""A peft adapter on disk: is it one, its config, its base, its tokenizer. Opens no weights and imports no peft."""

from __future__ import annotations

import json
from typing import Any

from kd.errors import UserError
from kd.models.checkpoint_files import resolve_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Starts (peft's init_lora_weights) that take what the adapter begins with out of the base's weights.
STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(path: str) -> bool:
    """Whether the folder or hub id holds a peft adapter."""
    return (resolve_model(path) / ADAPTER_CONFIG).is_file()


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
    if not is_adapter(path):
        return None
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        file = resolve_model(path) / ADAPTER_CONFIG
        raise UserError(f"{file}: names no base (base_model_name_or_path); write its base's path or hub id there")
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


def refuse_adapter(path: str, key: str = "") -> None:
    """Raise UserError where `path` is an adapter: transformers would leave it out, or put it on a base of its choice.

    key: of the recipe, where the path stands there.
    """
    if is_adapter(path):
        where = f"{key}: {path}" if key else path
        raise UserError(f"{where}: is an adapter; expected a full checkpoint: pass its base, or merge it.")


def has_tokenizer(path: str) -> bool:
    """Whether a tokenizer lies beside the weights."""
    folder = resolve_model(path)
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_home(path: str) -> str:
    """Where a model's tokenizer lies: beside its weights, or with the base of an adapter that brings none."""
    return path if has_tokenizer(path) else base_of(path) or path
