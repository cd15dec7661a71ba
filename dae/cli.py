"""The command line: parse, call one function, print. Heavy imports wait until a command needs them.

Exit status: 0 done, 1 a report's verdict, 2 the user's mistake, 3 our own fault, 4 the machine, 128 + n stopped by
signal n.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

import dae
from dae.commands.checking import check_app
from dae.commands.evaluation import eval_app, report
from dae.commands.merge import merge_app
from dae.commands.pipeline import run_recipe
from dae.commands.ranking import rank_teachers
from dae.commands.schemas import SCHEMAS
from dae.commands.stages import Assignments, RecipeFile, align, distill, is_first_rank, sft
from dae.sampling.recipe import SampleRecipe
from kd.config.loading import load_recipe
from kd.config.problems import one_of
from kd.config.schema import LARGEST_SEED
from kd.errors import MachineError, Stopped, UserError

USER, OURS, MACHINE, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 130, 141
# What a shell sets to be told how a word may go on, and what a user types to set that up.
COMPLETION, COMPLETION_FLAGS = "_DAE_COMPLETE", {"--install-completion", "--show-completion"}
# Any of these is the user's choice of how long OpenMP's threads spin.
SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
SMALLER_STEP = (
    "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps (the result is the same), "
    "or set train.gradient_checkpointing=true"
)

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(check_app, name="check")
app.add_typer(merge_app, name="merge")
app.add_typer(eval_app, name="eval")


def show_version(wanted: bool) -> None:
    """Print the version and end, where it is asked for."""
    if wanted:
        typer.echo(f"dae {dae.__version__}")
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One student that matches an expert on its domain and the general model elsewhere."""


app.command()(align)
app.command()(sft)
app.command()(distill)


@app.command()
def sample(
    assignments: Assignments = None,
    model: Annotated[str | None, typer.Option(metavar="CKPT", help="the model that writes")] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL file to write")] = None,
    rows: Annotated[int | None, typer.Option(help="how many rows (default: 1000)")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest row in tokens (default: 256)")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same rows (default: 0)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows written at a time (default: 16)")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL whose prompts are answered")] = None,
    recipe: RecipeFile = None,
) -> None:
    """Let a model write general rows itself, for teams that have none."""
    flags = {
        "model": model,
        "output": output,
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "prompts": prompts,
    }
    loaded = load_recipe(SampleRecipe, recipe, flags, assignments or [])

    from dae.sampling.sample import sample as run

    typer.echo(run(loaded))


@app.command()
def keys(stage: Annotated[str, typer.Argument(metavar=f"[{'|'.join(SCHEMAS)}]")] = "align") -> None:
    """List every key of a recipe with type, default and meaning."""
    if stage not in SCHEMAS:
        raise UserError(f"dae keys {stage}: expected {one_of(list(SCHEMAS))}")
    from rich.console import Console
    from rich.markup import escape

    from kd.config.key_docs import key_docs

    console = Console(highlight=False)
    for doc in key_docs(SCHEMAS[stage]):
        default = "required" if doc.default == "required" else f"default {doc.default}"
        console.print(f"[bold]{escape(doc.key)}[/]  {escape(doc.type)}, {escape(default)}", soft_wrap=True)
        console.print(f"    {escape(doc.meaning)}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="where its runs go")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="of weights and of the order of rows; the world stays the same")
    ] = 0,
) -> None:
    """The whole story on a small made-up world: base, expert, student, report. No download, no GPU."""
    from dae.demo.story import demo as run

    run(output, seed, run_here)


app.command()(report)
app.command("rank-teachers")(rank_teachers)
app.command("run")(run_recipe)


def run_here(arguments: Sequence[str]) -> None:
    """Run one command within another, as if it were typed: what is written down of it is its own command line.

    typer answers Ctrl-C with a status; the outer command ends there, too.
    """
    typed, sys.argv = sys.argv, ["dae", *arguments]
    try:
        if app(list(arguments), prog_name="dae", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    finally:
        sys.argv = typed


def status_of(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an error; the message is empty for faults of our own."""
    if isinstance(error, Stopped):
        return 128 + error.signal_number, str(error)
    if isinstance(error, (KeyboardInterrupt, Abort)):
        return INTERRUPTED, "stopped; the same command goes on from the last checkpoint, if there is one"
    if isinstance(error, UserError):
        return USER, str(error)
    if isinstance(error, TyperException):
        return USER, usage_message(error)
    if isinstance(error, MachineError):
        return MACHINE, str(error)
    if is_out_of_memory(error):
        return MACHINE, f"out of memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}; {SMALLER_STEP}"
    if isinstance(error, OSError):
        return status_of_os_error(error)
    return OURS, ""


def usage_message(error: TyperException) -> str:
    """A usage error in one line, with the command that explains."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dae"
    return f"{error.format_message()} (see `{command} --help`)"


def is_out_of_memory(error: BaseException) -> bool:
    """Memory of the machine or of the accelerator ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def status_of_os_error(error: OSError) -> tuple[int, str]:
    """A full disk is the machine's; a place that may not be written is the user's; others are our own fault."""
    place = error.filename or "the output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MACHINE, f"{place}: the disk is full; make room, then give the same command again to go on"
    if error.errno == errno.ENOMEM:
        return MACHINE, f"out of memory; {SMALLER_STEP}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return USER, f"{place}: {os.strerror(error.errno).lower()}; name a place that you may use"
    return OURS, ""


def traceback_log(error: BaseException) -> str:
    """Write the traceback to a new file and say where it is, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    what = f"{type(error).__name__}{where}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dae-", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}")
    except OSError as failure:
        return f"this is our fault, not yours: {what} (no log could be written: {failure.strerror})"
    return f"this is our fault, not yours: {what}; the traceback is in {log.name}"


def prepare_process(environment: Mapping[str, str]) -> None:
    """Settle what libraries read when they are imported, here and in child processes; send our messages to stderr.

    Threads of OpenMP sleep while they wait, unless the user chose: on cores that others use too, spinning ones cost
    several times the work (benchmarks/omp_wait_policy.py).
    """
    if not SPINNING & environment.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        if name not in environment:
            os.environ[name] = value
    warnings.filterwarnings("ignore", category=FutureWarning)
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|accelerate)\.")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("dae", "kd"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if is_first_rank() else logging.ERROR)
        logger.propagate = False


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; what went wrong is told on stderr, never as a traceback."""
    try:
        answer = app(list(arguments) or ["--help"], prog_name="dae", standalone_mode=False)
        sys.stdout.flush()
        if answer == INTERRUPTED:
            raise KeyboardInterrupt
        return int(answer or 0)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - the one place where everything ends
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        if isinstance(error, SystemExit) and (COMPLETION in os.environ or {*arguments} & COMPLETION_FLAGS):
            return USER if error.code else 0  # typer ends the process once the shell has what it asked for
        status, message = status_of(error)
        command = " ".join(["dae", *arguments[:1]])
        if status == OURS:
            typer.echo(f"{command}: {traceback_log(error)}", err=True)
        elif is_first_rank():
            typer.echo(f"{command}: {message}", err=True)
        return status


def main() -> None:
    """Entry point of the command `dae`."""
    prepare_process(os.environ)
    sys.exit(run(sys.argv[1:]))
