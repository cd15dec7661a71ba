"""`dae check`: everything but the weights, before a run costs anything.

It goes the way of the real run (the same functions read rows, pair roles and lay out steps), so that a recipe which
passes does not fail later for a reason that could have been seen.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainingArguments

from dae.alignment import check_checkpoints, fingerprints, load_data
from dae.checking.estimates import Item, Models, disk, memory, models_of, tokens_of_run
from dae.checking.loss_shares import LossShare, loss_shares
from dae.checking.meta_roles import check_roles, fewest_positions
from dae.checking.overlap import overlaps
from dae.earlier_student import with_lora_of_student
from dae.recipe import AlignRecipe
from kd.config.data_recipe import SourceRecipe
from kd.data.examples import SourceReport, marked_text
from kd.data.mixing import Mixture
from kd.data.records import read_records
from kd.data.stage_data import StageData, load_stage_data, refuse_unfit_rows, unread_keys
from kd.data.token_rows import TokenRows
from kd.errors import UserError
from kd.models.checkpoint_files import model_fingerprint
from kd.models.roles import LoadSettings
from kd.runs.provenance import HELD_OUT, read_provenance
from kd.runs.run_folder import RunFolder, Start
from kd.stages import distill
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft import ROUTE, check_checkpoint
from kd.stages.sft_recipe import SftRecipe
from kd.training.settings import load_settings, planned_steps, rows_per_step, training_arguments

SMALL_SHARE = 0.05  # of the loss: below it a route is hardly learnt
MANY_STEPS = 0.1  # of the run: a route that is missing from more has noticeably less of the loss than it was given
ROWS_SHOWN = 2  # of each route
CHARACTERS_SHOWN = 240  # of each segment of a row
STAGES = {SftRecipe: "sft", DistillRecipe: "distill", AlignRecipe: "align"}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to."""

    data: StageData
    args: TrainingArguments
    settings: LoadSettings
    mixture: Mixture
    steps: int
    models: Models


class Findings:
    """Problems found so far; each step of a check adds its own, so that all are told at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, step: Callable[[], Result]) -> Result | None:
        """The step's result, or None where it found a problem."""
        try:
            return step()
        except UserError as error:
            self.problems.append(str(error))
            return None

    def tell(self) -> None:
        """Raise UserError with everything that was found."""
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError("\n".join([f"{len(self.problems)} problems:", *(f"  {line}" for line in self.problems)]))


def check(recipe: SftRecipe | DistillRecipe | AlignRecipe, console: Console | None = None) -> None:
    """Print what the run would do. Raises UserError with everything that would stop it."""
    plan = make_plan(recipe)
    console = console or Console(highlight=False)
    show_routes(console, recipe, plan)
    show_rows(console, plan)
    show_held_out(console, recipe, plan.data)
    show_effort(console, recipe, plan)


def make_plan(recipe: SftRecipe | DistillRecipe | AlignRecipe) -> Plan:
    """Everything but the weights. Raises UserError with every problem found."""
    found = Findings()
    found.of(lambda: check_output(recipe.output))
    settings = load_settings(recipe)
    inputs = found.of(lambda: inputs_of(recipe))
    models = None
    if inputs is not None:
        if isinstance(recipe, AlignRecipe):
            found.of(partial(check_checkpoints, recipe, inputs))
        if isinstance(recipe, DistillRecipe):
            found.of(partial(distill.check_checkpoints, recipe))
        if isinstance(recipe, SftRecipe):
            found.of(partial(check_checkpoint, recipe))
        if isinstance(recipe, AlignRecipe) and not found.problems:
            recipe = found.of(partial(with_lora_of_student, recipe)) or recipe
        # What does not belong together cannot be laid out either.
        models = found.of(lambda: models_of(recipe, inputs, settings)) if not found.problems else None
    args = found.of(lambda: training_arguments(recipe, settings))
    readable = [found.of(partial(first_record, source)) for source in sources_of(recipe)]
    data = found.of(lambda: data_of(recipe)) if inputs is not None and None not in readable else None
    mixture = steps = None
    if data is not None and args is not None:
        mixture = found.of(lambda: Mixture(data.sources, rows_per_step(args), recipe.seed))
    if mixture is not None and args is not None:
        steps = found.of(lambda: planned_steps(mixture, args))
    if models is not None:
        found.of(lambda: check_roles(recipe, models.roles))
    if data is not None and models is not None:
        positions = fewest_positions(models.roles)
        found.of(lambda: refuse_unfit_rows(recipe, data, models.vocabulary_rows, positions))
    if data is not None and inputs is not None:
        found.of(lambda: look_at_output(recipe, inputs, data))
    found.tell()
    assert data is not None
    assert args is not None
    assert mixture is not None
    assert steps is not None
    assert models is not None
    return Plan(data, args, settings, mixture, steps, models)


def sources_of(recipe: SftRecipe | DistillRecipe | AlignRecipe) -> list[SourceRecipe]:
    """All sources, for training and held out."""
    return [
        source for part in (recipe.data.routes, recipe.data.eval) for sources in part.values() for source in sources
    ]


def first_record(source: SourceRecipe) -> str:
    """Where a source begins. Raises UserError where it cannot be read, so that all missing files are told at once."""
    location, _ = next(read_records(source))
    return location


def inputs_of(recipe: SftRecipe | DistillRecipe | AlignRecipe) -> dict[str, str]:
    """Fingerprint of each role."""
    if isinstance(recipe, AlignRecipe):
        return fingerprints(recipe)
    if isinstance(recipe, DistillRecipe):
        return distill.fingerprints(recipe)
    return {"base": model_fingerprint(recipe.base)}


def data_of(recipe: SftRecipe | DistillRecipe | AlignRecipe) -> StageData:
    """All rows, encoded, as the stage itself reads them."""
    if isinstance(recipe, AlignRecipe):
        return load_data(recipe)
    if isinstance(recipe, DistillRecipe):
        return distill.load_data(recipe)
    return load_stage_data(recipe, [ROUTE], None)


def check_output(output: str) -> None:
    """Raise UserError where the run folder could not be written."""
    place = Path(output)
    if place.exists() and not place.is_dir():
        raise UserError(f"output: {output}: is a file; name a folder")
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output: {output}: {existing} may not be written; name a place that you may use")


def look_at_output(recipe: SftRecipe | DistillRecipe | AlignRecipe, inputs: Mapping[str, str], data: StageData) -> None:
    """Raise UserError where the run folder holds another run, or a live process holds it."""
    begun = read_provenance(recipe.output) or {}
    processes = begun.get("processes", 1)  # how many a launcher will start is not known here
    start = Start(STAGES[type(recipe)], recipe, inputs, recipe.base, data.inputs, processes)
    RunFolder(recipe.output).look(start)


def show_routes(console: Console, recipe: SftRecipe | DistillRecipe | AlignRecipe, plan: Plan) -> None:
    """Rows, tokens and shares of each route; then what was cut or dropped and why; then what to worry about."""
    data = plan.data
    table = plain_table("route", "rows", "tokens", "response", "% rows", "% loss", "cut", "dropped", "passes")
    shares = loss_shares(recipe, data, plan.mixture, plan.steps)
    for name in data.route_names:
        reports = data.reports[name]
        share = sum(source.share for source in data.sources if source.route == name)
        passes = share * plan.steps * plan.mixture.rows_per_step / sum(report.kept for report in reports)
        kept, tokens, response, cut, dropped = row_counts(reports)
        part = f"{100 * shares[name].mean:.1f}"
        table.add_row(name, kept, tokens, response, f"{100 * share:.1f}", part, cut, dropped, f"{passes:.2g}")
    console.print(table)
    console.print("response: response tokens; % loss: mean over the steps;")
    console.print("cut: truncated to data.max_length; passes: how often the run sees each row")
    for report in (report for name in data.route_names for report in data.reports[name]):
        tell_report(console, report)
    for words in data.tokenizer_faults:
        console.print(Text.assemble(("warning: ", "bold"), words), soft_wrap=True)
    for name, loss_share in shares.items():
        for words in share_warnings(name, loss_share, recipe, plan.mixture):
            console.print(f"[bold]warning:[/] {words}", soft_wrap=True)


def row_counts(reports: Sequence[SourceReport]) -> tuple[str, str, str, str, str]:
    """Rows kept, their tokens and response tokens, rows cut and rows dropped, of several sources together."""
    kept, tokens, response, cut = (
        f"{sum(getattr(report, name) for report in reports):,}"
        for name in ("kept", "tokens", "response_tokens", "truncated")
    )
    return kept, tokens, response, cut, f"{sum(sum(report.dropped.values()) for report in reports):,}"


def share_warnings(
    route: str, share: LossShare, recipe: SftRecipe | DistillRecipe | AlignRecipe, mixture: Mixture
) -> Iterator[str]:
    """What to say of a route that has little of the loss, or none of it in many steps."""
    pooled = isinstance(recipe, AlignRecipe) and recipe.weights == "tokens"
    if share.mean < SMALL_SHARE:
        remedy = "weights=routes gives each route the same say, a" if pooled else "A"
        yield (
            f"route {route} has {100 * share.mean:.2g} % of the loss: it will hardly be learnt. "
            f"{remedy} larger share of rows gives it more."
        )
    if share.absent > MANY_STEPS and not pooled:
        rows = math.ceil(1 / sum(source.share for source in mixture.sources if source.route == route))
        yield (
            f"route {route} has no row in {100 * share.absent:.0f} % of the steps, and there the other routes have all "
            f"of the loss. A step of at least {rows} rows (train.gradient_accumulation_steps) has one of it each time; "
            "or give each token the same say, whichever step it comes in: weights=tokens."
        )


def show_rows(console: Console, plan: Plan) -> None:
    """Some rows of each route with their response tokens marked."""
    for name in plan.data.route_names:
        rows = next(
            part for source, part in zip(plan.data.sources, plan.data.rows, strict=True) if source.route == name
        )
        marks = "underlined" if console.is_terminal else "in [[ ]]"
        console.print(f"\nroute {name}, response tokens {marks}:", markup=False)
        for place in range(min(ROWS_SHOWN, len(rows))):
            console.print(marked_row(rows, place, plan, console.is_terminal), soft_wrap=True)


def marked_row(rows: TokenRows, place: int, plan: Plan, styled: bool) -> Text:
    """One row for people; long segments are cut in the middle."""
    shown = Text("  ")
    for text, is_response in marked_text(rows[place], plan.data.tokenizer):
        cut = shortened(text).replace("\n", "\n  ")
        if not is_response:
            shown.append(cut)
        elif styled:
            shown.append(cut, style="bold underline")
        else:
            shown.append(f"[[{cut}]]")
    return shown


def shortened(text: str) -> str:
    """The text, or its two ends where it is long."""
    half = CHARACTERS_SHOWN // 2
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[:half]} ... {text[-half:]}"


def tell_report(console: Console, report: SourceReport) -> None:
    """The shape of a source's rows, why some were dropped, what is particular about others, and keys not read."""
    formats = ", ".join(f"{name} ({count:,})" for name, count in report.formats.items())
    console.print(f"{report.path}: format: {formats}", soft_wrap=True, markup=False)
    for words in [
        *(f"{count} {'row' if count == 1 else 'rows'} dropped: {reason}" for reason, count in report.dropped.items()),
        *report.notes,
    ]:
        console.print(f"{report.path}: {words}", soft_wrap=True, markup=False)
    if words := unread_keys(report):
        console.print(Text.assemble(("warning: ", "bold"), f"{report.path}: {words}"), soft_wrap=True)


def show_held_out(console: Console, recipe: SftRecipe | DistillRecipe | AlignRecipe, data: StageData) -> None:
    """Held-out rows, what became of them, and how many of them also stand in training."""
    if not recipe.data.eval:
        console.print(
            "\nno held-out rows (data.eval): the last checkpoint is the result, whether or not it is the best"
        )
        return
    table = plain_table("held out", "rows", "tokens", "response", "cut", "dropped", "in training", "same prompt")
    for name, overlap in overlaps(recipe.data, data.reports).items():
        reports = data.reports[f"{HELD_OUT}{name}"]
        table.add_row(name, *row_counts(reports), f"{overlap.same_row:,}", f"{overlap.same_prompt:,}")
    console.print()
    console.print(table)
    for name in recipe.data.eval:
        for report in data.reports[f"{HELD_OUT}{name}"]:
            tell_report(console, report)


def show_effort(console: Console, recipe: SftRecipe | DistillRecipe | AlignRecipe, plan: Plan) -> None:
    """Steps, tokens, memory, disk."""
    args, mixture = plan.args, plan.mixture
    rows = plan.steps * mixture.rows_per_step
    epoch = f", {mixture.rows_per_epoch:,} an epoch" if mixture.rows_per_epoch is not None else ""
    micro = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} process"
    trained = tokens_of_run(plan.data, rows, plan.data.route_names)
    taught = 0 if isinstance(recipe, SftRecipe) else trained
    place = plan.settings.device if plan.settings.device != "cpu" else "this machine's CPU"
    dtype = str(plan.settings.dtype).removeprefix("torch.")
    console.print(
        f"\nsteps     {plan.steps:,} of {mixture.rows_per_step:,} rows ({micro}): {rows:,} rows{epoch}", soft_wrap=True
    )
    console.print(
        f"tokens    {trained:,} through the student (forward, backward), {taught:,} through teachers (forward)"
    )
    needed = memory(recipe, plan.models, args, plan.data, plan.settings)
    show_items(console, f"memory, on {place} in {dtype}, estimated", needed)
    written = disk(recipe, plan.models, args)
    show_items(console, "disk, at most", written)
    folder = next(
        folder for folder in (Path(recipe.output), *Path(recipe.output).absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(folder).free
    if sum(item.bytes for item in written) > free:
        console.print(f"[bold]warning:[/] {folder} has only {in_words(free)} free", soft_wrap=True)


def show_items(console: Console, title: str, items: Sequence[Item]) -> None:
    """An estimate with its parts."""
    table = plain_table(title, in_words(sum(item.bytes for item in items)))
    for item in items:
        table.add_row(item.name, in_words(item.bytes))
    console.print()
    console.print(table)


def in_words(count: float) -> str:
    """Bytes with a unit that leaves two or three digits."""
    power = min(3, int(math.log(count, 1000))) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def plain_table(first: str, *others: str) -> Table:
    """A table without frames: names on the left, numbers on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
