"""The command of each stage (`dae align`, ...): build the recipe, then train, or only check with `--check`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dae.stages import STAGES, StageEntry
from kd.config.loading import load_recipe
from kd.config.stage_recipe import Flag, StageRecipe
from kd.runs.provenance import HELD_OUT

if TYPE_CHECKING:
    from kd.stages.run_stage import RunResult

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe; `dae keys` lists them")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE override it")
]
Merge = Annotated[bool, typer.Option("--merge", help="also write merged full weights")]
Check = Annotated[bool, typer.Option("--check", help="only check, as `dae check` does: load no weights, train nothing")]


def stage_command(name: str) -> Callable[..., None]:
    """The command of a stage, with a parameter for each flag that its recipe declares."""
    entry = STAGES[name]

    def command(**given: Any) -> None:
        flags, names = entry.recipe.from_flags({key: value for key, value in given.items() if value is not None})
        flags["merge"] = given["merge"] or None
        recipe = load_recipe(entry.recipe, given["recipe"], flags, given["assignments"] or [], names)
        (check_stage if given["check"] else run)(entry, recipe)

    parameters: dict[str, tuple[Any, Any]] = {"assignments": (Assignments, None)}
    parameters |= {flag.name.replace("-", "_"): (annotation(flag), None) for flag in entry.recipe.flags}
    parameters |= {"output": (annotation(output_flag(entry.recipe)), None), "recipe": (RecipeFile, None)}
    parameters |= {"merge": (Merge, False), "check": (Check, False)}
    kind = inspect.Parameter.KEYWORD_ONLY
    signature = [inspect.Parameter(key, kind, default=d, annotation=a) for key, (a, d) in parameters.items()]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined] # what typer reads
    command.__annotations__ = {key: a for key, (a, _) in parameters.items()}
    command.__name__, command.__doc__ = name, entry.recipe.summary
    return command


def annotation(flag: Flag) -> Any:
    """A flag as typer reads it."""
    option = typer.Option(f"--{flag.name}", metavar=flag.metavar, help=flag.help)
    return Annotated[list[str] | None, option] if flag.repeats else Annotated[str | None, option]


def output_flag(recipe: type[StageRecipe]) -> Flag:
    """`--output`, with the recipe's default."""
    default = recipe.model_fields["output"].default
    return Flag(
        "output", "output", "DIR", "run folder" + (f" (default: {default})" if isinstance(default, str) else "")
    )


def run(entry: StageEntry, recipe: StageRecipe) -> None:
    """Train by a recipe, and print what came of it."""
    from kd.stages.run_stage import run_stage

    tell(run_stage(entry.load(), recipe))


def check_stage(entry: StageEntry, recipe: StageRecipe) -> None:
    """Show what a run by this recipe would do. Raises UserError with everything that would stop it."""
    from dae.checking.check import check

    check(entry.load(), recipe)


def tell(result: RunResult) -> None:
    """Print where a finished run lies, and for each route how far the student was from its teacher, first and last."""
    if not is_first_rank():
        return
    summary = result.summary
    typer.echo(f"{result.path}: finished, {summary['steps']} steps")
    for route in summary["rows"]:
        if not route.startswith(HELD_OUT):
            typer.echo(f"  {route:<12} {route_line(route, summary)}")


def route_line(route: str, summary: Mapping[str, Any]) -> str:
    """What a finished run says of one route. `last` holds the newest value of each metric, which may be an old one."""
    last, held_out = summary["last"], summary["held_out"]
    if f"{route}/kl" in last:
        line = f"KL to its teacher {nats(summary['initial_kl'].get(route, 0.0))} -> {nats(last[f'{route}/kl'])}"
    elif f"{route}/ntp" in last:
        line = f"next-token loss {nats(last[f'{route}/ntp'])}"
    else:
        line = "none of its rows came in a step that was logged"
    measured = held_out.get(f"eval_{route}_kl", held_out.get(f"eval_{route}_ntp"))
    return line if measured is None else f"{line}; held out {nats(measured)}"


def nats(value: float) -> str:
    """Three digits; what rounds to 0 has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def is_first_rank() -> bool:
    """Whether this process speaks for the run (torchrun and accelerate number their processes)."""
    return os.environ.get("RANK", "0") == "0"
