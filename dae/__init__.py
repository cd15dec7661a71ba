"""Domain alignment from experts: a student that matches an expert on its domain and the general model elsewhere.

    from dae import align, distill, report, sft

    result = align("base", "expert", {"domain": rows, "general": rows}, output_dir="student", max_steps=100)
    result.metrics, result.model(), result.report("suite.yaml")

Names are resolved lazily: importing `dae` imports no torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dae.api import align as align
    from dae.api import distill as distill
    from dae.api import sft as sft
    from dae.recipe import AlignRecipe as AlignRecipe
    from dae.reporting import ReportResult as ReportResult
    from dae.reporting import report as report
    from dae.results import TrainingResult as TrainingResult
    from kd.config.in_memory_rows import InMemoryRows as InMemoryRows
    from kd.errors import MachineError as MachineError
    from kd.errors import Stopped as Stopped
    from kd.errors import UserError as UserError
    from kd.stages.distill_recipe import DistillRecipe as DistillRecipe
    from kd.stages.sft_recipe import SftRecipe as SftRecipe

_HOMES = {
    "AlignRecipe": "dae.recipe",
    "DistillRecipe": "kd.stages.distill_recipe",
    "InMemoryRows": "kd.config.in_memory_rows",
    "MachineError": "kd.errors",
    "ReportResult": "dae.reporting",
    "SftRecipe": "kd.stages.sft_recipe",
    "Stopped": "kd.errors",
    "TrainingResult": "dae.results",
    "UserError": "kd.errors",
    "align": "dae.api",
    "distill": "dae.api",
    "report": "dae.reporting",
    "sft": "dae.api",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("dae-align")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # not installed
    if name not in _HOMES:
        raise AttributeError(f"module `dae` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
