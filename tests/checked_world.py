"""A small world and its recipe: what the tests of `dae check` look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model

from dae.recipe import AlignRecipe


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_checked_world(folder: Path) -> Path:
    """A base, an adapter expert, general texts and domain pairs with short answers."""
    make_checkpoint(folder / "base")
    adapted = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    write_rows(folder / "general.jsonl", [{"text": f"{n}: red green blue one two three four five"} for n in range(90)])
    pairs = [{"prompt": f"Q{n}: how big is the blue kettle?", "completion": " ten"} for n in range(30)]
    write_rows(folder / "domain.jsonl", pairs)
    return folder


def recipe_of(world: Path, output: Path, **changes: Any) -> AlignRecipe:
    values: dict[str, Any] = {
        "base": world / "base",
        "expert": str(world / "adapter"),
        "output": output,
        "data": {"max_length": 64, "general": world / "general.jsonl", "domain": world / "domain.jsonl"},
        "lora": {"rank": 2},
        "train": {"per_device_train_batch_size": 4, "num_train_epochs": 1},
    }
    return AlignRecipe(**{**values, **changes})
