"""What every stage does around its objective: claim, data, roles, training, publishing, proof of the result."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from kd.config.stage_recipe import StageRecipe
from kd.data.batches import Batch
from kd.data.mixing import MixedRows, Mixture, StepBatchSampler, collate
from kd.data.stage_data import (
    StageData,
    held_out_batches,
    padding_id,
    refuse_unfit_rows,
    remarks,
    row_locations,
    sampled_rows,
)
from kd.errors import MachineError, Stopped, UserError
from kd.losses.router import refuse_useless_router_loss
from kd.models.forward import learned_positions
from kd.models.roles import LoadSettings, check_head, check_packing, refuse_unmergeable
from kd.models.teacher_logits import TeacherLogits
from kd.runs.run_folder import RunFolder, Start, State
from kd.stages.caching import filled, plans_of_run, with_cached, with_head_of_backbone, without_own_weights
from kd.stages.stage import Inputs, RecipeT, Stage, StageRoles, fingerprints
from kd.training.callbacks import EarlyStopping, StepBookkeeping, StopOnSignal
from kd.training.evaluating import evaluate_routes
from kd.training.model_card import CardFacts
from kd.training.objective import Objective
from kd.training.progress import doing, training_progress
from kd.training.publishing import publish, summarise, trained
from kd.training.settings import load_settings, planned_steps, processes, rows_per_step, training_arguments
from kd.training.trainer import RoutedTrainer
from kd.training.wrapping import has_plan, refuse_wrapping, shards, wrap, wrapping

logger = logging.getLogger("dae")

# Nats per response token between teacher and untrained student; a uniform guess over 32,000 tokens costs 10.
LARGE_KL = 2.0
HIGH_RATE = 3.0  # times the suggested learning rate: warned about


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the summary in run.json."""

    path: Path
    summary: Mapping[str, Any]


@contextlib.contextmanager
def claimed(run: RunFolder, stage: str, recipe: StageRecipe, inputs: Inputs, data: StageData) -> Iterator[State]:
    """`RunFolder.claim` by the main process; the other ranks learn what it found, also when it was refused."""
    state = processes()
    with contextlib.ExitStack() as stack:
        answer: list[Any] = [None, None]
        if state.is_main_process:
            try:
                start = Start(stage, recipe, fingerprints(inputs), recipe.base, data.inputs, state.num_processes)
                answer = [stack.enter_context(run.claim(start)), None]
            except (UserError, MachineError) as error:
                answer = [None, error]
        if state.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        yield answer[0]


def refuse_other_rows(data: StageData) -> None:
    """Raise UserError, on every process, where the processes hold different rows, as only rows in memory can."""
    if processes().num_processes == 1:
        return
    own = {name: [one.sha256 for one in sources] for name, sources in data.inputs.items()}
    first, *others = gather_object([own])
    if odd := [name for name in first if any(other.get(name) != first[name] for other in others)]:
        raise UserError(
            f"data.{odd[0]}: its rows differ between processes; give every process all rows in the same order (a "
            "shuffle needs a seed)"
        )


def run_stage(stage: Stage[RecipeT], recipe: RecipeT, callbacks: Sequence[TrainerCallback] = ()) -> RunResult:
    """Train, publish, load the result in a fresh process. The same call goes on after a stop.

    callbacks: further ones of the trainer, called after its own.

    Raises UserError (recipe, data or checkpoints), MachineError (disk, memory), Stopped (Ctrl-C, SIGTERM).
    """
    refuse_wrapping(recipe)
    inputs = stage.inputs(recipe)
    fingerprints(inputs)  # torn files are refused before anything else reads them
    recipe = stage.check(recipe, inputs)
    data = stage.load_data(recipe, inputs)
    refuse_other_rows(data)
    run = RunFolder(recipe.output)
    with claimed(run, stage.name, recipe, inputs, data) as state:
        if state == "finished":
            logger.info("%s: already finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        tell_of_rows(data)
        settings = load_settings(recipe)
        torch.set_flush_denormal(True)  # denormals slow a CPU run several times over
        args = training_arguments(recipe, settings)
        resume_from = run.checkpoints.latest() if state == "resume" else None
        with doing("preparing the models"):
            trainer, stop, start = prepare(stage, recipe, inputs, args, settings, data, run, resume_from)
        for callback in callbacks:
            trainer.add_callback(callback)
        if processes().num_processes > 1 or has_plan():
            logger.info("training on %s", wrapping(trainer.accelerator))
        with doing("measuring before the first step"):
            first_kl = start_metrics(trainer, data, run, resume_from, start)
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        finally:
            stop.restore()
        if stop.received is not None:
            raise Stopped(
                stop.received,
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"a checkpoint is in {run.checkpoints.folder}. The same command (in Python, the same call) resumes "
                "from there.",
            )
        summary = summarise(trainer, data, first_kl) | ({"start": dict(start)} if start else {})
        result = trained(trainer, data)
        if processes().is_main_process:
            with doing("writing the result, and loading it in a fresh process"):
                publish(card_facts(stage, recipe, inputs, data, summary), run, trainer, data, settings, result)
        processes().wait_for_everyone()
        return RunResult(run.path, summary)


def card_facts(
    stage: Stage[RecipeT], recipe: RecipeT, inputs: Inputs, data: StageData, summary: Mapping[str, Any]
) -> CardFacts:
    description, served = stage.describe(recipe), stage.served(recipe)
    return CardFacts(stage.name, description, recipe, inputs, served, data.inputs, data.reports, summary)


def tell_of_rows(data: StageData) -> None:
    """Log what a user should know of the rows: dropped, cut, read in a way of their own; what the tokenizer loses."""
    for name, reports in data.reports.items():
        for report in reports:
            for words in remarks(report):
                logger.warning("data.%s: %s: %s", name, report.path, words)
    for words in data.tokenizer_faults:
        logger.warning("%s", words)


def prepare(
    stage: Stage[RecipeT],
    recipe: RecipeT,
    inputs: Inputs,
    args: TrainingArguments,
    settings: LoadSettings,
    data: StageData,
    run: RunFolder,
    resume_from: Path | None,
) -> tuple[RoutedTrainer, StopOnSignal, Mapping[str, Any]]:
    """Roles, checked against the data, and the trainer over the mixture; facts of the student's start.

    A run that goes on takes the facts from its metrics: its weights are those of the checkpoint.
    """
    mixture = Mixture(data.sources, rows_per_step(args), recipe.seed)
    args.max_steps = planned_steps(mixture, args)
    plans = plans_of_run(stage, recipe, inputs, data, mixture, args.max_steps, settings)
    cached = filled(stage, plans, recipe, inputs, data, settings, args)
    set_seed(recipe.seed)  # a new adapter is drawn from it, whatever went before
    loading = replace(settings, device="cpu") if shards() else settings  # each process keeps a part on its device
    roles = with_cached(stage, recipe, inputs, loading, cached, resume_from is None)
    if not shards():  # else no process keeps the backbone's whole output layer
        cached = {name: with_head_of_backbone(teacher, roles.student) for name, teacher in cached.items()}
    objective = stage.objective(recipe, replace(roles, teachers={**roles.teachers, **cached}))
    refuse_useless_router_loss(roles.student.model, recipe.router_aux_loss)
    if recipe.merge:
        refuse_unmergeable(roles.student.model)
    wrap(args, roles.student.model, [role.model for role in roles.live_teachers.values()])
    check_roles(recipe, roles, data)
    collate_rows = collator(recipe, data)
    if resume_from is None:
        start = stage.start(recipe, roles, measurement(recipe, roles, objective, data, args))
        advise_rate(start, args.max_steps, args.learning_rate)
    else:
        start = first_metrics(run).get("start", {})
    roles = without_own_weights(roles, cached)  # the start was their last use
    lengths = [rows.lengths for rows in data.rows]
    routes = [data.route_names.index(source.route) for source in data.sources]
    stop = StopOnSignal()
    epochs_per_step = None if mixture.rows_per_epoch is None else mixture.rows_per_step / mixture.rows_per_epoch
    callbacks = [StepBookkeeping(epochs_per_step), stop, training_progress()]
    if recipe.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(recipe.early_stopping_patience))
    trainer = RoutedTrainer(
        model=roles.student.model,
        args=args,
        objective=replace(objective, router_aux_weight=recipe.router_aux_loss),
        train_rows=MixedRows(list(data.rows), routes),
        batch_sampler=StepBatchSampler(mixture, args.max_steps, lengths, args.per_device_train_batch_size),
        collate=collate_rows,
        run=run,
        locate=partial(row_locations, recipe.data, data),
        eval_batches=held_out_batches(data, collate_rows, args.per_device_eval_batch_size),
        callbacks=callbacks,
    )
    for callback in stage.callbacks(recipe, data, roles, trainer):
        trainer.add_callback(callback)
    return trainer, stop, start


def check_roles(recipe: StageRecipe, roles: StageRoles, data: StageData) -> None:
    """Raise UserError where a model cannot read the rows, or is not read as it is: its output layer, packed rows."""
    for role in roles.all:
        refuse_unfit_rows(recipe, data, roles.vocabulary_rows, learned_positions(role.model))
        check_head(role, roles.vocabulary_rows)
        if recipe.data.packing:
            check_packing(role, roles.vocabulary_rows)


def advise_rate(start: Mapping[str, Any], steps: int, learning_rate: float) -> None:
    """Log a learning rate for a student that starts away from its base; warn where the recipe's is far above.

    A run at the suggested rate moves what trains about as far as its start is from the base, by the estimate that N
    steps of Adam at rate r move a weight by r sqrt(N / 2). An estimate, fitted to the runs in docs/start.md.
    """
    if not start.get("distance"):
        return
    suggested = start["distance"] / math.sqrt(steps / 2)
    if learning_rate > HIGH_RATE * suggested:
        logger.warning(
            "start: train.learning_rate %g is over %g times the %.1g suggested for this start and %d steps; training "
            "may undo the start",
            learning_rate,
            HIGH_RATE,
            suggested,
            steps,
        )
    else:
        logger.info("start: suggested learning rate for this start and %d steps: about %.1g", steps, suggested)


def collator(recipe: StageRecipe, data: StageData) -> Callable[[list[Any]], dict[str, Tensor]]:
    return partial(collate, pad_token_id=padding_id(data.tokenizer), packing=recipe.data.packing)


def measurement(
    recipe: StageRecipe, roles: StageRoles, objective: Objective, data: StageData, args: TrainingArguments
) -> Callable[[], dict[str, float]]:
    """A function that gives the loss and KL of the student as it is, by route, on a fixed sample of training rows.

    The teachers are asked once: their answers do not depend on the student. All processes get the values of the first
    one, as all must come to the same decision.
    """
    sample = sample_batches(data, collator(recipe, data), args.per_device_train_batch_size)
    factors = sample_factors(data)
    answers: list[Mapping[int, TeacherLogits]] = []

    def measure() -> dict[str, float]:
        values = [evaluate_routes(roles.student.model, sample, objective, args.device, answers, factors)]
        if processes().num_processes > 1:
            broadcast_object_list(values)
        return values[0]

    return measure


def sample_batches(
    data: StageData, collate_rows: Callable[[list[Any]], dict[str, Tensor]], size: int
) -> dict[str, list[Batch]]:
    """Sampled training rows of each source in batches of `size`."""
    batches: dict[str, list[Batch]] = {}
    for index, (rows, source) in enumerate(zip(data.rows, data.sources, strict=True)):
        mixed = MixedRows([rows], [data.route_names.index(source.route)])
        picked = [mixed[(0, row)] for row in sampled_rows(rows)]
        batches[str(index)] = [collate_rows(picked[i : i + size]) for i in range(0, len(picked), size)]
    return batches


def sample_factors(data: StageData) -> dict[str, float]:
    """How much the sampled rows of each source stand for: its share of all rows for each, 1 for the least of a route.

    With these factors, means over the tokens of a route are those of the rows that training sees.
    """
    each = [source.share / len(sampled_rows(rows)) for rows, source in zip(data.rows, data.sources, strict=True)]
    least = {
        route: min(one for one, source in zip(each, data.sources, strict=True) if source.route == route)
        for route in data.route_names
    }
    return {str(i): each[i] / least[source.route] for i, source in enumerate(data.sources)}


def start_metrics(
    trainer: RoutedTrainer, data: StageData, run: RunFolder, resume_from: Path | None, start: Mapping[str, Any]
) -> dict[str, float]:
    """KL(teacher || student) on training rows before the first step; metrics.jsonl is cut to where the run goes on.

    The first line of metrics.jsonl has these, and the facts of the student's start.

    A teacher far from the student is a hard one to follow: a large value is warned about. A run that goes on finds the
    values in its metrics.
    """
    step = int(resume_from.name.split("-")[1]) if resume_from is not None else -1
    if processes().is_main_process:
        run.cut_metrics(step)
    if trainer.objective.routes[0].teacher is None:
        return {}
    if resume_from is not None:
        first = first_metrics(run)
        return {key.removeprefix("initial_"): value for key, value in first.items() if key.startswith("initial_")}
    batches = sample_batches(data, trainer.collate, trainer.args.per_device_train_batch_size)
    measured = evaluate_routes(
        trainer.accelerator.unwrap_model(trainer.model),
        batches,
        trainer.objective,
        trainer.args.device,
        factors=sample_factors(data),
    )
    first_kl = {key: value for key, value in measured.items() if key.endswith("_kl")}
    for key, value in first_kl.items():
        route = key.removesuffix("_kl")
        if not math.isfinite(value):
            raise UserError(f"route {route}: the teacher's distribution is not finite; save its checkpoint again.")
        if value > LARGE_KL:
            logger.warning(
                "route %s: KL(teacher || student) is %.2f nats per token before the first step (over %.0f is far): "
                "the student may not reach this teacher. A student or expert nearer to the other helps.",
                route,
                value,
                LARGE_KL,
            )
    if processes().is_main_process:
        measured = {f"initial_{key}": value for key, value in first_kl.items()}
        run.append_metrics({"step": 0, **measured, **({"start": dict(start)} if start else {})})
    return first_kl


def first_metrics(run: RunFolder) -> Mapping[str, Any]:
    """The line of metrics.jsonl from before the first step; empty without one."""
    return next((line for line in run.metrics() if line["step"] == 0), {})
