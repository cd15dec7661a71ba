"""A checkpoint or adapter as one value: the path as typed, the local folder, its config, its fingerprint, its base."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from kd.models.adapter_files import is_adapter
from kd.models.checkpoint_files import model_fingerprint, resolve_model
from kd.models.compatibility import empty_model


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A full checkpoint or a peft adapter. `checkpoint` makes it, once for each path.

    path: as typed, a folder or a hub id; folder: where it lies on this machine.
    """

    path: str
    folder: Path

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it is a peft adapter."""
        return is_adapter(str(self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights and config; the files are read once. Raises UserError where they are torn or missing."""
        return model_fingerprint(self.path)

    def meta_model(self, trust_remote_code: bool = False) -> nn.Module:
        """A new model of its architecture on the meta device. Raises UserError where it is no causal LM."""
        return empty_model(self.path, trust_remote_code)


_known: dict[tuple[str, str], Checkpoint] = {}


def checkpoint(path: str) -> Checkpoint:
    """The checkpoint at a path or hub id; a hub is asked once for each id. Raises UserError where it cannot be had."""
    key = (path, os.getcwd())
    if key not in _known:
        _known[key] = Checkpoint(path, resolve_model(path))
    return _known[key]
