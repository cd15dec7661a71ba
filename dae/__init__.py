"""Domain alignment from experts: a student that matches an expert on its domain and the general model elsewhere.

    from dae import AlignRecipe, align

Names are resolved lazily: importing `dae` imports no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dae.alignment import align
    from dae.recipe import AlignRecipe

__all__ = ["AlignRecipe", "align"]

_HOMES = {"align": "dae.alignment", "AlignRecipe": "dae.recipe"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("dae-align")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # not installed
    if name not in _HOMES:
        raise AttributeError(f"module `dae` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
