"""`dae check`: shows what a run would do."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dae.checking.estimates import Item, disk, memory, moved_layers, tokens_of_run
from dae.checking.loss_shares import LossShare, loss_shares
from dae.checking.overlap import overlaps
from dae.checking.plan import Plan, make_plan
from dae.checking.processes import Scaling
from dae.checking.scaling import communication, scaled_memory
from dae.checking.starting import measured_start
from kd.cache.keys import bytes_per_token
from kd.cache.plans import refuse_small_disk
from kd.config.data_recipe import DataRecipe
from kd.config.problems import visible
from kd.config.stage_recipe import StageRecipe
from kd.data.examples import SourceReport, marked_text
from kd.data.mixing import Mixture
from kd.data.stage_data import StageData, unread_keys
from kd.data.token_rows import TokenRows
from kd.models.line import described
from kd.runs.provenance import HELD_OUT
from kd.stages.stage import AnyStage
from kd.training.wrapping import refuse_unshardable

SMALL_SHARE = 0.05  # of the loss: a route with less is hardly learnt
MANY_STEPS = 0.1  # of the run: a route missing from more steps gets noticeably less of the loss than its weight
ROWS_SHOWN = 2  # per route
CHARACTERS_SHOWN = 240  # per segment of a row


def check(
    stage: AnyStage,
    recipe: StageRecipe,
    console: Console | None = None,
    *,
    load_weights: bool = False,
    scaling: Scaling | None = None,
) -> None:
    """Print what the run would do. Raises UserError with everything that would stop it.

    load_weights: also where the student would start. scaling: also what it would take on these processes.
    """
    if scaling is not None and scaling.plan == "fsdp2":
        refuse_unshardable(recipe, "FSDP2")
    plan = make_plan(stage, recipe)
    console = console or Console(highlight=False)
    show_routes(console, plan)
    show_rows(console, plan)
    show_eval_sets(console, plan.recipe.data, plan.data)
    show_effort(console, plan)
    if scaling is not None:
        show_scaling(console, plan, scaling)
    show_cache(console, plan)
    if load_weights:
        show_start(console, stage, plan)


def show_routes(console: Console, plan: Plan) -> None:
    """Rows, tokens and shares of each route; then truncated and dropped rows; then warnings."""
    data = plan.data
    table = plain_table("route", "rows", "tokens", "response", "% rows", "% loss", "trunc.", "dropped", "epochs")
    shares = loss_shares(plan.objective, data, plan.mixture, plan.steps)
    for name in data.route_names:
        reports = data.reports[name]
        share = sum(source.share for source in data.sources if source.route == name)
        epochs = share * plan.steps * plan.mixture.rows_per_step / sum(report.kept for report in reports)
        kept, tokens, response, cut, dropped = row_counts(reports)
        part = f"{100 * shares[name].mean:.1f}"
        table.add_row(name, kept, tokens, response, f"{100 * share:.1f}", part, cut, dropped, f"{epochs:.2g}")
    console.print(table)
    console.print("response: response tokens; % loss: mean over steps; trunc.: to data.max_length")
    for report in (report for name in data.route_names for report in data.reports[name]):
        show_report(console, report)
    for words in data.tokenizer_faults:
        console.print(Text.assemble(("warning: ", "bold"), visible(words)), soft_wrap=True)
    for name, loss_share in shares.items():
        for words in share_warnings(name, loss_share, plan.objective.pooled, plan.mixture):
            console.print(f"[bold]warning:[/] {words}", soft_wrap=True)


def row_counts(reports: Sequence[SourceReport]) -> tuple[str, str, str, str, str]:
    """Rows kept, their tokens and response tokens, rows truncated and rows dropped, over several sources."""
    kept, tokens, response, cut = (
        f"{sum(getattr(report, name) for report in reports):,}"
        for name in ("kept", "tokens", "response_tokens", "truncated")
    )
    return kept, tokens, response, cut, f"{sum(sum(report.dropped.values()) for report in reports):,}"


def share_warnings(route: str, share: LossShare, pooled: bool, mixture: Mixture) -> Iterator[str]:
    """Warnings for a route with little of the loss, or none of it in many steps."""
    if share.mean < SMALL_SHARE:
        remedy = "set weights=routes or increase" if pooled else "increase"
        yield (
            f"route {route} has {100 * share.mean:.2g} % of the loss, so it will hardly be learnt; {remedy} its share "
            "of rows"
        )
    if share.absent > MANY_STEPS and not pooled:
        rows = math.ceil(1 / sum(source.share for source in mixture.sources if source.route == route))
        yield (
            f"route {route} has no row in {100 * share.absent:.0f} % of the steps; the other routes have all of their "
            f"loss. Use steps of at least {rows} rows (train.gradient_accumulation_steps), or weights=tokens."
        )


def show_rows(console: Console, plan: Plan) -> None:
    for name in plan.data.route_names:
        rows = next(
            part for source, part in zip(plan.data.sources, plan.data.rows, strict=True) if source.route == name
        )
        marks = "underlined" if console.is_terminal else "in [[ ]]"
        console.print(f"\nroute {name}, response tokens {marks}:", markup=False)
        for place in range(min(ROWS_SHOWN, len(rows))):
            console.print(marked_row(rows, place, plan, console.is_terminal), soft_wrap=True)


def marked_row(rows: TokenRows, place: int, plan: Plan, styled: bool) -> Text:
    """One row with its response tokens marked; long segments are shortened in the middle."""
    shown = Text("  ")
    for text, is_response in marked_text(rows[place], plan.data.tokenizer):
        cut = visible(shortened(text)).replace("\n", "\n  ")
        if not is_response:
            shown.append(cut)
        elif styled:
            shown.append(cut, style="bold underline")
        else:
            shown.append(f"[[{cut}]]")
    return shown


def shortened(text: str) -> str:
    half = CHARACTERS_SHOWN // 2
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[:half]} ... {text[-half:]}"


def show_report(console: Console, report: SourceReport) -> None:
    """The format of a source's rows, dropped rows and why, notes, and unread keys."""
    formats = ", ".join(f"{name} ({count:,})" for name, count in report.formats.items())
    console.print(f"{report.path}: format: {formats}", soft_wrap=True, markup=False)
    for words in [
        *(f"{count} {'row' if count == 1 else 'rows'} dropped: {reason}" for reason, count in report.dropped.items()),
        *report.notes,
    ]:
        console.print(visible(f"{report.path}: {words}"), soft_wrap=True, markup=False)
    if words := unread_keys(report):
        console.print(Text.assemble(("warning: ", "bold"), visible(f"{report.path}: {words}")), soft_wrap=True)


def show_eval_sets(console: Console, data_recipe: DataRecipe, data: StageData) -> None:
    """Eval sets, and how many of their rows also occur in training."""
    if not data_recipe.eval:
        console.print("\nno eval set (data.eval): the result is the last checkpoint, not the best")
        return
    table = plain_table("eval set", "rows", "tokens", "response", "trunc.", "dropped", "in training", "same prompt")
    for name, overlap in overlaps(data_recipe, data.reports).items():
        reports = data.reports[f"{HELD_OUT}{name}"]
        table.add_row(name, *row_counts(reports), f"{overlap.same_row:,}", f"{overlap.same_prompt:,}")
    console.print()
    console.print(table)
    for name in data_recipe.eval:
        for report in data.reports[f"{HELD_OUT}{name}"]:
            show_report(console, report)


def show_effort(console: Console, plan: Plan) -> None:
    args, mixture = plan.args, plan.mixture
    rows = plan.steps * mixture.rows_per_step
    epoch = f", {mixture.rows_per_epoch:,} per epoch" if mixture.rows_per_epoch is not None else ""
    micro = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} process"
    trained = tokens_of_run(plan.data, rows, plan.data.route_names)
    taught = trained if plan.roles.teachers else 0
    served = 0
    if plan.cache:
        missing = {role: one.missing_input_tokens for role, one in plan.cache.items()}
        served = sum(tokens for role, tokens in missing.items() if plan.cache[role].key.is_served)
        taught = sum(missing.values()) - served
    place = plan.settings.device if plan.settings.device != "cpu" else "the CPU"
    dtype = str(plan.settings.dtype).removeprefix("torch.")
    console.print(
        f"\nsteps     {plan.steps:,} of {mixture.rows_per_step:,} rows ({micro}): {rows:,} rows{epoch}", soft_wrap=True
    )
    console.print(
        f"tokens    {trained:,} through the student (forward, backward), {taught:,} through teachers (forward)"
        + (f", {served:,} through teachers on servers" if served else "")
    )
    needed = memory(plan)
    quantised = f" and {plan.recipe.quantization}" if plan.recipe.quantization else ""
    show_items(console, f"memory on {place} in {dtype}{quantised}, estimated", needed)
    if moved := moved_layers(plan):
        show_items(console, f"moved from {plan.settings.offload_teachers} in each pass of a teacher", moved)
    written = disk(plan)
    show_items(console, "disk, at most", written)
    folder = next(
        folder for folder in (Path(plan.recipe.output), *Path(plan.recipe.output).absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(folder).free
    if sum(item.bytes for item in written) > free:
        console.print(f"[bold]warning:[/] {folder} has only {in_words(free)} free", soft_wrap=True)


def show_scaling(console: Console, plan: Plan, scaling: Scaling) -> None:
    """Memory of one process alone and of each of several, and what each sends in an optimizer step."""
    alone, scaled = memory(plan), scaled_memory(plan, scaling)
    table = plain_table(f"memory of a process, {scaling.name}", "1 process", f"each of {scaling.processes}")
    table.add_row("together", *(in_words(sum(item.bytes for item in items)) for items in (alone, scaled)))
    for index, item in enumerate(scaled):
        table.add_row(item.name, in_words(alone[index].bytes) if index < len(alone) else "", in_words(item.bytes))
    console.print()
    console.print(table)
    show_items(console, "sent by each process in a step", communication(plan, scaling))
    args = plan.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    console.print(
        f"A step of {scaling.processes} processes has {args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} x {scaling.processes} = {rows * scaling.processes:,} rows (rows of a "
        "process x train.gradient_accumulation_steps x processes); steps and rows above are those of "
        f"{args.world_size} process.",
        soft_wrap=True,
    )


def show_cache(console: Console, plan: Plan) -> None:
    """The rows that teachers answer once, and what that takes on disk. Raises MachineError where the disk is small."""
    if not plan.cache:
        return
    table = plain_table("teacher cache", "rows", "to answer", "response", "B/token", "to write")
    for role, one in plan.cache.items():
        each, size = bytes_per_token(one.head_shape, one.key), in_words(one.missing_bytes)
        missing = f"{len(one.missing):,}"
        table.add_row(role, f"{one.rows:,}", missing, f"{one.missing_tokens:,}", f"{each:,}", size)
    console.print()
    console.print(table)
    folders = ", ".join(dict.fromkeys(str(one.store.folder) for one in plan.cache.values()))
    console.print(f"in {folders}", soft_wrap=True)
    refuse_small_disk(plan.cache.values())


def show_start(console: Console, stage: AnyStage, plan: Plan) -> None:
    """KL to each route's teacher before the first step; with `start: auto` at every point that was tried."""
    chosen, tried = measured_start(stage, plan)
    if not chosen.kl:
        console.print("\nstart     the base; there is no teacher to measure the distance to")
        return
    others = [point for point in tried if point.weights != chosen.weights]
    table = plain_table("start", *(f"{route} KL" for route in chosen.kl))
    for point in sorted([*others, chosen], key=lambda point: list(point.weights.values())):
        mark = ", chosen" if tried and point is chosen else ""
        table.add_row(f"{described(point.weights)}{mark}", *(f"{value:.4f}" for value in point.kl.values()))
    console.print()
    console.print(table)
    console.print("KL(teacher || student) before the first step, nats per response token of a sample of training rows")


def show_items(console: Console, title: str, items: Sequence[Item]) -> None:
    table = plain_table(title, in_words(sum(item.bytes for item in items)))
    for item in items:
        table.add_row(item.name, in_words(item.bytes))
    console.print()
    console.print(table)


def in_words(count: float) -> str:
    power = min(4, int(math.log(count, 1000))) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def plain_table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
