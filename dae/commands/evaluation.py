"""`dae eval tasks`: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dae.commands.judging import register as register_judging
from dae.commands.score_tables import print_scores, show_plan
from dae.commands.stopping import going_on
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.results import Evaluation

eval_app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="Evaluate a model and save its answers."
)
register_judging(eval_app)

SuiteFile = Annotated[Path | None, typer.Option("--suite", metavar="FILE", help="YAML: which tasks, in which groups")]
Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the suite, such as batch_size=8")
]


@eval_app.callback()
def evaluations() -> None:
    """Evaluate a model."""


@eval_app.command()
def tasks(
    assignments: Assignments = None,
    model: Annotated[str, typer.Option(metavar="CKPT", help="checkpoint, adapter or run folder")] = "",
    suite: SuiteFile = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="folder for the answers")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="CKPT", help="base of an adapter (default: the base in its config)")
    ] = None,
) -> None:
    """Score a model on the tasks of a suite; the same command resumes an interrupted run."""
    missing = [flag for flag, value in (("--model", model), ("--suite", suite), ("--output", output)) if not value]
    if missing:
        raise UserError(f"{', '.join(missing)}: required: dae eval tasks --model CKPT --suite FILE --output DIR")
    assert suite is not None and output is not None
    from dae_eval.suites import load_suite

    loaded = load_suite(suite, assignments or [])

    from dae_eval.evaluation import evaluate
    from dae_eval.models import locate

    with going_on(output, "finished tasks are kept"):
        models = {"model": locate("--model", model, base)}
        found = evaluate(models, loaded, {"model": output}, typed_command(), show_plan)
    show_scores(found["model"], output)


def typed_command() -> list[str]:
    """The command line without the program's path."""
    return ["dae", *sys.argv[1:]]


def show_scores(evaluation: Evaluation, output: Path) -> None:
    """The scores, and notes on them."""
    from rich.console import Console
    from rich.text import Text

    print_scores(evaluation)
    console = Console(highlight=False)
    for line in notes(evaluation):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"All answers are in {output}"), soft_wrap=True)


def notes(evaluation: Evaluation) -> Iterator[str]:
    """Notes on an evaluation's limits."""
    seen = sum(document.seen for task in evaluation.tasks.values() for document in task.documents)
    if seen:
        yield f"{seen} documents also occur in training rows"
    for rows in evaluation.training_rows:
        if rows.problem:
            yield f"{rows.path}: not compared with the documents: {rows.problem}"
    truncated: Any = evaluation.conditions.get("truncated", {})
    for task, count in truncated.items():
        yield f"{task}: {count} requests were longer than the model's context and were truncated on the left"
