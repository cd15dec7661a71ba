"""Callbacks of the trainer: epochs, early stopping, signals."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState


class StepBookkeeping(TrainerCallback):
    """Log whenever a checkpoint is written, so that a resumed run averages over the same steps; count true epochs.

    transformers sees a run as one pass over its batches. epochs_per_step: the part of the mixture's epoch that a step
    is, None if the mixture has no epoch.
    """

    def __init__(self, epochs_per_step: float | None) -> None:
        self._epochs_per_step = epochs_per_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if self._epochs_per_step is not None:
            state.epoch = state.global_step * self._epochs_per_step
        if control.should_save:
            control.should_log = True
        return control


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping whose count is kept in checkpoints; a run that has stopped does not resume training."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the optimizer step, write a checkpoint, stop. A second Ctrl-C stops at once.

    Python delivers signals to the main thread only: a run in another thread does not handle them. `restore` gives the
    process its own handlers back, also where training ended by an error.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if torch.distributed.is_initialized():  # all ranks must stop after the same step, or the rest would hang
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.received is not None:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        while self._before:
            signal.signal(*self._before.popitem())
