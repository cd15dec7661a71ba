"""What a person sees while a stage trains: a live line in a terminal, a table in a notebook, else one line per log."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_in_notebook


def shown_values(logs: Mapping[str, Any]) -> dict[str, str]:
    """Loss and each route's KL (or its next-token loss, where there is no teacher), as text."""
    shown = {"loss": f"{logs['loss']:.4f}"}
    for key, value in logs.items():
        route, _, what = key.partition("/")
        if what == "kl" or (what == "ntp" and f"{route}/kl" not in logs):
            shown[f"{route} {what}"] = f"{round(value, 4) + 0.0:.4f}"  # what rounds to 0 has no sign
        elif what == "factor":  # of a route with a budget
            shown[f"{route} factor"] = f"{value:.3g}"
    return shown


def one_line(logs: Mapping[str, Any]) -> str:
    """The same, short enough for 80 columns."""
    return "  ".join(f"{name} {value}" for name, value in shown_values(logs).items())


def held_out_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged of eval sets, under the names of training."""
    return {key.removeprefix("eval_").replace("_kl", "/kl"): value for key, value in logs.items()}


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say in a terminal what takes a while and has no steps to count; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    with console.status(what):
        yield


def training_progress() -> TrainerCallback:
    """Progress as this process can show it."""
    return NotebookProgress() if is_in_notebook() else TrainingProgress()


class NotebookProgress(TrainerCallback):
    """A bar, and below it a table with a row for each logged step: one output, which is updated."""

    def __init__(self) -> None:
        self._tracker: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        from transformers.utils.notebook import NotebookTrainingTracker

        if state.is_world_process_zero:
            self._tracker = NotebookTrainingTracker(state.max_steps)
            self._tracker.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tracker is not None:
            self._tracker.update(state.global_step, force_update=state.global_step == state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self._tracker is None or not logs:
            return
        if "loss" in logs:
            values = shown_values(logs)
        elif "eval_loss" in logs:
            values = {f"held-out {name}": value for name, value in shown_values(held_out_logs(logs)).items()}
        else:
            return
        self._tracker.write_line({"step": state.global_step, **values})
        self._tracker.display()


class TrainingProgress(TrainerCallback):
    """Rich progress on stderr by the main process."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, status="")
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs and self._progress is not None:
            self._progress.update(self._task, status=one_line(logs))
        elif "loss" in logs:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {one_line(logs)}", highlight=False)
        elif "eval_loss" in logs:
            words = one_line(held_out_logs(logs))
            self._console.print(f"step {state.global_step}  held-out {words}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
