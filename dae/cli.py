"""The command line: registers the commands, runs one, and turns errors into messages and exit statuses.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import dae
from dae.commands.caching import cache_command
from dae.commands.checking import check_command
from dae.commands.evaluation import eval_app
from dae.commands.keys import keys
from dae.commands.merge import merge_app
from dae.commands.pipeline import run_recipe
from dae.commands.recipe_command import recipe_command
from dae.commands.report import report
from dae.commands.sources import rank_teachers, sample
from dae.commands.stages import says_errors, stage_command
from dae.exit_status import BROKEN_PIPE, INTERRUPTED, MACHINE, OURS, USER, status_of, traceback_log
from dae.process import prepare_process
from dae.rank_teachers.recipe import RankRecipe
from dae.sampling.recipe import SampleRecipe
from dae.stages import STAGES
from kd.config.problems import visible
from kd.config.schema import LARGEST_SEED

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "MACHINE", "OURS", "USER", "command_line", "main", "run"]

# The variable by which a shell asks for completions, and the flags that install them.
COMPLETION, COMPLETION_FLAGS = "_DAE_COMPLETE", {"--install-completion", "--show-completion"}


def command_line() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(everything)
    for name in STAGES:
        app.command(name)(stage_command(name))
    app.add_typer(check_command(), name="check")
    app.add_typer(cache_command(), name="cache")
    app.add_typer(merge_app(), name="merge")
    app.add_typer(eval_app, name="eval")
    app.command("sample")(recipe_command(SampleRecipe, sample))
    app.command("rank-teachers")(recipe_command(RankRecipe, rank_teachers))
    app.command("run")(run_recipe)
    app.command()(keys)
    app.command()(report)
    app.command()(demo)
    return app


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dae {dae.__version__}")
        raise typer.Exit


def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train one model that has a domain expert's skills and keeps the general model's."""


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="folder to write")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="seed of weights and row order; the data do not change")
    ] = 0,
) -> None:
    """Run everything on a small made-up data set: base, expert, student, report. No download, no GPU."""
    from dae.demo.story import demo as run

    run(output, seed, run_here)


def run_here(arguments: Sequence[str]) -> None:
    """Run one command inside another as if it were typed; provenance records its own command line.

    typer turns Ctrl-C into a status; here it stops the outer command, too.
    """
    typed, sys.argv = sys.argv, ["dae", *arguments]
    try:
        if command_line()(list(arguments), prog_name="dae", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    finally:
        sys.argv = typed


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status. Errors go to stderr as messages, never as tracebacks."""
    try:
        answer = command_line()(list(arguments) or ["--help"], prog_name="dae", standalone_mode=False)
        sys.stdout.flush()
        if answer == INTERRUPTED:
            raise KeyboardInterrupt
        return int(answer or 0)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - the outermost handler
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        if isinstance(error, SystemExit) and (COMPLETION in os.environ or {*arguments} & COMPLETION_FLAGS):
            return USER if error.code else 0  # typer exits after completion
        status, message = status_of(error)
        command = " ".join(["dae", *arguments[:1]])
        if status == OURS:
            typer.echo(f"{command}: {traceback_log(error)}", err=True)
        elif says_errors():
            typer.echo(f"{command}: {visible(message)}", err=True)
        return status


def main() -> None:
    prepare_process(os.environ)
    sys.exit(run(sys.argv[1:]))
