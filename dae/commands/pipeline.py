"""`dae run`: parse and call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML: output, and stages by name")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="any key of it, such as stages.aligned.train.learning_rate=1e-4"),
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="move aside what was made from other settings or inputs, and make it anew")
    ] = False,
) -> int:
    """Run stages in a row, each from what earlier ones wrote. The same command goes on after a stop.

    Stages are sft, sample, distill, merge moe, merge weights, merge to-lora, align, eval and report.
    """
    from dae.pipeline.stages import run_pipeline

    return run_pipeline(recipe, assignments or [], redo=redo)
