"""The progress of an evaluation: a live line in a terminal, a bar in a notebook, else one line per finished task."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import is_in_notebook


class Display:
    """Progress on stderr: finished tasks of all models, and requests of the current task."""

    def __init__(self, tasks: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all = self._progress.add_task("tasks", total=tasks)
        self._one = self._progress.add_task("", total=None, visible=False)
        self._bar: Any = None
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressBar

            self._bar = NotebookProgressBar(tasks)
        self._finished = 0

    def __enter__(self) -> Self:
        self._progress.start()
        self._show_bar("tasks")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, model: str, task: str) -> None:
        self._progress.reset(self._one, description=f"{model}  {task}", total=None, visible=True)
        self._show_bar(f"{model}  {task}")

    def update(self, done: int, total: int) -> None:
        self._progress.update(self._one, completed=done, total=total)

    def finished(self, line: str = "") -> None:
        """Count a finished task; without a live display, print the line."""
        self._progress.update(self._all, advance=1)
        self._progress.update(self._one, visible=False)
        self._finished += 1
        self._show_bar("tasks")
        if line and self._bar is None and not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)

    def _show_bar(self, words: str) -> None:
        if self._bar is not None:
            self._bar.update(self._finished, force_update=True, comment=words)
