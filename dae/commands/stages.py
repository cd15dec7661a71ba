"""`dae align`, `dae sft`, `dae distill`: build the recipe, then train by it, or with `--check` only look at it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dae.recipe import AlignRecipe
from dae.routing import GENERAL, UNNAMED
from kd.config.data_recipe import ROUTE_NAME
from kd.config.loading import load_recipe
from kd.errors import UserError
from kd.runs.provenance import HELD_OUT
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe

if TYPE_CHECKING:
    from kd.training.run_stage import RunResult

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe; `dae keys` lists them")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE go over it")
]
Base = Annotated[str | None, typer.Option(metavar="CKPT", help="checkpoint that training starts from")]
Merge = Annotated[bool, typer.Option("--merge", help="also write merged full weights")]
Check = Annotated[bool, typer.Option("--check", help="only look, as `dae check` does: load no weights, train nothing")]


def align(
    assignments: Assignments = None,
    base: Base = None,
    expert: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]PATH", help="a domain's teacher; repeats, by name")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="CKPT", help="teacher of general rows (default: the base)")
    ] = None,
    domain_data: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="rows of an expert (default: those recorded in its run folder)"),
    ] = None,
    general_data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="general rows (default: those recorded in the reference's run folder)"),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder (default: runs/align)")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
    check: Check = False,
) -> None:
    """Make the student that matches each expert on its domain and the reference elsewhere."""
    flags, names = align_flags(expert or [], domain_data or [])
    flags |= {"base": base, "reference": reference, "output": output, "merge": merge or None}
    flags["data.general"] = list(general_data) if general_data else None
    names["data.general"] = "--general-data"
    loaded = load_recipe(AlignRecipe, recipe, flags, assignments or [], names)
    if check:
        look_at(loaded)
        return

    from dae.alignment import align as run

    tell(run(loaded))


def sft(
    assignments: Assignments = None,
    base: Base = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH", help="training rows; repeats")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
    check: Check = False,
) -> None:
    """Train an expert: next-token loss on response tokens."""
    flags = {"base": base, "data.train": list(data) if data else None, "output": output, "merge": merge or None}
    loaded = load_recipe(SftRecipe, recipe, flags, assignments or [], {"data.train": "--data"})
    if check:
        look_at(loaded)
        return

    from kd.stages.sft import sft as run

    tell(run(loaded))


def distill(
    assignments: Assignments = None,
    base: Base = None,
    teacher: Annotated[str | None, typer.Option(metavar="CKPT", help="checkpoint to learn from, of any size")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH", help="training rows; repeats")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder (default: runs/distill)")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
    check: Check = False,
) -> None:
    """Make a student that matches a larger teacher: the stage before align."""
    rows = list(data) if data else None
    flags = {"base": base, "teacher": teacher, "data.train": rows, "output": output, "merge": merge or None}
    loaded = load_recipe(DistillRecipe, recipe, flags, assignments or [], {"data.train": "--data"})
    if check:
        look_at(loaded)
        return

    from kd.stages.distill import distill as run

    tell(run(loaded))


def look_at(recipe: AlignRecipe | SftRecipe | DistillRecipe) -> None:
    """Show what a run by this recipe would do. Raises UserError for what would go wrong."""
    from dae.checking.check import check

    check(recipe)


def align_flags(experts: Sequence[str], domain_data: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`--expert [NAME=]PATH` and `--domain-data [NAME=]PATH` as dotted keys, and the flag of each key for messages."""
    flags: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, path in map(named, experts):
        key = "expert" if name is None else f"expert.{name}"
        if key in flags:
            again = "names two experts alike" if name else "without a name is for one expert: write --expert NAME=PATH"
            raise UserError(f"--expert {path}: {again}")
        flags[key], names[key] = path, "--expert"
    if "expert" in flags and len(flags) > 1:
        raise UserError(f"--expert {flags['expert']}: has no name beside named ones: write --expert NAME=PATH")
    for name, path in map(named, domain_data):
        if name == GENERAL:
            raise UserError(f"--domain-data {name}={path}: `{GENERAL}` is the reference's route: --general-data {path}")
        key = f"data.{name or UNNAMED}"
        flags.setdefault(key, []).append(path)
        names[key] = "--domain-data"
    return flags, names


def named(text: str) -> tuple[str | None, str]:
    """NAME=PATH -> (NAME, PATH); a text whose first part cannot be a name is a path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and ROUTE_NAME.fullmatch(name) else (None, text)


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
