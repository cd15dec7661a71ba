"""`dae check STAGE ...` (a stage's command with `check` before it), or `dae check FILE`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dae.commands.keys import schemas
from dae.commands.recipe_command import Assignments
from dae.commands.stages import check_stage, stage_command
from dae.stages import STAGES
from kd.config.layering import Layers
from kd.config.loading import address, load_recipe
from kd.config.problems import one_of, suggestion
from kd.config.schema import Frozen
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError

RECIPE_FORM = "RECIPE"  # the hidden command of `dae check FILE`
OPTIONS = ("--stage", "--help")


def expected() -> str:
    return f"expected {one_of(list(STAGES))} with its flags, or a recipe file (see `dae check --help`)"


class StageOrRecipe(TyperGroup):
    """A group whose first word is a stage or a recipe file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else as_command(args))


def as_command(words: Sequence[str]) -> list[str]:
    """The words after `dae check` as one of the group's commands: a stage with `--check`, or RECIPE_FORM.

    Raises:
        UserError: a stage's flag comes before the stage's name, or the first word is neither stage nor file.
    """
    if words[:1] == ["--help"]:
        return list(words)
    if words and words[0] in STAGES:
        return [words[0], "--check", *words[1:]]
    if words and words[0].startswith("--") and words[0].partition("=")[0] not in OPTIONS:
        raise UserError(f"{words[0]}: put the stage's name before its flags: dae check align {words[0]} ...")
    if words and not Path(words[0]).suffix and not words[0].startswith("-") and not Path(words[0]).exists():
        raise UserError(f"{words[0]}: unknown stage, or file not found; {expected()}{suggestion(words[0], STAGES)}")
    return [RECIPE_FORM, *words]


def check_command() -> typer.Typer:
    app = typer.Typer(cls=StageOrRecipe, pretty_exceptions_enable=False)
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

    For a file named like a stage, write ./align.
    """


def check_recipe(
    recipe: Annotated[Path | None, typer.Argument(metavar="FILE", help="the recipe, in YAML")] = None,
    assignments: Assignments = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="sft, distill or align (default: from the recipe's keys)")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="also load the weights and measure where training starts")
    ] = False,
) -> None:
    """Check a recipe file."""
    if recipe is None:
        raise UserError(expected())
    chosen = stage or stage_of(recipe, assignments or [])
    if chosen not in STAGES:
        raise UserError(f"--stage {chosen}: expected {one_of(list(STAGES))}")
    entry = STAGES[chosen]
    check_stage(entry, load_recipe(entry.recipe, recipe, {}, assignments or []), weights)


def stage_of(recipe: Path, assignments: Sequence[str]) -> str:
    """The stage that a recipe is for: the one with most of its own required keys present; `sft` has none of its own.

    Raises UserError for the recipe of a command that is not a stage.
    """
    layers = Layers(address)
    layers.read_yaml(recipe)
    command = other_command(set(layers.raw))
    if command is not None:
        raise UserError(
            f"{recipe}: is a recipe of `dae {command}`, which checks it before it runs; "
            f"`dae check` takes recipes of {one_of(list(STAGES))}"
        )
    written = {*layers.raw, *(re.split(r"[.=]", text)[0] for text in assignments)}

    def own_keys(name: str) -> int:
        fields = STAGES[name].recipe.model_fields.items()
        return len(
            {key for key, field in fields if field.is_required() and key not in StageRecipe.model_fields} & written
        )

    return max(["sft", *STAGES], key=own_keys)


def other_command(keys: AbstractSet[str]) -> str | None:
    """The command whose recipe has more of these top-level keys than any stage's recipe."""
    from dae.pipeline.recipe import PipelineRecipe

    def known(schema: type[Frozen]) -> int:
        return len(keys & {field.alias or name for name, field in schema.model_fields.items()})

    others: dict[str, type[Frozen]] = {name: schema for name, schema in schemas().items() if name not in STAGES}
    others["run"] = PipelineRecipe
    best = max(others, key=lambda name: known(others[name]))
    if known(others[best]) <= max(known(entry.recipe) for entry in STAGES.values()):
        return None
    return "eval tasks --suite" if best == "suite" else best.replace("merge-", "merge ")
