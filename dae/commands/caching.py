"""`dae cache STAGE ...` (a stage's command with `cache` before it), or `dae cache FILE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from dae.commands.recipe_command import Assignments, recipe_command
from dae.commands.stage_or_recipe import RECIPE_FORM, RecipeArgument, StageOption, as_command, recipe_of_file
from dae.stages import STAGES, StageEntry
from kd.config.stage_recipe import StageRecipe

WITH_TEACHERS = ("align", "distill")


class CacheGroup(TyperGroup):
    """`dae cache`: a stage's command, or a recipe file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else as_command(args, "cache", WITH_TEACHERS))


def cache_command() -> typer.Typer:
    app = typer.Typer(cls=CacheGroup, pretty_exceptions_enable=False)
    for name in WITH_TEACHERS:
        app.command(name)(stage_cache_command(STAGES[name]))
    app.callback()(caches)
    app.command(RECIPE_FORM, hidden=True)(cache_recipe)
    return app


def stage_cache_command(entry: StageEntry) -> Callable[..., None]:
    def run(recipe: StageRecipe) -> None:
        fill(entry, recipe)

    return recipe_command(entry.recipe, run)


def caches() -> None:
    """Ask the teachers of a run once, and keep what they say on disk.

    Loads one teacher at a time and no student, and answers the rows of the run
    that the cache lacks. Training does the same before its first step.

    dae cache align --base CKPT --expert PATH ... cache.path=DIR

    dae cache FILE [KEY=VALUE]... [--stage STAGE] takes a recipe.
    """


def cache_recipe(recipe: RecipeArgument = None, assignments: Assignments = None, stage: StageOption = None) -> None:
    """Fill the cache of a recipe."""
    fill(*recipe_of_file(recipe, assignments, stage, "cache", WITH_TEACHERS))


def fill(entry: StageEntry, recipe: StageRecipe) -> None:
    """Fill a recipe's cache, and print what was added for each teacher."""
    from kd.stages.caching import fill_cache

    for role, plan in fill_cache(entry.load(), recipe).items():
        added, rows = f"{len(plan.missing):,}", f"{plan.rows:,}"
        typer.echo(
            f"{plan.store.folder}: {role}: {added} of {rows} rows added"
            if plan.missing
            else f"{plan.store.folder}: {role}: all {rows} rows were there"
        )
