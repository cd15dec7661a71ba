"""Runs of `dae align` on pico models, and what tests read from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import align_command, metrics_of

from dae import cli

HELD_OUT = ("data.eval.domain=heldout_shop.jsonl", "data.eval.general=heldout_general.jsonl")
EVEN_SHARES = ("data.domain.0.share=0.5", "data.general.0.share=0.5")
PROBE = torch.tensor([[5, 60, 70, 80, 90, 100, 110, 120, 130, 31, 41, 59]])


def run(*more: str, output: str = "student") -> Path:
    """A run of `dae align` in the current folder that must succeed; its folder."""
    assert cli.run(align_command(*more, output=output)) == 0
    return Path(output)


def logits_of(folder: Path, ids: Tensor = PROBE, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V] logits of what was saved, by plain transformers and peft."""
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else folder
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype if config.exists() else "auto")
    if config.exists():
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits[0].float()
    return logits


def trained_steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if "loss" in line]


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if "eval_loss" in line]


def start_of(folder: Path) -> dict[str, float]:
    """KL(teacher || student) before the first step, by route."""
    return {key[8:-3]: value for key, value in metrics_of(folder)[0].items() if key.startswith("initial_")}


def assert_same_student(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    moved = float((logits_of(first) - logits_of(Path("base"))).abs().max())
    assert moved > 0.1
    torch.testing.assert_close(logits_of(first), logits_of(second), rtol=0, atol=tolerance)


def merged(adapter: str, target: str, dtype: torch.dtype = torch.float32) -> Path:
    """The adapter merged into `base`, as a full checkpoint beside it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained("base").save_pretrained(target)
    return Path(target)


def cut(micro_batch: int, accumulation: int) -> list[str]:
    return [
        f"train.per_device_train_batch_size={micro_batch}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text + "\n")
    return "recipe.yaml"
