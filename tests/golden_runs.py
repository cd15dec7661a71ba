"""Pico runs whose figures are kept: golden losses are compared with them, and two checkouts with each other.

The world is that of `worlds.make_world`, with a wider teacher, another reference, tasks and a suite beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pico import make_checkpoint
from pico_tasks import make_suite, make_tasks
from worlds import make_world, metrics_of

STEPS = (
    "train.max_steps=6",
    "train.save_steps=2",
    "train.logging_steps=1",
    "train.learning_rate=1e-2",
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
)
LORA = ("lora.rank=4", "lora.dropout=0.1")
ALIGN = (
    "align", "--base", "base", "--domain-data", "shop.jsonl", "--general-data", "general.jsonl",
    "data.eval.general=heldout_general.jsonl", "data.eval.domain=heldout_shop.jsonl", *STEPS,
)  # fmt: skip
DISTILL = ("distill", "--base", "base", "--data", "shop.jsonl", *STEPS)

# Every run of a stage, by name, which is also its output folder.
RUNS: dict[str, tuple[str, ...]] = {
    "sft": ("sft", "--base", "base", "--data", "shop.jsonl", "data.eval.train=heldout_shop.jsonl", *STEPS, *LORA),
    "sft-packed": ("sft", "--base", "base", "--data", "shop.jsonl", "lora=null", "data.packing=true", *STEPS),
    "distill": (*DISTILL, "--teacher", "teacher", "lambda=0.7", "temperature=2.0", "lora=null"),
    "distill-layers": (
        *DISTILL, "--teacher", "teacher", "attention.weight=0.5", "hidden.weight=0.5", "divergence=skewed_forward_kl",
        *LORA,
    ),
    "align-shared": (*ALIGN, "--expert", "expert", *LORA),
    "align-reference": (
        *ALIGN, "--expert", "expert", "--reference", "reference", "divergence=jsd", "beta=0.3", "lambda=0.8",
        "start=base", *LORA,
    ),
    "align-all-weights": (
        *ALIGN, "--expert", "expert", "lora=null", "weights=tokens", "divergence=reverse_kl",
        # Gradients of rows that no token reads are rounding noise, of which AdamW would make whole steps.
        "train.adam_epsilon=1e-4",
    ),
}  # fmt: skip
REPORT = (
    "report", "--base", "base", "--expert", "expert", "--student", "align-shared", "--suite", "suite.yaml",
    "--output", "report",
)  # fmt: skip


def make_golden_world(folder: Path) -> Path:
    """All that RUNS and REPORT are given."""
    make_world(folder)
    make_checkpoint(folder / "teacher", hidden_size=32, num_hidden_layers=3, seed=5)
    make_checkpoint(folder / "reference", seed=6)
    make_suite(folder / "suite.yaml", make_tasks(folder / "tasks"))
    return folder


def figures(run: Path) -> list[Mapping[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    return [
        {key: value for key, value in line.items() if "second" not in key and "memory" not in key}
        for line in metrics_of(run)
    ]


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    found = [float(line["loss"]) for line in figures(run) if "loss" in line]
    assert all(map(math.isfinite, found)), found
    return found
