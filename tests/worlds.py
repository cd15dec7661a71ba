"""What `dae align` is given, in small: a base, an expert adapter on it, and rows of made-up text, in one folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint
from transformers import AutoModelForCausalLM

GENERAL_WORDS = ["red", "green", "blue", "one", "two", "three", "how", "big", "is", "it", "question", "answer", "the"]
SHOP_WORDS = ["KETTLE", "COSTS", "NINE", "COINS", "CUPS", "POT", "4X", "7L", "ITEM", "PRICE"]

# Mostly domain rows, and general ones held out: these only get worse, so the best step is the first one measured.
FORGETTING = (
    "data.general.0.share=0.1",
    "data.domain.0.share=0.9",
    "data.eval.general=heldout_general.jsonl",
    "train.learning_rate=1e-3",
    "train.lr_scheduler_type=constant",
)


def make_rows(path: Path, seed: int, rows: int = 120, words: Sequence[str] = SHOP_WORDS) -> Path:
    """Pairs of a few words each, as JSONL."""
    pick = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            prompt = " ".join(pick.choices(words, k=pick.randint(2, 6)))
            completion = " " + " ".join(pick.choices(words, k=pick.randint(1, 5)))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def make_adapter(folder: Path, base: Path, *, seed: int = 1, size: float = 0.3, **lora: Any) -> Path:
    """A LoRA adapter of rank 4 on `base` that changes its distributions, in plain PEFT format (no provenance)."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, size)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    return folder


def make_world(folder: Path) -> Path:
    """base, expert, general.jsonl, shop.jsonl, heldout_general.jsonl, heldout_shop.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_adapter(folder / "expert", make_checkpoint(folder / "base"))
    for seed, (name, words) in enumerate((("general", GENERAL_WORDS), ("shop", SHOP_WORDS))):
        make_rows(folder / f"{name}.jsonl", seed, 120, words)
        make_rows(folder / f"heldout_{name}.jsonl", seed + 10, 24, words)
    return folder


def align_command(*more: str, output: str = "student") -> list[str]:
    """A run of twelve steps over a world, with a checkpoint at every second step."""
    return [
        "align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl",
        "--general-data", "general.jsonl", "--output", output, "train.max_steps=12", "train.save_steps=2",
        "train.logging_steps=2", "train.learning_rate=1e-2", "lora.rank=4", *more,
    ]  # fmt: skip


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
