"""`dae sample`: parse, call, print."""

from __future__ import annotations

from typing import Annotated

import typer

from dae.commands.stages import Assignments, RecipeFile
from dae.sampling.recipe import SampleRecipe
from kd.config.loading import load_recipe


def sample(
    assignments: Assignments = None,
    model: Annotated[str | None, typer.Option(metavar="CKPT", help="the model that writes")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL file to write")] = None,
    rows: Annotated[int | None, typer.Option(help="how many rows (default: 1000)")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest row in tokens (default: 256)")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same rows (default: 0)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows written at a time (default: 16)")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL whose prompts are answered")] = None,
    recipe: RecipeFile = None,
) -> None:
    """Let a model write general rows itself, for teams that have none."""
    flags = {
        "model": model,
        "output": output,
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "prompts": prompts,
    }
    loaded = load_recipe(SampleRecipe, recipe, flags, assignments or [])

    from dae.sampling.sample import sample as run

    typer.echo(run(loaded))
