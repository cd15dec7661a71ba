"""Evaluate models on the tasks of a suite, for `dae eval tasks` and `dae report`.

All checks run before weights are loaded (dae_eval.planning). Each finished task is written at once under a digest of
all that its scores depend on. So the same command resumes a run, and two models or settings never share a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dae_eval.answers import cluster_id, documents_of
from dae_eval.benchmarks import Member
from dae_eval.folders import (
    DOCUMENTS,
    evaluation_folder,
    pack_documents,
    read_documents,
    refuse_other_model,
    write_evaluation,
)
from dae_eval.harness import Harness, run_task, version_of
from dae_eval.held_out import measured, teachers_of
from dae_eval.models import Memory, Model, load_settings
from dae_eval.planning import Plan, Planner
from dae_eval.progress import Display
from dae_eval.results import Document, Evaluation, HeldOutLoss, TaskResult
from dae_eval.suites import Suite
from dae_eval.units import as_text, in_unit
from kd.errors import MachineError
from kd.models.checkpoint import Checkpoint
from kd.runs.files import disk_errors, json_text, plain, read_json, write_bytes_durably, write_text_durably
from kd.runs.provenance import read_provenance
from kd.runs.run_folder import RunFolder

_NO_MEMORY = ("out of memory", "allocate memory")


def evaluate(
    models: Mapping[str, Model],
    suite: Suite,
    folders: Mapping[str, Path],
    command: Sequence[str] | None = None,
    announce: Callable[[Plan], None] = lambda _plan: None,
) -> dict[str, Evaluation]:
    """Evaluate every model and write each evaluation into its folder; roles with equal weights are evaluated once.

    Args:
        models: by role (base, expert, reference, student, or any name), from `dae_eval.models.locate`.
        suite: from `dae_eval.suites.load_suite`.
        folders: by role; roles with equal weights use the folder of the first one.
        command: as typed, for the conditions; None: that of this process.
        announce: called with the plan of the first model, when the folders are held and no model is loaded.

    Returns:
        The evaluation of every role.

    Raises:
        UserError: a task, setting or model is invalid, or a folder has other files.
        MachineError: disk full or out of memory; finished tasks are kept.
    """
    torch.set_flush_denormal(True)  # denormal numbers slow some CPUs several times over
    distinct: dict[Any, str] = {}
    for role, model in models.items():
        distinct.setdefault(model.identity, role)
    for role in distinct.values():
        evaluation_folder(folders[role]).refuse_foreign_files()
        refuse_other_model(folders[role], models[role].facts())
    planner = Planner(suite, load_settings(), command)
    plans = [planner.plan(role, models[role], folders[role]) for role in distinct.values()]
    first = plans[0]
    backbones = [plan.model.backbone.fingerprint for plan in plans]  # one after the other: only one is in memory
    plans = sorted(plans, key=lambda plan: backbones.index(plan.model.backbone.fingerprint))
    memory = Memory(planner.load_settings)
    with ExitStack() as held:
        for plan in plans:
            held.enter_context(claimed(plan.folder, plan.model))
        announce(first)
        with Display(sum(len(plan.asked) + bool(plan.held_out) for plan in plans)) as display:
            found = {plan.model.identity: run(plan, suite, models, memory, display) for plan in plans}
        memory.free()
    return {role: found[model.identity] for role, model in models.items()}


@contextmanager
def claimed(folder: Path, model: Model) -> Iterator[None]:
    """Hold an evaluation's folder for this process. Raises UserError if another process holds or has filled it."""
    with evaluation_folder(folder).held(lambda: refuse_other_model(folder, model.facts())):
        with disk_errors(folder):
            (folder / DOCUMENTS).mkdir(exist_ok=True)
        yield


def run(plan: Plan, suite: Suite, models: Mapping[str, Model], memory: Memory, display: Display) -> Evaluation:
    """Run the tasks that are not finished, then write the evaluation. models: by role, including teachers."""
    waiting = [task for task in plan.asked if not plan.path(task).is_file()]
    for _ in range(len(plan.asked) - len(waiting)):
        display.finished()
    if waiting:
        with memory.activated(plan.model) as model:
            harness = Harness(
                model,
                plan.tokenizer,
                batch_size=suite.batch_size,
                max_length=suite.max_length,
                progress=display.update,
                name=plan.model.path,
            )
            for task in waiting:
                display.begin(plan.role, task)
                found = result(plan.members[task], plan, answer(plan, task, harness))
                score = f"{as_text(in_unit(found), found.unit)} {found.unit}"
                display.finished(f"{plan.role}  {task}  {len(found.documents)} documents  {score}")
    losses: tuple[HeldOutLoss, ...] = ()
    if plan.held_out:
        display.begin(plan.role, "eval set")
        with enough_memory("held_out", 1):
            teachers = teachers_of(plan.model, models)
            losses = measured(plan.model, plan.held_out, teachers, plan.shared, plan.folder, memory)
        display.finished()
    evaluation = replace(finished_evaluation(plan), held_out=losses)
    write_evaluation(plan.folder, evaluation, plan.keys)
    return evaluation


def answer(plan: Plan, task: str, harness: Harness) -> tuple[Document, ...]:
    """Run one task and write its documents."""
    asked = plan.asked[task]
    harness.truncated = 0
    with enough_memory(task, harness.batch_size):
        samples = run_task(harness, asked.task, asked.entry.limit, plan.template is not None)
    documents = documents_of(asked, samples, plan.seen[task])
    notes = {"truncated": harness.truncated, "key": plan.facts[task]}
    write_text_durably(plan.notes_path(task), json_text(plain(notes)))
    write_bytes_durably(plan.path(task), pack_documents(documents))
    return documents


def finished_evaluation(plan: Plan) -> Evaluation:
    """The evaluation of a plan whose tasks are all finished."""
    tasks, truncated = {}, {}
    for task, member in plan.members.items():
        clusters = {question.id: cluster_id(question) for question in plan.asked[task].questions}
        documents = tuple(
            replace(document, cluster=clusters[document.id], seen=document.id in plan.seen[task])
            for document in read_documents(plan.path(task))
        )
        tasks[task] = result(member, plan, documents)
        truncated[task] = int(read_json(plan.notes_path(task))["truncated"])
    conditions = {**plan.conditions, "truncated": {task: n for task, n in truncated.items() if n}}
    return Evaluation(
        model=plan.model.facts(),
        tasks=tasks,
        conditions=conditions,
        training_rows=plan.rows,
        training=training_metrics(plan.model.source),
    )


def result(member: Member, plan: Plan, documents: tuple[Document, ...]) -> TaskResult:
    """The result of one task of a plan."""
    asked = plan.asked[member.entry.task]
    return TaskResult(
        task=member.entry.task,
        group=member.group,
        kind=member.kind,
        metric=member.metric.key,
        version=version_of(member.task),
        settings=plan.settings[member.entry.task],
        documents=documents,
        chance=asked.chance,
        majority=asked.majority,
        unit=member.metric.unit,
        total=member.total,
        benchmark=member.benchmark,
        share=member.share,
    )


def training_metrics(source: Checkpoint) -> tuple[Mapping[str, Any], ...]:
    """The lines of metrics.jsonl of the run that made the model; none where it is no run folder of ours."""
    return tuple(RunFolder(source.folder).metrics()) if read_provenance(source.folder) is not None else ()


@contextmanager
def enough_memory(task: str, batch_size: int) -> Iterator[None]:
    """Raise MachineError with a remedy if memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _NO_MEMORY):
            raise
        remedy = f"; run the same command with batch_size={batch_size // 2}" if batch_size > 1 else ""
        raise MachineError(f"out of memory at {task}{remedy} (finished tasks are kept)") from error
