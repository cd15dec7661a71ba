"""Does a checkpoint hold the weights that its config describes, all of them and no others?

transformers and peft fill what a file lacks with random numbers, pass over what they do not know, and say so only in a
log. A teacher like that still gives distributions, and a run with it still ends well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.opening import opening

NAMES_SHOWN = 3
# Buffers that earlier releases of transformers wrote among the weights, and that all architectures now make themselves.
_BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")


def opened_whole(source: Checkpoint, open_model: Callable[..., Any]) -> PreTrainedModel:
    """The model that `open_model`, a from_pretrained, opens from a checkpoint.

    Not counted: what the architecture itself declares to be left out (tied weights, ignorable keys) and old buffers.

    Raises UserError where it does not open, or where weights are missing, unknown or of another shape, by name.
    """
    found: Mapping[str, Any]
    model: PreTrainedModel
    with opening(f"{source}: cannot be opened as a causal language model"):
        try:
            model, found = open_model(output_loading_info=True, ignore_mismatched_sizes=True)
        except RuntimeError as error:
            if "automatic conversion of the weights" not in str(error):
                raise
            raise UserError(
                f"{source}: its weights do not match its config.json: a mixture's experts are stored one by one, and "
                "some are missing or have another shape. Save or download it again."
            ) from error
    refuse_other_weights(
        source,
        "config.json",
        missing=found["missing_keys"],
        unknown=[name for name in found["unexpected_keys"] if not _BUFFERS.search(name)],
        reshaped=found["mismatched_keys"],
    )
    return model


def refuse_other_weights(
    source: Checkpoint,
    config: str,
    *,
    missing: Collection[str] = (),
    unknown: Collection[str] = (),
    reshaped: Collection[tuple[str, Sequence[int], Sequence[int]]] = (),
    remedy: str = "Save or download it again.",
) -> None:
    """Raise UserError where one of these is not empty.

    config: name of the file that describes the weights; reshaped: (name, shape in the files, shape by the config).
    """
    shapes = {f"{name} ({list(stored)}, not {list(wanted)})" for name, stored, wanted in reshaped}
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    faults = "; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items() if names)
    if not faults:
        return
    if not missing and not reshaped:
        remedy = f"Correct {config}; or load it with plain transformers or peft and save it again."
    raise UserError(f"{source}: its weights do not match its {config}: {faults}. {remedy}")


def some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
