"""The end of a run: its summary, its files, and proof that they load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from kd.data.stage_data import StageData
from kd.models.forward import final_hidden_states, head_of
from kd.models.merged import merged
from kd.models.roles import STUDENT_ADAPTER, LoadSettings
from kd.runs.run_folder import RunFolder
from kd.training.metrics import peak_memory_bytes
from kd.training.model_card import CardFacts, write_model_card
from kd.training.trainer import RoutedTrainer, save_student
from kd.training.verify import verify_saved


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
        **({} if trainer.budget is None else {"budget": trainer.budget.outcome(evaluation)}),
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


def publish(facts: CardFacts, run: RunFolder, trainer: RoutedTrainer, data: StageData, settings: LoadSettings) -> None:
    """Write the result, load it in a fresh process and compare, then call the run finished."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    student.eval()
    ids = torch.tensor([data.rows[0][0].input_ids[:32]])
    with torch.no_grad():
        hidden = final_hidden_states(student, {"input_ids": ids.to(trainer.args.device)})
        expected = head_of(student).logits(hidden[0]).cpu()

    def write_files(folder: Path) -> None:
        save_student(student, folder)
        data.tokenizer.save_pretrained(str(folder))
        write_model_card(folder, facts)

    run.publish(write_files)
    verify_saved(run.path, ids[0].tolist(), expected, settings, facts.inputs["base"])
    if facts.recipe.merge and isinstance(student, PeftModel):
        whole = merged(student, STUDENT_ADAPTER, facts.recipe.output)

        def write_merged(folder: Path) -> None:
            whole.save_pretrained(str(folder / "merged"))
            data.tokenizer.save_pretrained(str(folder / "merged"))

        run.publish(write_merged)
        verify_saved(run.path / "merged", ids[0].tolist(), expected, settings)
    run.mark_finished(facts.summary)
