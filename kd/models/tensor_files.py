"""Single tensors out of the files of a checkpoint, without opening the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from kd.models.checkpoint_files import weight_files


def stored_tensor(folder: Path, names: Sequence[str]) -> torch.Tensor | None:
    """The first of these tensors that the files of a full checkpoint hold, or None. Raises UserError without files."""
    for file_name in weight_files(folder):
        if file_name.endswith(".safetensors"):
            with safe_open(folder / file_name, framework="pt") as file:
                there = set(file.keys())
                for name in names:
                    if name in there:
                        tensor: torch.Tensor = file.get_tensor(name)
                        return tensor
    return None
