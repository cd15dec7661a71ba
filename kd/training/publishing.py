"""The end of a run: its summary, its files, and proof that they load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from kd.data.stage_data import StageData
from kd.models.forward import final_hidden_states, head_of, without_autocast
from kd.models.merged import merged
from kd.models.roles import STUDENT_ADAPTER, LoadSettings
from kd.models.sharding import is_sharded
from kd.runs.run_folder import RunFolder
from kd.training.gathering import gathered_student
from kd.training.metrics import peak_memory_bytes
from kd.training.model_card import CardFacts, write_model_card
from kd.training.trainer import RoutedTrainer, save_student
from kd.training.verify import verify_saved
from kd.training.wrapping import wrapping


def summarise(trainer: RoutedTrainer, data: StageData, first_kl: Mapping[str, float]) -> dict[str, Any]:
    """What run.json and the model card say of the run."""
    # A route with few rows may be missing from the last step that was logged: its newest values are older ones.
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            last |= {key: value for key, value in entry.items() if "/" in key or key == "loss"}
    evaluation = final_evaluation(trainer)
    # Sorted: what comes out of a checkpoint has another order than what was just logged.
    return {
        "steps": trainer.state.global_step,
        "initial_kl": {key.removesuffix("_kl"): value for key, value in first_kl.items()},
        "last": dict(sorted(last.items())),
        "held_out": {key: value for key, value in sorted(evaluation.items()) if key.startswith("eval_")},
        "best_step": trainer.state.best_global_step,
        **({} if trainer.budget is None else {"budget": trainer.budget.outcome(evaluation)}),
        "rows": data.counts(lambda report: report.kept),
        "dropped": data.counts(lambda report: sum(report.dropped.values())),
        "truncated": data.counts(lambda report: report.truncated),
        "wrapping": wrapping(trainer.accelerator),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def final_evaluation(trainer: RoutedTrainer) -> Mapping[str, Any]:
    """The evaluation of the step whose weights the run ends with: best, else last; empty without `data.eval`."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    best = [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return (best or evaluations or [{}])[-1]


@dataclass(frozen=True)
class Trained:
    """The student at the end of a run: a few tokens, its logits for them [T, V], and sharded weights.

    logits_TV: in the dtype in which they were computed. weights: by name in the model, on the main process; None where
    each process has all of them.
    """

    probe_ids: Sequence[int]
    logits_TV: Tensor
    weights: Mapping[str, Tensor] | None


def trained(trainer: RoutedTrainer, data: StageData) -> Trained:
    """What `publish` writes and compares with. All processes call it: weights may be sharded over them."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.eval()
    ids = data.rows[0][0].input_ids[:32]
    with torch.no_grad(), without_autocast(student):
        hidden = final_hidden_states(student, {"input_ids": torch.tensor([ids], device=trainer.args.device)})
        logits_TV = head_of(student).logits(hidden[0]).to("cpu", hidden.dtype)
    weights = gathered_student(student, is_main=trainer.args.should_save) if is_sharded(student) else None
    return Trained(list(ids), logits_TV, weights)


def publish(
    facts: CardFacts, run: RunFolder, trainer: RoutedTrainer, data: StageData, settings: LoadSettings, result: Trained
) -> None:
    """Write the result, load it in a fresh process and compare, then call the run finished."""
    student = trainer.accelerator.unwrap_model(trainer.model)

    def write_files(folder: Path) -> None:
        save_student(student, folder, result.weights)
        data.tokenizer.save_pretrained(str(folder))
        write_model_card(folder, facts)

    run.publish(write_files)
    verify_saved(run.path, result.probe_ids, result.logits_TV, settings, facts.inputs["base"])
    if facts.recipe.merge and isinstance(student, PeftModel):
        whole = merged(student, STUDENT_ADAPTER, facts.recipe.output)

        def write_merged(folder: Path) -> None:
            whole.save_pretrained(str(folder / "merged"))
            data.tokenizer.save_pretrained(str(folder / "merged"))

        run.publish(write_merged)
        verify_saved(run.path / "merged", result.probe_ids, result.logits_TV, settings)
    run.mark_finished(facts.summary)
