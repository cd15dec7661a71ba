"""What a person sees while a stage trains: a live line in a terminal, one line per log elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def one_line(logs: Mapping[str, Any]) -> str:
    """Loss and each route's KL (or its next-token loss, where there is no teacher), short enough for 80 columns."""
    parts = [f"loss {logs['loss']:.4f}"]
    for key, value in logs.items():
        route, _, what = key.partition("/")
        if what == "kl" or (what == "ntp" and f"{route}/kl" not in logs):
            parts.append(f"{route} {what} {round(value, 4) + 0.0:.4f}")  # what rounds to 0 has no sign
        elif what == "factor":  # of a route with a budget
            parts.append(f"{route} factor {value:.3g}")
    return "  ".join(parts)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say in a terminal what takes a while and has no steps to count; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    with console.status(what):
        yield


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
            held_out = {key.removeprefix("eval_").replace("_kl", "/kl"): value for key, value in logs.items()}
            self._console.print(f"step {state.global_step}  held-out {one_line(held_out)}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
