"""What a person sees while models are asked: a live line in a terminal, one line per finished task elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress on stderr: whole tasks over all models, and the requests of the task under way."""

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

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, model: str, task: str) -> None:
        """A task is about to be asked."""
        self._progress.reset(self._one, description=f"{model}  {task}", total=None, visible=True)

    def tell(self, done: int, total: int) -> None:
        """So many requests of the task under way have been answered."""
        self._progress.update(self._one, completed=done, total=total)

    def finished(self, line: str = "") -> None:
        """A task is finished; where there is no live display, a line says with what."""
        self._progress.update(self._all, advance=1)
        self._progress.update(self._one, visible=False)
        if line and not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)
