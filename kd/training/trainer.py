"""transformers.Trainer with one objective (routed token losses) and one normaliser (the whole optimizer step).

Shape legend: B rows, T positions, N response tokens, R routes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from kd.data.batches import Batch, response_token_counts
from kd.data.mixing import StepBatchSampler
from kd.errors import UserError
from kd.models.roles import STUDENT_ADAPTER
from kd.models.sharding import is_sharded, put, reshard
from kd.runs.files import disk_errors
from kd.runs.run_folder import RunFolder
from kd.training.budget import RouteBudget
from kd.training.diverged import Locate, diverged, harmed_by_engine, refuse_harmed_weights
from kd.training.evaluating import evaluate_routes
from kd.training.gathering import (
    TRAINING_ONLY,
    gathered_optimizer,
    gathered_student,
    is_training_only,
    scatter_student,
    scattered_optimizer,
    training_only_weights,
)
from kd.training.loss_watch import LossWatch
from kd.training.metrics import MetricsWindow, peak_memory_bytes
from kd.training.objective import Objective, route_sums
from kd.training.zero import hand_over, load_whole_optimizer, own_schedule, whole_optimizer, whole_schedule

logger = logging.getLogger(__name__)

TRAINING_ONLY_WEIGHTS = f"{TRAINING_ONLY}.safetensors"

# Methods of transformers.Trainer that RoutedTrainer overrides, with the parameters they had when it was written. The
# private ones may change in any release: tests/kd/test_trainer_hooks.py compares them with the installed one.
OVERRIDDEN = {
    "get_train_dataloader": "(self)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "log": "(self, logs, start_time=None)",
    "evaluate": "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
    "_get_num_items_in_batch": "(self, batch_samples, device)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_finalize_training": "(self, trial, num_train_samples, start_time)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_best_model": "(self)",
    "_issue_warnings_after_load": "(self, load_result)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "create_optimizer": "(self, model=None)",
    "create_scheduler": "(self, num_training_steps, optimizer=None)",
    "save_model": "(self, output_dir=None, _internal_call=False)",
}
PRIVATE_ARGUMENTS = ("_n_gpu",)  # attributes of TrainingArguments that it sets


class RoutedTrainer(Trainer):
    """Trainer whose loss is an `Objective` and whose checkpoints go through a `RunFolder`.

    Overridden (see OVERRIDDEN): batches, token counts, the loss, evaluation, and what a checkpoint holds and where it
    goes. Everything else is transformers'.
    """

    objective: Objective
    loss_is_scaled_for_ga = True  # the loss is already divided by the count of the whole optimizer step

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train_rows: Dataset[Any],
        batch_sampler: StepBatchSampler,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        run: RunFolder,
        locate: Locate,
        eval_batches: Mapping[str, Sequence[Batch]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """locate: says where rows lie, for messages."""
        args.output_dir = str(run.checkpoints.staging)
        # Several accelerators are used through torchrun or accelerate, never through nn.DataParallel.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=train_rows if eval_batches else None,  # Trainer requires one; evaluate() does not read it
            data_collator=collate,
            callbacks=[LossWatch(), *(callbacks or [])],
        )
        for callback in self.callback_handler.callbacks:
            # TensorBoard's files would be deleted with the staging folder; its environment variable takes precedence.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(run.trackers_dir)
        self._has_engine = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = False  # what Trainer does for it is about DeepSpeed's own checkpoints
        if self._has_engine:
            self.accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # else it warns
        self.pop_callback(PrinterCallback)  # it prints dictionaries; kd.training.progress shows progress
        self.objective = objective
        self.collate = collate
        self.batch_sampler = batch_sampler
        self.run_folder = run
        self.locate = locate
        self.eval_batches = eval_batches or {}
        self._window = MetricsWindow(objective)
        self._optimized: list[dict[str, Any]] = []  # see create_optimizer

    @property
    def budget(self) -> RouteBudget | None:
        """The run's budget. A run that goes on has the callback of its checkpoint, not the one it was made with."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, RouteBudget)), None)

    @property
    def watch(self) -> LossWatch:
        """As `budget`: that of the checkpoint, in a run that goes on."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, LossWatch))

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """[R] response tokens of each route in the optimizer step, over all micro-batches and ranks."""
        routes = len(self.objective.routes)
        counts = (response_token_counts(batch, routes).to(device) for batch in batch_samples)
        tokens_R = sum(counts, torch.zeros(routes, dtype=torch.long, device=device))
        if self.args.world_size > 1:
            tokens_R = self.accelerator.reduce(tokens_R, "sum")
        return tokens_R

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert isinstance(num_items_in_batch, Tensor) and not return_outputs
        sums = route_sums(model, inputs, self.objective, with_teachers=self.objective.trains_with_teachers)
        self._window.add(sums)
        objective = self.objective
        if (budget := self.budget) is not None:
            budget.add(sums, objective)
            objective = budget.applied_to(objective)
        loss = (objective.weights(num_items_in_batch) * sums.loss).sum()
        # Data parallelism averages gradients over ranks, and we want their sum.
        loss = loss * self.accelerator.num_processes
        if sums.router_aux is not None:  # a mean: over the step's micro-batches, too, and over ranks
            loss = loss + self.objective.router_aux_weight * sums.router_aux / self.current_gradient_accumulation_steps
        self.watch.add(loss)
        if self._has_engine and self.accelerator.sync_gradients:
            self._refuse_fault(0.0)  # DeepSpeed's engine takes the step inside of the backward pass
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last that Trainer asks before the optimizer's step: stop here if the step must not be taken."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._has_engine:
            self._refuse_fault(norm)
        elif not math.isfinite(norm):
            raise UserError(harmed_by_engine(self, norm))
        return norm

    def _refuse_fault(self, norm: Tensor | float) -> None:
        """Raise UserError where the step that comes must not be taken."""
        rate = float(self.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        vocabulary_rows = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        fault = self.watch.fault(norm, rate, vocabulary_rows, partial(self.accelerator.reduce, reduction="mean"))
        if fault is not None:
            raise UserError(diverged(self, fault))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the routes' means since the last log, and write metrics.jsonl."""
        if "learning_rate" in logs and "loss" in logs:
            window = self._window.drain(self.accelerator.reduce)
            if window.router_aux is not None:  # logged alone: `loss` does not depend on how a step is cut
                logs["loss"] -= self.objective.router_aux_weight * window.router_aux
                logs["router_aux"] = window.router_aux
            logs.update(window.flat(self.objective.routes))
            if (budget := self.budget) is not None:
                logs[f"{budget.route}/factor"] = budget.factor
            logs["peak_memory_gib"] = round(peak_memory_bytes() / 2**30, 3)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            self.run_folder.append_metrics({"step": self.state.global_step, **logs})
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Eval loss and KL(teacher || student) per route; `eval_loss` weights routes as the training loss does."""
        metrics = evaluate_routes(self.model_wrapped, self.eval_batches, self.objective, self.args.device)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let transformers write into the staging folder, then move the complete checkpoint into the run folder."""
        refuse_harmed_weights(self)
        with disk_errors(self.run_folder.path):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        if self.is_world_process_zero():
            self.run_folder.checkpoints.seal(Path(self.args.output_dir or "") / f"checkpoint-{step}", step)
            self._prune()
        self.accelerator.wait_for_everyone()
        self._point_at_best()

    def _prune(self) -> None:
        self.run_folder.checkpoints.prune(self.args.save_total_limit or 2, self.state.best_global_step)

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """Skip training if the run had already stopped early before it was killed."""
        if not self.control.should_training_stop:
            super()._run_epoch(**arguments)

    def _finalize_training(self, *arguments: Any) -> Any:
        """Load the best checkpoint from its current path: the run folder may have been moved since it was written.

        A kill may have come between the last checkpoint and the removal of an earlier one.
        """
        self._point_at_best()
        if self.is_world_process_zero():
            self._prune()
        output = super()._finalize_training(*arguments)
        refuse_harmed_weights(self)
        return output

    def _point_at_best(self) -> None:
        """Trainer looks for the best checkpoint where it wrote it; it has been moved since."""
        best = self.run_folder.checkpoints.at(self.state.best_global_step or 0)
        self.state.best_model_checkpoint = str(best) if best.exists() else None

    # -- weights, also where they are sharded over the ranks (kd/models/sharding.py): files are those of one process

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.model, nn.Module) and is_sharded(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As one process saves it, where weights are sharded, too: transformers would write each rank's part."""
        if self._is_sharded:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights only, as safetensors: the student's adapter (not the teachers'), or all weights."""
        student = self.accelerator.unwrap_model(self.model)
        if is_sharded(student):
            state_dict = gathered_student(student, is_main=self.args.should_save)
        if not self.args.should_save:
            return
        target = Path(output_dir or self.args.output_dir or "")
        save_student(student, target, state_dict, by_module=True)
        if hasattr(student, TRAINING_ONLY):
            save_file(training_only_weights(student, state_dict), target / TRAINING_ONLY_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Also load the weights that only train (TRAINING_ONLY)."""
        student = self.accelerator.unwrap_model(model or self.model)
        if is_sharded(student):
            scatter_student(student, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if hasattr(student, TRAINING_ONLY):
            weights = load_file(Path(resume_from_checkpoint) / TRAINING_ONLY_WEIGHTS)
            for name, weight in getattr(student, TRAINING_ONLY).state_dict(keep_vars=True).items():
                put(weight, weights[name])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks a weight that trains: the run would go on with another one, silently."""
        known = {name for name, _ in self.accelerator.unwrap_model(self.model).named_parameters()}
        missing = [name for name in load_result.missing_keys if name in known and not is_training_only(name)]
        if missing:
            raise UserError(
                f"{self.run_folder.path}: its checkpoint lacks {len(missing)} weights ({missing[0]}), so this run "
                "cannot go on from it; choose another output"
            )

    def _load_best_model(self) -> None:
        if self._is_sharded:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Remember the groups of parameters that it was made of: accelerate and DeepSpeed put parts in their place."""
        student = self.accelerator.unwrap_model(self.model)
        if self._is_sharded:
            reshard(student)
        hand_over(student)
        optimizer = super().create_optimizer(model)
        self._optimized = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Give FSDP2's optimizer its parameters back; then make the schedule.

        accelerate has just replaced each by the one at its address. Empty parts (a rank of 2 over 4 processes) share
        the address 0.
        """
        if self._is_sharded and not self._has_engine:
            made: Any = self.optimizer
            for group, before in zip(made.param_groups, self._optimized, strict=True):
                group["params"] = before["params"]
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        if self._has_engine:
            state = whole_optimizer(optimizer.optimizer, self._optimized)
            schedule_state = whole_schedule(schedule.state_dict(), self._optimized)
        elif self._is_sharded:
            state, schedule_state = gathered_optimizer(optimizer.state_dict()), schedule.state_dict()
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule_state, Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self._is_sharded or self._has_engine):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        schedule_state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        if self._has_engine:
            load_whole_optimizer(optimizer.optimizer, self._optimized, state)
            schedule_state = own_schedule(schedule_state, self._optimized)
        else:
            optimizer.load_state_dict(scattered_optimizer(state, optimizer.param_groups))
        schedule.load_state_dict(schedule_state)


def save_student(model: nn.Module, folder: Path, state_dict: Any = None, *, by_module: bool = False) -> None:
    """Write the student in PEFT format (adapter `default` in the root) or as full weights, without TRAINING_ONLY.

    by_module: full weights under the names that they have in the model, for Trainer to load. transformers publishes a
    mixture's experts under those of the architecture's first release.
    """
    if isinstance(model, PeftModel):
        # No base weights, even if the embedding or the head has an adapter: training does not change them.
        model.save_pretrained(
            str(folder), state_dict=state_dict, selected_adapters=[STUDENT_ADAPTER], save_embedding_layers=False
        )
        (folder / "README.md").unlink(missing_ok=True)  # peft's template; the run folder has its own
    else:
        if hasattr(model, TRAINING_ONLY):
            weights = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: w for name, w in weights.items() if not name.startswith(f"{TRAINING_ONLY}.")}
        save: Any = model.save_pretrained
        save(str(folder), state_dict=state_dict, save_original_format=not by_module)
