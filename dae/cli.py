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
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from dae_eval.suites import Suite
from typer.exceptions import Abort, TyperException

from dae.commands.evaluation import eval_app, report
from dae.commands.merge import merge_app
from dae.commands.pipeline import run_recipe
from dae.commands.ranking import rank_teachers
from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.recipe import UNNAMED, AlignRecipe, SampleRecipe
from dae.routing import GENERAL
from kd.choose.recipe import RankRecipe
from kd.config import LARGEST_SEED, ROUTE_NAME, Frozen, SftRecipe, address, load_recipe
from kd.distill_recipe import DistillRecipe
from kd.errors import MachineError, Stopped, UserError
from kd.layers import Layers
from kd.problems import one_of

if TYPE_CHECKING:
    from kd.stage import RunResult

USER, OURS, MACHINE, INTERRUPTED, BROKEN_PIPE = 2, 3, 4, 130, 141
SCHEMAS: dict[str, type[Frozen]] = {
    "align": AlignRecipe,
    "distill": DistillRecipe,
    "sft": SftRecipe,
    "sample": SampleRecipe,
    "rank-teachers": RankRecipe,
    "merge-moe": MoeRecipe,
    "merge-weights": WeightsRecipe,
    "merge-to-lora": ToLoraRecipe,
    "suite": Suite,
}
CHECKED = ("align", "distill", "sft")  # the stages that `dae check` looks at
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
SMALLER_STEP = (
    "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps (the result is the same), "
    "or set train.gradient_checkpointing=true"
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One student that matches an expert on its domain and the general model elsewhere.",
)
app.add_typer(merge_app, name="merge")

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe; `dae keys` lists them")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE go over it")
]
Base = Annotated[str | None, typer.Option(metavar="CKPT", help="checkpoint that training starts from")]
Merge = Annotated[bool, typer.Option("--merge", help="also write merged full weights")]


@app.command()
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
        typer.Option(metavar="[NAME=]PATH", help="rows of an expert (default: those its run folder tells)"),
    ] = None,
    general_data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="general rows (default: those the reference's run folder tells)"),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder (default: runs/align)")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
) -> None:
    """Make the student that matches each expert on its domain and the reference elsewhere."""
    flags, names = align_flags(expert or [], domain_data or [])
    flags |= {"base": base, "reference": reference, "output": output, "merge": merge or None}
    flags["data.general"] = list(general_data) if general_data else None
    names["data.general"] = "--general-data"
    loaded = load_recipe(AlignRecipe, recipe, flags, assignments or [], names)

    from dae.alignment import align as run

    tell(run(loaded))


@app.command()
def sft(
    assignments: Assignments = None,
    base: Base = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH", help="training rows; repeats")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
) -> None:
    """Train an expert: next-token loss on response tokens."""
    flags = {"base": base, "data.train": list(data) if data else None, "output": output, "merge": merge or None}
    loaded = load_recipe(SftRecipe, recipe, flags, assignments or [], {"data.train": "--data"})

    from kd.sft import sft as run

    tell(run(loaded))


@app.command()
def distill(
    assignments: Assignments = None,
    base: Base = None,
    teacher: Annotated[str | None, typer.Option(metavar="CKPT", help="checkpoint to learn from, of any size")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH", help="training rows; repeats")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="run folder (default: runs/distill)")] = None,
    recipe: RecipeFile = None,
    merge: Merge = False,
) -> None:
    """Make a student that matches a larger teacher: the stage before align."""
    rows = list(data) if data else None
    flags = {"base": base, "teacher": teacher, "data.train": rows, "output": output, "merge": merge or None}
    loaded = load_recipe(DistillRecipe, recipe, flags, assignments or [], {"data.train": "--data"})

    from kd.distill import distill as run

    tell(run(loaded))


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

    from dae.sampling import sample as run

    typer.echo(run(loaded))


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file")],
    assignments: Assignments = None,
    stage: Annotated[str | None, typer.Option(help="sft, distill or align (default: as the recipe tells)")] = None,
) -> None:
    """Load everything but the weights: show rows, shares, masks, steps, memory; refuse what would go wrong."""
    chosen = stage or stage_of(recipe, assignments or [])
    if chosen not in CHECKED:
        raise UserError(f"--stage {chosen}: wants {one_of(CHECKED)}")
    loaded = load_recipe(SCHEMAS[chosen], recipe, {}, assignments or [])

    from dae.check import check as run

    run(loaded)  # type: ignore[arg-type]


@app.command()
def keys(stage: Annotated[str, typer.Argument(metavar=f"[{'|'.join(SCHEMAS)}]")] = "align") -> None:
    """List every key of a recipe with type, default and meaning."""
    if stage not in SCHEMAS:
        raise UserError(f"dae keys {stage}: wants {one_of(list(SCHEMAS))}")
    from rich.console import Console
    from rich.markup import escape

    from kd.key_docs import key_docs

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


app.add_typer(eval_app, name="eval")
app.command()(report)
app.command("rank-teachers")(rank_teachers)
app.command("run")(run_recipe)


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


def stage_of(recipe: Path, assignments: Sequence[str]) -> str:
    """The stage that a recipe is for: `align` if it names an expert, `distill` if it names a teacher, else `sft`.

    Raises UserError where it is a recipe of a command that is none of these stages.
    """
    layers = Layers(address)
    layers.read_yaml(recipe)
    command = other_command(set(layers.raw))
    if command is not None:
        raise UserError(
            f"{recipe}: is a recipe of `dae {command}`, which tells all its mistakes itself before anything runs; "
            f"`dae check` looks at recipes of {one_of(CHECKED)}"
        )
    for key, stage in (("expert", "align"), ("teacher", "distill")):
        if key in layers.raw or any(text.startswith(key) for text in assignments):
            return stage
    return "sft"


def other_command(keys: AbstractSet[str]) -> str | None:
    """The command whose recipe knows more of these outermost keys than those of the stages that are checked do."""
    from dae.pipeline.recipe import PipelineRecipe

    def known(schema: type[Frozen]) -> int:
        return len(keys & {field.alias or name for name, field in schema.model_fields.items()})

    others: dict[str, type[Frozen]] = {name: schema for name, schema in SCHEMAS.items() if name not in CHECKED}
    others["run"] = PipelineRecipe
    best = max(others, key=lambda name: known(others[name]))
    if known(others[best]) <= max(known(SCHEMAS[stage]) for stage in CHECKED):
        return None
    return "eval tasks --suite" if best == "suite" else best.replace("merge-", "merge ")


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


def tell(result: RunResult) -> None:
    """Print where a finished run lies, and for each route how far the student was from its teacher, first and last."""
    if not is_first_rank():
        return
    summary = result.summary
    typer.echo(f"{result.path}: finished, {summary['steps']} steps")
    for route in summary["rows"]:
        last = summary["last"]
        if f"{route}/kl" in last:
            first = summary["initial_kl"].get(route, 0.0)
            line = f"KL to its teacher {nats(first)} -> {nats(last[f'{route}/kl'])}"
        elif f"{route}/ntp" in last:
            line = f"next-token loss {nats(last[f'{route}/ntp'])}"
        else:
            continue
        held_out = summary["held_out"]
        measured = held_out.get(f"eval_{route}_kl", held_out.get(f"eval_{route}_ntp"))
        typer.echo(f"  {route:<12} {line}" + ("" if measured is None else f"; held out {nats(measured)}"))


def nats(value: float) -> str:
    """Three digits; what rounds to 0 has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def is_first_rank() -> bool:
    """Whether this process speaks for the run (torchrun and accelerate number their processes)."""
    return os.environ.get("RANK", "0") == "0"


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
    """Quieten the libraries before they are imported, and send our own messages to stderr."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        if name not in environment:
            os.environ[name] = value
    warnings.filterwarnings("ignore", category=FutureWarning)
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|peft|accelerate)\.")
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
