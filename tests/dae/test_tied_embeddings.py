"""Every full checkpoint that is written says truly whether its embeddings are one matrix, and is what was merged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import make_checkpoint
from processes import dae
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import GENERAL_WORDS, SHOP_WORDS, make_rows

from kd.models.checkpoint import checkpoint
from kd.models.roles import LoadSettings, load_model

IDS = torch.arange(3, 27)[None]
MERGE = ["merge", "weights", "--method", "linear", "--base", "base", "--expert", "expert", "--output", "whole"]
ON_THE_ENDS: dict[str, tuple[dict[str, Any], bool]] = {  # settings, whether the result is tied
    "elsewhere": ({}, True),
    "saved head": ({"modules_to_save": ["lm_head"]}, False),
    "saved embeddings": ({"modules_to_save": ["embed_tokens", "wte"]}, False),
    "both saved": ({"modules_to_save": ["embed_tokens", "wte", "lm_head"]}, False),
    "both saved as one": ({"modules_to_save": ["embed_tokens", "wte"], "ensure_weight_tying": True}, True),
    "on the head": ({"target_modules": ["lm_head"]}, False),
    "tokens": ({"trainable_token_indices": [5, 6]}, True),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 6]}}, False),
}


def make_world(folder: Path, family: str = "llama", **adapter: Any) -> Path:
    base = make_checkpoint(folder / "base", family, tie_word_embeddings=True)
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": "all-linear", **adapter}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(str(folder / "expert"))
    make_rows(folder / "general.jsonl", 0, 24, GENERAL_WORDS)
    make_rows(folder / "shop.jsonl", 1, 24, SHOP_WORDS)
    return folder


def adapted(world: Path, adapter: str = "expert") -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), world / adapter))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def assert_true(folder: Path, expected: Tensor, tied: bool) -> None:
    """The folder is the model, and a reader that believes the config opens the model, too."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    tensors = load_file(folder / "model.safetensors")
    ends = [name for name in tensors if "embed_tokens" in name or "wte" in name or "lm_head" in name]
    assert len(ends) == (1 if tied else 2)
    if config["tie_word_embeddings"]:
        model.lm_head.weight = model.get_input_embeddings().weight
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ON_THE_ENDS)
def test_an_adapter_on_tied_embeddings_merges_into_what_it_was(kind: str, tmp_path: Path) -> None:
    settings, tied = ON_THE_ENDS[kind]
    world = make_world(tmp_path / "world", **settings)
    ended = dae([*MERGE, "weight=1"], world)
    assert ended.status == 0, ended.err
    assert_true(world / "whole", adapted(world), tied)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_way_to_an_untied_expert_both_matrices_are_half_way(family: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", family, modules_to_save=["lm_head"])
    assert dae(MERGE, world).status == 0
    config = json.loads((world / "whole" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    whole = load_file(world / "whole" / "model.safetensors")
    base = load_file(world / "base" / "model.safetensors")
    saved = load_file(world / "expert" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    name = next(name for name in base if "embed_tokens" in name or "wte" in name)
    torch.testing.assert_close(whole[name], base[name])
    torch.testing.assert_close(whole["lm_head.weight"], (base[name] + saved) / 2)


def test_a_config_that_calls_two_matrices_one_is_set_right_when_it_is_opened(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = load_model(checkpoint(base), LoadSettings(torch.float32))
    model.save_pretrained(tmp_path / "again")
    assert_true(tmp_path / "again", logits(model), False)


def test_a_plain_student_beside_an_expert_with_token_rows(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", trainable_token_indices=[5, 6])
    command = [
        "align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl", "--general-data",
        "general.jsonl", "--output", "student", "--merge", "train.max_steps=2",
    ]  # fmt: skip
    ended = dae(command, world, proof=False)
    assert ended.status == 0, ended.err
    assert_true(world / "student" / "merged", adapted(world, "student"), True)


@pytest.mark.parametrize("kind", ["tokens of the head", "both saved", "on the head"])
def test_a_merged_student_and_its_adapter_say_the_same(kind: str, tmp_path: Path) -> None:
    """A student that goes on from the adapter, beside an expert with modules of its own."""
    world = make_world(tmp_path / "world", **ON_THE_ENDS[kind][0])
    os.rename(world / "expert", world / "earlier")
    make_world(tmp_path / "other", modules_to_save=["norm"])
    os.rename(tmp_path / "other" / "expert", world / "expert")
    command = [
        "align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl", "--general-data",
        "general.jsonl", "--output", "student", "--merge", "student_from=earlier", "train.max_steps=2",
    ]  # fmt: skip
    ended = dae(command, world, proof=False)
    assert ended.status == 0, ended.err
    says = adapted(world, "student")
    assert (says - adapted(world, "earlier")).abs().max() > 1e-6
    assert_true(world / "student" / "merged", says, False)


def test_an_adapter_that_cannot_be_merged_is_the_users_to_mend(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", lora_bias=True)
    before = sorted(world.rglob("*"))
    ended = dae(MERGE, world)
    assert ended.status == 2, ended.err
    assert "expert/adapter_config.json: cannot be merged into its base: " in ended.err
    assert "`lora_bias=True`" in ended.err
    assert "dae align --expert" in ended.err
    assert [line for line in ended.err.splitlines() if line.startswith("dae ")] == ended.err.splitlines()[-1:]
    assert sorted(world.rglob("*")) == before
