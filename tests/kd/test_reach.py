"""Losses between layers that nothing trained reaches are refused, by the run and by `dae check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import make_checkpoint, make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from worlds import make_rows

from dae import cli
from kd.config.stage_recipe import LoraRecipe
from kd.losses.gradient_reach import attention_maps_with_gradient, hidden_states_with_gradient
from kd.losses.hidden_states import decoder_layers
from kd.models.checkpoint import Checkpoint
from kd.models.roles import STUDENT_ADAPTER, Backbone, Role, add_student_adapter

COMMAND = ["--base", "base", "--teacher", "teacher", "--data", "rows.jsonl", "--output", "o", "train.max_steps=1"]
MAPS = "nothing of the student that trains comes before the attention maps of these layers, so this loss is constant"


def student_on(model: Any, *targets: str) -> Role:
    lora = LoraRecipe(rank=2, target_modules=targets)
    return Role(
        "student", add_student_adapter(Backbone(Checkpoint("base", Path("base")), model), lora), STUDENT_ADAPTER
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_layer_learns_from_what_trains_before_it(family: str) -> None:
    """Also without values, as `dae check` has its models."""
    modules = {"gpt2": ("c_attn", "attn.c_proj"), "mixtral": ("k_proj", "mlp.gate")}.get(family, ("k_proj", "v_proj"))
    expected = {
        modules[0]: ({0: True, 1: True}, {0: True, 1: True}),
        modules[1]: ({0: False, 1: True}, {0: True, 1: True}),
        "lm_head": ({0: False, 1: False}, {0: False, 1: False}),
    }
    for target, (maps, states) in expected.items():
        model = make_model(family).requires_grad_(False)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict()))
        for one in (model, empty.requires_grad_(False)):
            student = student_on(one, target)
            assert (attention_maps_with_gradient(student), hidden_states_with_gradient(student)) == (maps, states), (
                target,
                one.device,
            )
            assert not any(layer._forward_hooks for layer in decoder_layers(student))
    whole: nn.Module = make_model(family)
    assert all(attention_maps_with_gradient(Role("student", whole, None)).values())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["attention.layers=[[0, 0]]", "lora.target_modules=[down_proj]"], f"attention.layers: [[0, 0]]: {MAPS}"),
        (["attention.weight=1", "lora.target_modules=[lm_head]"], f"attention.layers: even: {MAPS}"),
        (["attention.layers=[[0, 0], [1, 1]]", "lora.target_modules=[down_proj]"], None),
        (["attention.layers=[[0, 0]]", "lora=null"], None),
        (
            ["hidden.layers=[[0, 0]]", "lora.target_modules=model.layers.1.*down_proj"],
            "hidden.layers: [[0, 0]]: nothing of the student that trains comes before the output of these layers",
        ),
        (["hidden.layers=[[0, 0]]", "lora.target_modules=[down_proj]"], None),
    ],
)
def test_a_loss_that_cannot_move_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    words: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base")
    make_checkpoint(tmp_path / "teacher", seed=5, hidden_size=24, num_attention_heads=4)  # its states need a projection
    make_rows(tmp_path / "rows.jsonl", 1, 20)
    (tmp_path / "distill.yaml").write_text("{base: base, teacher: teacher, output: o, data: {train: rows.jsonl}}")
    assert cli.run(["check", "distill.yaml", "train.max_steps=1", *settings]) == (0 if words is None else cli.USER)
    said = capsys.readouterr().err
    if words is not None:
        assert words in said
        assert cli.run(["distill", *COMMAND, *settings]) == cli.USER
        assert words in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
