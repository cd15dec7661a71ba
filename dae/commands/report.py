"""`dae report`: parse, call, print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dae.commands.evaluation import Assignments, SuiteFile, typed_command
from dae.reporting import ROLES, Bounds, ask_models, judged, with_reference
from kd.config.data_recipe import ROUTE_NAME
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.report import Report
    from dae_eval.results import Evaluation

PASSED, NOT_PASSED = 0, 1


def report(
    assignments: Assignments = None,
    base: Annotated[str | None, typer.Option(metavar="CKPT", help="the model that the expert started from")] = None,
    expert: Annotated[str | None, typer.Option(metavar="CKPT", help="the model trained on the domain")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="CKPT", help="the model whose general skills must be kept (default: the base)")
    ] = None,
    student: Annotated[str | None, typer.Option(metavar="CKPT", help="the model to judge")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="NAME=CKPT", help="another student, shown beside it; repeats")
    ] = None,
    finished: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="[ROLE=]DIR", help="a finished evaluation, instead of models; repeats"),
    ] = None,
    suite: SuiteFile = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="folder for the report")] = None,
    margin: Annotated[float, typer.Option(help="largest accepted loss on general tasks, in points")] = 1.0,
    min_gap: Annotated[float, typer.Option(help="smallest accepted part of the expert's gain, 0 to 1")] = 0.0,
    max_task_loss: Annotated[float, typer.Option(help="largest accepted loss of a single task, in points")] = 5.0,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="pass although models, or documents of them, lack this task; repeats"),
    ] = None,
    retention_only: Annotated[bool, typer.Option("--retention-only", help="compare without an expert")] = False,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the student's README.md, to write the result into it")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="a JUnit XML file to write, for CI")] = None,
) -> int:
    """Compare base, expert, reference and student. Exit status 0 for PASS, 1 for FAIL and INCONCLUSIVE."""
    roles = {"base": base, "expert": expert, "reference": reference, "student": student}
    given = {role: path for role, path in roles.items() if path is not None}
    refuse_mixed_usage(given, compare or [], finished or [], suite, output, assignments or [], retention_only)
    bounds = Bounds(margin, min_gap, max_task_loss)
    bounds.check("--")
    assert output is not None
    refuse_unfit_places(card, junit)
    command = typed_command()
    if finished:
        evaluations = read_finished(finished)
    else:
        assert suite is not None
        models = with_reference(given, other_students(given, compare or []))
        evaluations = ask_models(models, suite, assignments or [], output, command, "--")
    result = judged(evaluations, bounds, allow_missing or [], retention_only, command)
    publish(result, output, card, junit)
    return PASSED if result.word == "PASS" else NOT_PASSED


def refuse_unfit_places(card: Path | None, junit: Path | None) -> None:
    """Raise UserError before anything is evaluated if a report could not be written there."""
    if card is not None:
        from dae_eval.rendering.card import read_card

        read_card(card)
    if junit is not None and (junit.is_dir() or not junit.parent.is_dir()):
        why = "is a folder" if junit.is_dir() else f"folder {junit.parent} not found"
        raise UserError(f"--junit {junit}: {why}; give the path of a file")


def publish(result: Report, output: Path, card: Path | None, junit: Path | None) -> None:
    """Write the report into its folder, show it, and write it into a JUnit file and a model card where asked for."""
    from dae_eval.rendering import terminal, write_report
    from rich.console import Console

    write_report(result, output)
    terminal.show(result, Console(highlight=False))
    typer.echo(f"The report is in {output / 'report.html'}")
    if junit is not None:
        from dae_eval.rendering.junit import render

        from kd.runs.files import write_text_durably

        write_text_durably(junit, render(result))
        typer.echo(f"The JUnit file is {junit}")
    if card is not None:
        from dae_eval.rendering.card import upload_command, write_card

        write_card(result, card)
        typer.echo(f"The result is in {card}; to upload its folder: {upload_command(card)}")


def refuse_mixed_usage(
    given: Mapping[str, str],
    compare: Sequence[str],
    finished: Sequence[str],
    suite: Path | None,
    output: Path | None,
    assignments: Sequence[str],
    retention_only: bool,
) -> None:
    """Raise UserError, with all problems, if the flags do not belong together."""
    problems = [] if output else ["--output: is required"]
    if finished:
        flags = [f"--{role}" for role in given]
        flags += [name for name, value in (("--compare", compare), ("--suite", suite)) if value]
        flags += [*assignments[:1]]
        if flags:
            problems.append(
                f"{', '.join(flags)}: cannot be combined with --from; give models (with --suite) or finished "
                "evaluations (--from [ROLE=]DIR)"
            )
    else:
        needed = ["student", *([] if retention_only else ["base", "expert"])]
        missing = [f"--{role}" for role in needed if role not in given]
        if retention_only and not {"base", "reference"} & given.keys():
            missing.append("--reference")
        if suite is None:
            missing.append("--suite")
        if missing:
            problems.append(
                f"{', '.join(missing)}: required to evaluate models; without an expert give --retention-only; for "
                "finished evaluations give --from [ROLE=]DIR"
            )
    if problems:
        raise UserError("\n".join(problems))


def other_students(given: Mapping[str, str], compare: Sequence[str]) -> dict[str, str]:
    """Other students by name. Raises UserError for a name that is missing, a role's, or there twice."""
    others: dict[str, str] = {}
    for text in compare:
        name, path = named(text)
        if name is None or name in ROLES:
            raise UserError(f"--compare {text}: expected NAME=CKPT with a name other than {', '.join(ROLES)}")
        if name in others or name in given:
            raise UserError(f"--compare {text}: duplicate name {name}")
        others[name] = path
    return others


def named(text: str) -> tuple[str | None, str]:
    """NAME=PATH -> (NAME, PATH); a text whose first part cannot be a name is a path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and ROUTE_NAME.fullmatch(name) else (None, text)


def read_finished(finished: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluations of `--from`, by role; without a reference, the base is the reference."""
    from dae_eval.comparing.roles import assign_roles
    from dae_eval.folders import read_evaluation

    roles = assign_roles([(role, read_evaluation(Path(path))) for role, path in map(named, finished)])
    return roles if "base" not in roles else {"reference": roles["base"], **roles}
