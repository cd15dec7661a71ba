"""`dae run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML with `output` and `stages`")],
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key, such as stages.aligned.seed=1")
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="move aside results made from other settings or inputs, and run them again")
    ] = False,
) -> int:
    """Run a pipeline of stages. Finished stages are skipped; a stopped pipeline resumes.

    Stages: sft, sample, distill, merge moe, merge weights, merge to-lora, align, eval, report.
    """
    from dae.pipeline.stages import run_pipeline

    return run_pipeline(recipe, assignments or [], redo=redo)
