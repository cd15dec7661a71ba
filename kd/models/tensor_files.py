"""Single tensors out of the files of a checkpoint, without opening the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
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


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in the files of a full checkpoint, one in memory at a time. Raises UserError without files."""
    for file_name in weight_files(folder):
        if file_name.endswith(".safetensors"):
            with safe_open(folder / file_name, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)


def refuse_not_finite(source: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    """Raise UserError where a weight is NaN or infinite: every loss and gradient after it would be, too."""
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{source}: {name} contains NaN or infinite values. Use an earlier checkpoint, or write it again."
        )
