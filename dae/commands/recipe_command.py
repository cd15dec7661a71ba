"""A command built from its recipe: a parameter for each flag that the recipe declares, KEY=VALUE, and --recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kd.config.flags import CommandRecipe, Flag
from kd.config.loading import load_recipe

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe; `dae keys` lists them")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE override it")
]
OUTPUT = Flag("output", "output", "DIR", "run folder")


def recipe_command(
    schema: type[CommandRecipe],
    run: Callable[..., None],
    switches: Mapping[str, Any] | None = None,
    key_switches: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """The command that builds a recipe of this schema and runs it.

    run: gets the recipe, and every switch by its name, None where it was not given. switches: options of the command
    itself, by name; key_switches: those that set the recipe's key of their name, and do not go to `run`.
    """
    flags = schema.flags if OUTPUT.name in {flag.name for flag in schema.flags} else (*schema.flags, OUTPUT)
    options: dict[str, Any] = {"assignments": Assignments}
    options |= {flag.name.replace("-", "_"): annotation(schema, flag) for flag in flags}
    options |= {"recipe": RecipeFile, **(key_switches or {}), **(switches or {})}

    def command(**given: Any) -> None:
        values, names = schema.from_flags(given)
        values |= {name: given[name] for name in key_switches or ()}
        recipe = load_recipe(schema, given["recipe"], values, given["assignments"] or [], names)
        run(recipe, **{name: given[name] for name in switches or ()})

    kind = inspect.Parameter.KEYWORD_ONLY
    signature = [inspect.Parameter(name, kind, default=None, annotation=option) for name, option in options.items()]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined] # what typer reads
    command.__annotations__, command.__doc__ = options, schema.summary
    return command


def annotation(schema: type[CommandRecipe], flag: Flag) -> Any:
    """A flag as typer reads it: with its key's type and default."""
    field = schema.model_fields.get(flag.key)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    default = field.default if field is not None else None
    words = f"{flag.help} (default: {default})" if isinstance(default, (str, int)) else flag.help
    option = typer.Option(f"--{flag.name}", metavar=flag.metavar, help=words)
    if flag.repeats:
        return Annotated[list[str] | None, option]
    if int in kinds:
        return Annotated[int | None, option]
    return Annotated[float | None, option] if float in kinds else Annotated[str | None, option]
