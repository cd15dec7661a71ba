"""What every training stage does around its objective: data, roles, training, publishing, proof that the result loads.

A stage (sft, align) hands over its recipe, its rows and a function that builds its roles; `run_stage` does the rest.
"""

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
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from kd.config import StageRecipe, resolved_yaml
from kd.errors import MachineError, Stopped, UserError
from kd.merged import merged
from kd.mixing import MixedRows, Mixture, StepBatchSampler, collate
from kd.model_card import CardFacts, write_model_card
from kd.objective import Batch, Objective
from kd.progress import TrainingProgress, doing
from kd.roles import (
    STUDENT_ADAPTER,
    LoadSettings,
    Role,
    check_head,
    check_packing,
    final_hidden_states,
    head_of,
    learned_positions,
    refuse_unmergeable,
)
from kd.router import refuse_useless_router_loss
from kd.runs import RunFolder, State
from kd.stage_data import StageData, held_out_batches, padding_id, refuse_unfit_rows, remarks
from kd.trainer import (
    EarlyStopping,
    RoutedTrainer,
    StepBookkeeping,
    StopOnSignal,
    evaluate_routes,
    peak_memory_bytes,
    save_student,
)
from kd.verify import verify_saved

logger = logging.getLogger("dae")

# Nats per response token between teacher and untrained student; a uniform guess over 32,000 tokens costs 10.
LARGE_KL = 2.0
INITIAL_KL_ROWS = 64


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and what run.json says of it."""

    path: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class StageRoles:
    """The models of a stage: the student (trainable), the objective with its teachers, every role once for checking."""

    student: nn.Module
    objective: Objective
    roles: tuple[Role, ...]
    vocabulary_rows: int


# Callbacks of the caller's own, made once roles and trainer are there.
MakeCallbacks = Callable[[StageRoles, RoutedTrainer], Sequence[TrainerCallback]]


def processes() -> PartialState:
    """This process among those that a launcher (torchrun, accelerate) started; alone without one."""
    return PartialState(cpu=not torch.cuda.is_available())


def load_settings(recipe: StageRecipe) -> LoadSettings:
    """dtype and device: `auto` is bfloat16 on an accelerator that has it, else float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.dtype == "auto":
        dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    else:
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    if device == "cuda":
        device = f"cuda:{processes().local_process_index}"
    return LoadSettings(dtype, recipe.attn_implementation, recipe.trust_remote_code, device)


def student_dtype(recipe: StageRecipe) -> torch.dtype:
    """Of a student whose weights all train: float32 (under bf16 autocast on an accelerator) unless told bfloat16."""
    return torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32


def training_arguments(recipe: StageRecipe, settings: LoadSettings) -> TrainingArguments:
    """The recipe's `train` over our defaults; what the toolkit owns is set last (and refused in a recipe).

    Raises UserError where this machine cannot do what they ask.
    """
    on_cpu = settings.device == "cpu"
    defaults: dict[str, Any] = {
        "learning_rate": 2e-4 if recipe.lora is not None else 2e-5,
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 8,
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "bf16": not on_cpu and recipe.lora is None and settings.dtype == torch.bfloat16,
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,  # every trainable weight has its part in every row
        "optim": "adamw_torch",
    }
    chosen = {**defaults, **recipe.train}
    if recipe.data.eval:
        chosen = {
            "eval_strategy": "steps",
            "eval_steps": chosen["save_steps"],
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            **chosen,
        }
    # Reentrant checkpointing gives wrong gradients with adapters. Both are names of the same argument.
    how = [chosen.pop(f"{name}_checkpointing_kwargs", None) or {} for name in ("gradient", "activation")]
    owned: dict[str, Any] = {
        "activation_checkpointing_kwargs": {**how[0], **how[1], "use_reentrant": False},
        "output_dir": recipe.output,
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has been waiting
    }
    try:
        return TrainingArguments(**chosen, **owned)
    except ValueError as error:  # what only this machine can tell, such as bf16 on a CPU
        raise UserError(f"train: {str(error).splitlines()[0]}") from error


def planned_steps(mixture: Mixture, args: TrainingArguments) -> int:
    """Optimizer steps of the run: `train.max_steps`, or what `train.num_train_epochs` makes of the mixture."""
    return args.max_steps if args.max_steps > 0 else mixture.steps(args.num_train_epochs)


def rows_per_step(args: TrainingArguments) -> int:
    """Rows of one optimizer step, over all micro-batches and ranks."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


@contextlib.contextmanager
def claimed(
    run: RunFolder, stage: str, recipe: StageRecipe, inputs: Mapping[str, str], data: StageData
) -> Iterator[State]:
    """`RunFolder.claim` by the main process; the other ranks learn what it found, also when it was refused."""
    state = processes()
    with contextlib.ExitStack() as stack:
        answer: list[Any] = [None, None]
        if state.is_main_process:
            try:
                claim = run.claim(
                    stage,
                    resolved_yaml(recipe),
                    inputs,
                    base=recipe.base,
                    data=data.inputs,
                    processes=state.num_processes,
                )
                answer = [stack.enter_context(claim), None]
            except (UserError, MachineError) as error:
                answer = [None, error]
        if state.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        yield answer[0]


def run_stage(
    stage: str,
    recipe: StageRecipe,
    inputs: Mapping[str, str],
    data: StageData,
    build_roles: Callable[[LoadSettings], StageRoles],
    make_callbacks: MakeCallbacks | None = None,
) -> RunResult:
    """Train, publish, prove. Going on after a stop is the same call (design: "Going on after a stop").

    inputs: fingerprint of every model by role (`base` among them). Raises UserError, MachineError, Stopped.
    """
    run = RunFolder(recipe.output)
    with claimed(run, stage, recipe, inputs, data) as state:
        if state == "finished":
            logger.info("%s: this run is finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        tell_of_rows(data)
        settings = load_settings(recipe)
        set_seed(recipe.seed)
        torch.set_flush_denormal(True)  # denormals slow a CPU run several times over
        args = training_arguments(recipe, settings)
        with doing("loading the models"):
            trainer, stop = prepare(recipe, args, settings, data, build_roles, run, make_callbacks)
        resume_from = run.latest_checkpoint() if state == "resume" else None
        with doing("measuring before the first step"):
            first_kl = start_metrics(trainer, data, run, resume_from)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        if stop.received is not None:
            raise Stopped(
                stop.received,
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
                f"a checkpoint is in {run.checkpoints_dir}. The same command goes on from there.",
            )
        summary = summarise(trainer, data, first_kl)
        if processes().is_main_process:
            with doing("writing the result, and loading it in a fresh process"):
                publish(stage, recipe, run, trainer, data, settings, inputs, summary)
        processes().wait_for_everyone()
        return RunResult(run.path, summary)


def tell_of_rows(data: StageData) -> None:
    """Log what a user should know of the rows: dropped, cut, read in a way of their own; what the tokenizer loses."""
    for name, reports in data.reports.items():
        for report in reports:
            for words in remarks(report):
                logger.warning("data.%s: %s: %s", name, report.path, words)
    for words in data.tokenizer_faults:
        logger.warning("%s", words)


def prepare(
    recipe: StageRecipe,
    args: TrainingArguments,
    settings: LoadSettings,
    data: StageData,
    build_roles: Callable[[LoadSettings], StageRoles],
    run: RunFolder,
    make_callbacks: MakeCallbacks | None = None,
) -> tuple[RoutedTrainer, StopOnSignal]:
    """Roles, checked against the data, and the trainer over the mixture."""
    mixture = Mixture(data.sources, rows_per_step(args), recipe.seed)
    args.max_steps = planned_steps(mixture, args)
    roles = build_roles(settings)
    refuse_useless_router_loss(roles.student, recipe.router_aux_loss)
    for role in roles.roles:
        refuse_unfit_rows(recipe, data, roles.vocabulary_rows, learned_positions(role.model))
        check_head(role, roles.vocabulary_rows)
        if recipe.data.packing:
            check_packing(role, roles.vocabulary_rows)
    if recipe.merge:
        refuse_unmergeable(roles.student)
    collate_rows = partial(collate, pad_token_id=padding_id(data.tokenizer), packing=recipe.data.packing)
    lengths = [rows.lengths for rows in data.rows]
    routes = [data.route_names.index(source.route) for source in data.sources]
    stop = StopOnSignal()
    epochs_per_step = None if mixture.rows_per_epoch is None else mixture.rows_per_step / mixture.rows_per_epoch
    callbacks = [StepBookkeeping(epochs_per_step), stop, TrainingProgress()]
    if recipe.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(recipe.early_stopping_patience))
    trainer = RoutedTrainer(
        model=roles.student,
        args=args,
        objective=replace(roles.objective, router_aux_weight=recipe.router_aux_loss),
        train_rows=MixedRows(list(data.rows), routes),
        batch_sampler=StepBatchSampler(mixture, args.max_steps, lengths, args.per_device_train_batch_size),
        collate=collate_rows,
        run=run,
        eval_batches=held_out_batches(data, collate_rows, args.per_device_eval_batch_size),
        callbacks=callbacks,
    )
    for callback in make_callbacks(roles, trainer) if make_callbacks is not None else ():
        trainer.add_callback(callback)
    return trainer, stop


def start_metrics(
    trainer: RoutedTrainer, data: StageData, run: RunFolder, resume_from: Path | None
) -> dict[str, float]:
    """KL(teacher || student) on training rows before the first step; metrics.jsonl is cut to where the run goes on.

    A teacher far from the student is a hard one to follow: a large value is warned about. A run that goes on finds the
    values in its metrics.
    """
    step = int(resume_from.name.split("-")[1]) if resume_from is not None else -1
    if processes().is_main_process:
        run.cut_metrics(step)
    if trainer.objective.routes[0].teacher is None:
        return {}
    if resume_from is not None:
        start = next((line for line in run.metrics() if line["step"] == 0), {})
        return {key.removeprefix("initial_"): value for key, value in start.items() if key.startswith("initial_")}
    batches: dict[str, list[Batch]] = {}
    for index, (rows, source) in enumerate(zip(data.rows, data.sources, strict=True)):
        mixed = MixedRows([rows], [data.route_names.index(source.route)])
        spread = range(0, len(rows), -(-len(rows) // INITIAL_KL_ROWS))  # over the whole file, which may be sorted
        picked = [mixed[(0, row)] for row in spread]
        size = trainer.args.per_device_train_batch_size
        batches[str(index)] = [trainer.collate(picked[i : i + size]) for i in range(0, len(picked), size)]
    measured = evaluate_routes(
        trainer.accelerator.unwrap_model(trainer.model), batches, trainer.objective, trainer.args.device
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
        run.append_metrics({"step": 0, **{f"initial_{key}": value for key, value in first_kl.items()}})
    return first_kl


def summarise(trainer: RoutedTrainer, data: StageData, first_kl: Mapping[str, float]) -> dict[str, Any]:
    """What run.json and the model card say of the run."""
    # A route with few rows may be missing from the last step that was logged: its newest values are older ones.
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            last |= {key: value for key, value in entry.items() if "/" in key or key == "loss"}
    evaluation = final_evaluation(trainer)
    return {
        "steps": trainer.state.global_step,
        "initial_kl": {key.removesuffix("_kl"): value for key, value in first_kl.items()},
        "last": last,
        "held_out": {key: value for key, value in evaluation.items() if key.startswith("eval_")},
        "best_step": trainer.state.best_global_step,
        "rows": data.counts(lambda report: report.kept),
        "dropped": data.counts(lambda report: sum(report.dropped.values())),
        "truncated": data.counts(lambda report: report.truncated),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def final_evaluation(trainer: RoutedTrainer) -> Mapping[str, Any]:
    """The evaluation of the step whose weights the run ends with: best, else last; empty without `data.eval`."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return (best or evaluations or [{}])[-1]


def publish(
    stage: str,
    recipe: StageRecipe,
    run: RunFolder,
    trainer: RoutedTrainer,
    data: StageData,
    settings: LoadSettings,
    inputs: Mapping[str, str],
    summary: Mapping[str, Any],
) -> None:
    """Write the result, load it in a fresh process and compare, then call the run finished."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.eval()
    ids = torch.tensor([data.rows[0][0].input_ids[:32]])
    with torch.no_grad():
        hidden = final_hidden_states(student, {"input_ids": ids.to(trainer.args.device)})
        expected = head_of(student).logits(hidden[0]).cpu()
    facts = CardFacts(
        stage=stage, recipe=recipe, inputs=inputs, data=data.inputs, reports=data.reports, summary=summary
    )

    def write_files(folder: Path) -> None:
        save_student(student, folder)
        data.tokenizer.save_pretrained(str(folder))
        write_model_card(folder, facts)

    run.publish(write_files)
    verify_saved(run.path, ids[0].tolist(), expected, settings)
    if recipe.merge and isinstance(student, PeftModel):
        whole = merged(student, STUDENT_ADAPTER, recipe.output)

        def write_merged(folder: Path) -> None:
            whole.save_pretrained(str(folder / "merged"))
            data.tokenizer.save_pretrained(str(folder / "merged"))

        run.publish(write_merged)
        verify_saved(run.path / "merged", ids[0].tolist(), expected, settings)
    run.mark_finished(summary)
