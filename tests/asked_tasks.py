"""One task asked of one model, without a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dae_eval.answers import Asked, ask, documents_of
from dae_eval.benchmarks import load_tasks, set_shots
from dae_eval.harness import Harness, run_task
from dae_eval.metrics import choose_metric
from dae_eval.results import Document, Kind
from dae_eval.suites import TaskEntry
from pico import make_tokenizer


def asked(tasks: Path, name: str, chat: Any = None, kind: Kind = "domain", **entry: Any) -> Asked:
    task = load_tasks([name], tasks, {})[name]
    set_shots(task, entry.get("shots"))
    return ask(task, TaskEntry(task=name, **entry), choose_metric(task, entry.get("metric"), kind), chat)


def answers(asked: Asked, model: Any, batch_size: int = 4, chat: bool = False, **settings: Any) -> tuple[Document, ...]:
    harness = Harness(model, make_tokenizer(), batch_size=batch_size, **settings)
    return documents_of(asked, run_task(harness, asked.task, asked.entry.limit, chat), frozenset())
