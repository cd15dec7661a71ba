"""`dae check STAGE ...` (a stage's command with `check` before it), or `dae check FILE`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dae.checking.processes import asked_scaling
from dae.commands.recipe_command import Assignments
from dae.commands.stage_or_recipe import RECIPE_FORM, RecipeArgument, StageOption, as_command, recipe_of_file
from dae.commands.stages import PlanOption, ProcessesOption, check_stage, stage_command
from dae.stages import STAGES


class CheckGroup(TyperGroup):
    """`dae check`: a stage's command runs with `--check`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            args = as_command(args, "check", list(STAGES))
            args[1:1] = ["--check"] if args[0] in STAGES else []
        return super().parse_args(ctx, args)


def check_command() -> typer.Typer:
    app = typer.Typer(cls=CheckGroup, pretty_exceptions_enable=False)
    for name in STAGES:
        app.command(name)(stage_command(name))
    app.callback()(checks)
    app.command(RECIPE_FORM, hidden=True)(check_recipe)
    return app


def checks() -> None:
    """Check a run before it starts: data, loss shares, steps, memory.

    Loads no weights, unless --weights is given: it then measures where training starts.

    dae check align --base CKPT --expert PATH ... checks a stage's command.
    `dae align ... --check` does the same.

    dae check FILE [KEY=VALUE]... [--stage STAGE] checks a recipe.
    Without --stage its keys decide: align if it has `expert`, distill if it
    has `teacher`, else sft.

    --processes 8 --plan fsdp2 also shows what a run of 8 processes takes on
    each, and what it sends in a step.

    For a file named like a stage, write ./align.
    """


def check_recipe(
    recipe: RecipeArgument = None,
    assignments: Assignments = None,
    stage: StageOption = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="also load the weights and measure where training starts")
    ] = False,
    processes: ProcessesOption = None,
    plan: PlanOption = None,
) -> None:
    """Check a recipe file."""
    scaling = asked_scaling(processes, plan)
    check_stage(*recipe_of_file(recipe, assignments, stage, "check", list(STAGES)), weights, scaling)
