"""`dae check` and `dae cache`: their first word is a stage, whose flags follow, or a recipe file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated

import typer

from dae.commands.keys import schemas
from dae.stages import STAGES, StageEntry
from kd.config.layering import Layers
from kd.config.loading import address, load_recipe
from kd.config.problems import one_of, suggestion
from kd.config.schema import Frozen
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError

RECIPE_FORM = "RECIPE"  # the hidden command of `dae check FILE`
OPTIONS = ("--stage", "--help")

RecipeArgument = Annotated[Path | None, typer.Argument(metavar="FILE", help="the recipe, in YAML")]
StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="STAGE", help="the recipe's stage (default: from its keys)")
]


def expected(command: str, stages: Sequence[str]) -> str:
    return f"expected {one_of(list(stages))} with its flags, or a recipe file (see `dae {command} --help`)"


def as_command(words: Sequence[str], command: str, stages: Sequence[str]) -> list[str]:
    """The words after `dae check` or `dae cache` as one of its commands: a stage's, or RECIPE_FORM.

    Raises:
        UserError: a stage's flag comes before the stage's name, or the first word is neither stage nor file.
    """
    if words[:1] == ["--help"] or (words and words[0] in stages):
        return list(words)
    if words and words[0].startswith("--") and words[0].partition("=")[0] not in OPTIONS:
        raise UserError(f"{words[0]}: put the stage's name before its flags: dae {command} align {words[0]} ...")
    if words and not Path(words[0]).suffix and not words[0].startswith("-") and not Path(words[0]).exists():
        known = f"{expected(command, stages)}{suggestion(words[0], stages)}"
        raise UserError(f"{words[0]}: unknown stage, or file not found; {known}")
    return [RECIPE_FORM, *words]


def recipe_of_file(
    file: Path | None, assignments: Sequence[str] | None, stage: str | None, command: str, stages: Sequence[str]
) -> tuple[StageEntry, StageRecipe]:
    """The stage and the recipe of `dae check FILE` or `dae cache FILE`. Raises UserError."""
    if file is None:
        raise UserError(expected(command, stages))
    chosen = stage or stage_of(file, assignments or [], command, stages)
    if chosen not in stages:
        what = f"--stage {chosen}" if stage else f"{file}: is a recipe of `dae {chosen}`"
        raise UserError(f"{what}: expected {one_of(list(stages))}")
    entry = STAGES[chosen]
    return entry, load_recipe(entry.recipe, file, {}, assignments or [])


def stage_of(
    recipe: Path, assignments: Sequence[str], asked: str = "check", stages: Sequence[str] = tuple(STAGES)
) -> str:
    """The stage that a recipe is for: the one with most of its own required keys present; `sft` has none of its own.

    Raises UserError for the recipe of a command that is not a stage.
    """
    layers = Layers(address)
    layers.read_yaml(recipe)
    command = other_command(set(layers.raw))
    if command is not None:
        raise UserError(
            f"{recipe}: is a recipe of `dae {command}`, which checks it before it runs; "
            f"`dae {asked}` takes recipes of {one_of(list(stages))}"
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
