"""`align`, `sft` and `distill` from Python: what people have in a notebook in, a result out.

Rows are a path, a `datasets.Dataset` or a list of dicts; models are folders or hub ids, or the result of an earlier
call. Further keywords are keys of the recipe (`dae keys align`), those of its sections `data`, `lora` and `train` by
their own names: `max_length=512, rank=32, learning_rate=1e-4`. The same call resumes a run that was stopped, if its
rows and settings are the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from dae.exit_status import as_own_errors
from dae.process import quiet_libraries
from dae.python_values import recipe_values, routes, sources
from dae.recipe import AlignRecipe
from dae.results import TrainingResult
from dae.stages import STAGES
from kd.config.loading import load_recipe
from kd.config.schema import plain
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import ROUTE, SftRecipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    PathLike: TypeAlias = str | os.PathLike[str]
    # A path, rows, a source such as {"path": rows, "share": 0.2}, or a list of several.
    Rows: TypeAlias = PathLike | Dataset | Mapping[str, Any] | Sequence[Mapping[str, Any] | PathLike | Dataset]
    Teacher: TypeAlias = PathLike | Mapping[str, Any]


@overload
def align(model: AlignRecipe, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainingResult: ...


@overload
def align(
    model: PathLike,
    expert: Teacher,
    train_dataset: Mapping[str, Rows] | None = None,
    *,
    reference: Teacher | None = None,
    output_dir: PathLike | None = None,
    eval_dataset: Mapping[str, Rows] | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult: ...


def align(
    model: AlignRecipe | PathLike,
    expert: Teacher | None = None,
    train_dataset: Mapping[str, Rows] | None = None,
    *,
    reference: Teacher | None = None,
    output_dir: PathLike | None = None,
    eval_dataset: Mapping[str, Rows] | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult:
    """Train a student that matches each expert on its domain's rows and the reference on general rows.

    Args:
        model: the base: a folder or hub id; or a whole recipe, then only with `callbacks`.
        expert: the teacher of the route `domain`; several with names: `{"shop": path, "law": path}`.
        train_dataset: rows of each route, `{"domain": rows, "general": rows}`. Routes that are missing are read from
            the data recorded in the run folders of expert and reference.
        reference: the teacher of general rows; by default the base.
        output_dir: the run folder to write, by default `runs/align`.
        eval_dataset: held-out rows of routes; adds the forgetting curve to the metrics.
        args: keys of the recipe by dotted names, `{"train.learning_rate": 1e-3, "data.domain.0.share": 0.2}`.
        callbacks: of transformers, called beside the toolkit's own.
        **keys: keys of the recipe: `start="base"`, `max_steps=100`.

    Returns:
        The finished run.

    Raises:
        UserError: recipe, rows or checkpoints are wrong (a ValueError).
        MachineError: disk or memory is full.
        Stopped: an interrupt (Ctrl-C) came during training; a checkpoint is written, the same call resumes.
    """
    given = {"base": model, "expert": expert, "reference": reference, "output": output_dir}
    if isinstance(model, AlignRecipe):
        others = [expert, train_dataset, reference, output_dir, eval_dataset, args, *keys]
        return run_recipe("align", model, callbacks, others)
    given |= routes("train_dataset", train_dataset, "data") | routes("eval_dataset", eval_dataset, "data.eval")
    return run_values("align", given, keys, args, callbacks)


@overload
def sft(model: SftRecipe, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainingResult: ...


@overload
def sft(
    model: PathLike,
    train_dataset: Rows,
    *,
    output_dir: PathLike,
    eval_dataset: Rows | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult: ...


def sft(
    model: SftRecipe | PathLike,
    train_dataset: Rows | None = None,
    *,
    output_dir: PathLike | None = None,
    eval_dataset: Rows | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult:
    """Train an expert with next-token loss on response tokens; LoRA, or all weights with `lora=None`.

    Args:
        model: the base: a folder or hub id; or a whole recipe, then only with `callbacks`.
        train_dataset: the rows.
        output_dir: the run folder to write.
        eval_dataset: held-out rows.
        args: keys of the recipe by dotted names.
        callbacks: of transformers, called beside the toolkit's own.
        **keys: keys of the recipe.

    Returns:
        The finished run.

    Raises:
        UserError: recipe, rows or checkpoints are wrong (a ValueError).
        MachineError: disk or memory is full.
        Stopped: an interrupt (Ctrl-C) came during training; a checkpoint is written, the same call resumes.
    """
    if isinstance(model, SftRecipe):
        return run_recipe("sft", model, callbacks, [train_dataset, output_dir, eval_dataset, args, *keys])
    given = {"base": model, "output": output_dir} | one_route(train_dataset, eval_dataset)
    return run_values("sft", given, keys, args, callbacks)


@overload
def distill(model: DistillRecipe, *, callbacks: Sequence[TrainerCallback] = ()) -> TrainingResult: ...


@overload
def distill(
    model: PathLike,
    teacher: Teacher,
    train_dataset: Rows,
    *,
    output_dir: PathLike | None = None,
    eval_dataset: Rows | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult: ...


def distill(
    model: DistillRecipe | PathLike,
    teacher: Teacher | None = None,
    train_dataset: Rows | None = None,
    *,
    output_dir: PathLike | None = None,
    eval_dataset: Rows | None = None,
    args: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> TrainingResult:
    """Train a student to match a larger teacher's next-token distributions.

    Args:
        model: the student before training: a folder or hub id; or a whole recipe, then only with `callbacks`.
        teacher: a folder or hub id, or a model on a server: `{"url": ..., "model": ...}`.
        train_dataset: the rows.
        output_dir: the run folder to write, by default `runs/distill`.
        eval_dataset: held-out rows.
        args: keys of the recipe by dotted names.
        callbacks: of transformers, called beside the toolkit's own.
        **keys: keys of the recipe.

    Returns:
        The finished run.

    Raises:
        UserError: recipe, rows or checkpoints are wrong (a ValueError).
        MachineError: disk or memory is full.
        Stopped: an interrupt (Ctrl-C) came during training; a checkpoint is written, the same call resumes.
    """
    if isinstance(model, DistillRecipe):
        return run_recipe("distill", model, callbacks, [teacher, train_dataset, output_dir, eval_dataset, args, *keys])
    given = {"base": model, "teacher": teacher, "output": output_dir} | one_route(train_dataset, eval_dataset)
    return run_values("distill", given, keys, args, callbacks)


def one_route(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Training and held-out rows of a stage with one route."""
    held_out = {} if eval_dataset is None else {f"data.eval.{ROUTE}": sources(eval_dataset, f"eval.{ROUTE}")}
    return {f"data.{ROUTE}": None if train_dataset is None else sources(train_dataset, ROUTE)} | held_out


def run_recipe(
    stage: str, recipe: StageRecipe, callbacks: Sequence[TrainerCallback], others: Sequence[object]
) -> TrainingResult:
    """Train by a whole recipe. Raises UserError where other arguments are given beside it."""
    if any(one is not None for one in others):
        raise UserError(f"{stage}(recipe): a recipe has all settings; give `callbacks` beside it at most")
    refuse_other_callbacks(stage, callbacks)
    with quiet_libraries(), as_own_errors():
        from kd.stages.run_stage import run_stage

        run = run_stage(STAGES[stage].load(), recipe, callbacks)
    return TrainingResult(run.path, run.summary)


def refuse_other_callbacks(stage: str, callbacks: Any) -> None:
    """Raise UserError where `callbacks` is not what transformers takes."""
    from transformers import TrainerCallback

    given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    for one in given:
        if not issubclass(one if isinstance(one, type) else type(one), TrainerCallback):
            kind = getattr(one, "__name__", type(one).__name__)
            raise UserError(f"{stage}(): callbacks: expected a list of transformers.TrainerCallback, not {kind}")
    if given is not callbacks:
        raise UserError(f"{stage}(): callbacks: expected a list: write callbacks=[...]")


def run_values(
    stage: str,
    given: Mapping[str, Any],
    keys: Mapping[str, Any],
    args: Mapping[str, Any] | None,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    """Train by arguments. given: those with names of their own, by the keys of the recipe that they set.

    Raises UserError where they make no recipe.
    """
    if not isinstance(given["base"], (str, os.PathLike)):
        kind = type(given["base"]).__name__
        raise UserError(f"{stage}(): model: expected a folder or hub id, not {kind}; save a model and pass its folder")
    schema = STAGES[stage].recipe
    names = {"base": "model", "output": "output_dir", "expert": "expert", "reference": "reference"}
    names |= {"teacher": "teacher", f"data.{ROUTE}": "train_dataset", f"data.eval.{ROUTE}": "eval_dataset"}
    for key in given.keys() - names.keys():  # routes
        names[key] = "eval_dataset" if key.startswith("data.eval.") else "train_dataset"
    values = recipe_values(schema, stage, keys, args)
    flags = {key: plain(value) for key, value in given.items()}
    with quiet_libraries(), as_own_errors():  # `train` is checked by transformers
        recipe = load_recipe(schema, None, flags, flag_names=names, values=values, where=f"{stage}()")
    return run_recipe(stage, recipe, callbacks, [])
