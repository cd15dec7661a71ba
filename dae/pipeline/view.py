"""Progress of a pipeline: a live table in a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dae.pipeline.recipe import Stage
from dae.pipeline.stage_process import Stream

_STEP = re.compile(r"step (\d+)/(\d+)\s*(.*)")


@dataclass
class Row:
    stage: Stage
    word: str = "waiting"
    note: str = ""
    done: int = 0
    total: int = 0
    since: float = field(default_factory=time.monotonic)


class View:
    """The whole pipeline. Progress goes to stderr, the stages' stdout to stdout."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.rows = {stage.name: Row(stage) for stage in stages}
        self.console = Console(stderr=True, highlight=False)
        self._running: Row | None = None
        self._spinner = Spinner("dots")
        self._live = Live(
            console=self.console,
            get_renderable=self.table,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    @property
    def width(self) -> int:
        return self.console.width

    def write(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def already(self, stage: Stage) -> None:
        self.rows[stage.name].word = "done"
        if not self.console.is_terminal:
            self.write(f"{stage.name} ({stage.kind}): already done")

    def begin(self, stage: Stage, command: Sequence[str]) -> None:
        row = self._running = self.rows[stage.name]
        row.word, row.since = "running", time.monotonic()
        self.write(f"{stage.name} ({stage.kind}) $ {shlex.join(command)}", "bold")

    def line(self, stream: Stream, text: str) -> None:
        """A line of the running stage. In a terminal its steps update the table instead of being printed."""
        step = _STEP.match(text)
        if step and stream == "err" and self._running is not None and self.console.is_terminal:
            self._running.done, self._running.total = int(step[1]), int(step[2])
            self._running.note = step[3]
        elif stream == "out" and not (self.console.is_terminal and sys.stdout.isatty()):
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        else:
            self.console.print(Text(text), soft_wrap=True)

    def end(self, stage: Stage, word: str, note: str = "") -> None:
        row, self._running = self.rows[stage.name], None
        row.word, row.note = word, note
        took = duration(time.monotonic() - row.since)
        row.since = 0.0
        self.write(f"{stage.name} ({stage.kind}): {word}, {took}" + (f": {note}" if note else ""))

    def table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for row in self.rows.values():
            mark: Text | Spinner = Text({"done": "+", "waiting": " "}.get(row.word, "!"))
            detail: Text | Table = Text(row.note or row.word, overflow="ellipsis", no_wrap=True)
            if row is self._running:
                mark = self._spinner
                detail = Table.grid(padding=(0, 1))
                bar = ProgressBar(total=row.total or None, completed=row.done, width=16, pulse=not row.total)
                steps = f"{row.done}/{row.total} " if row.total else ""
                words = f"{steps}{duration(time.monotonic() - row.since)}  {row.note}"
                detail.add_row(bar, Text(words, overflow="ellipsis", no_wrap=True))
            table.add_row(mark, Text(row.stage.name), Text(row.stage.kind, style="dim"), detail)
        return table

    def summary(self) -> None:
        """Print outputs and verdicts to stdout."""
        console = Console(highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for title in ("stage", "kind", "", "output"):
            table.add_column(title, overflow="fold")
        for row in self.rows.values():
            word = f"{row.word}: {row.note}" if row.note and row.word == "done" else row.word
            table.add_row(*map(Text, (row.stage.name, row.stage.kind, word, str(row.stage.output))))
        console.print()
        console.print(table)


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
