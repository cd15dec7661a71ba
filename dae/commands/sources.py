"""`dae sample` and `dae rank-teachers`: what happens before training."""

from __future__ import annotations

from pathlib import Path

import typer

from dae.rank_teachers.recipe import RankRecipe
from dae.sampling.recipe import SampleRecipe


def sample(recipe: SampleRecipe) -> None:
    from dae.sampling.sample import sample

    typer.echo(sample(recipe))


def rank_teachers(recipe: RankRecipe) -> None:
    from rich.console import Console

    from dae.rank_teachers.folder import RESULT
    from dae.rank_teachers.rank_teachers import rank_teachers
    from dae.rank_teachers.table import show

    show(rank_teachers(recipe), Console(highlight=False))
    typer.echo(f"{Path(recipe.output) / RESULT}: all numbers, with intervals")
