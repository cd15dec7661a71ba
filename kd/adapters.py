"""Putting a peft adapter on a model with all of its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import nn

from kd.adapter_files import ADAPTER_CONFIG, refuse_changed_base
from kd.completeness import first_line, refuse_other_weights
from kd.errors import UserError
from kd.fingerprints import resolve_model

_PREFIX = "base_model.model."
_OTHER_SHAPE = re.compile(r"size mismatch for (\S+): .*torch\.Size\((\[.*?\])\).*torch\.Size\((\[.*?\])\)")


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
