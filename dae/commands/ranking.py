"""The command `dae rank-teachers`: flags to a recipe, and the tables. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dae.rank_teachers.recipe import RankRecipe
from kd.config.data_recipe import ROUTE_NAME
from kd.config.loading import load_recipe
from kd.errors import UserError


def rank_teachers(
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe; `dae keys rank-teachers` lists them"),
    ] = None,
    student: Annotated[str | None, typer.Option(metavar="CKPT", help="the model that is to learn")] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="a file of responses, or a checkpoint that answers --prompts; repeats"),
    ] = None,
    reward_model: Annotated[str | None, typer.Option(metavar="CKPT", help="sequence classifier with one label")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL whose prompts checkpoints answer")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="folder to write")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE go over it")
    ] = None,
) -> None:
    """Which teacher suits this student: reward, the student's loss, and CAR over a sweep of beta."""
    flags, names = candidate_flags(candidate or [])
    flags |= {"student": student, "reward_model": reward_model, "prompts": prompts, "output": output}
    loaded = load_recipe(RankRecipe, recipe, flags, assignments or [], names)

    from rich.console import Console

    from dae.rank_teachers.folder import RESULT
    from dae.rank_teachers.rank_teachers import rank_teachers as run
    from dae.rank_teachers.table import show

    show(run(loaded), Console(highlight=False))
    typer.echo(f"{Path(loaded.output) / RESULT}: all numbers, with intervals")


def candidate_flags(candidates: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`--candidate NAME=PATH` as dotted keys, and the flag of each key for messages. Raises UserError."""
    flags: dict[str, Any] = {}
    for text in candidates:
        name, equals, path = text.partition("=")
        if not equals or not ROUTE_NAME.fullmatch(name):
            raise UserError(
                f"--candidate {text}: wants NAME=PATH; a name starts with a letter and has letters, digits, - and _"
            )
        if f"candidates.{name}" in flags:
            raise UserError(f"--candidate {text}: names two candidates alike")
        flags[f"candidates.{name}"] = path
    return flags, dict.fromkeys(flags, "--candidate")
