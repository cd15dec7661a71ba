"""Adapters of every kind peft makes: a role says exactly what plain peft says, or the key that it cannot is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from pico import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd.config.stage_recipe import LoraRecipe
from kd.errors import UserError
from kd.models.adapters import put_adapter
from kd.models.checkpoint import checkpoint
from kd.models.compatibility import check_adapter
from kd.models.forward import final_hidden_states, head_of
from kd.models.roles import (
    STUDENT_ADAPTER,
    Backbone,
    LoadSettings,
    Role,
    activate,
    add_frozen_adapter,
    add_student_adapter,
    check_head,
    load_model,
    resume_adapter,
    vocabulary_rows,
)

SETTINGS = LoadSettings(torch.float32)
IDS = torch.arange(3, 27)[None]


def make_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter all of whose weights were moved, saved by plain peft."""
    torch.manual_seed(7)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def edit(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def plain_logits(base: Path, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def role_logits(role: Role) -> Tensor:
    with activate(role) as model, torch.no_grad():
        return head_of(model).logits(final_hidden_states(model, {"input_ids": IDS})[0])


SHARED: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [5, 9]}},
    "tokens, tied": {"trainable_token_indices": [5, 6, 7], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both ends, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "a bias on the head": {"target_modules": ["lm_head", "q_proj"], "lora_bias": True},
    "ranks and alphas": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "all but some": {"exclude_modules": ["q_proj"]},
    "biases that there are none of": {"bias": "all"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_role_says_what_plain_peft_says(kind: str, tied: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    expert = make_adapter(base, tmp_path / "expert", **SHARED[kind])
    on_embeddings = {"modules_to_save": ["embed_tokens"]} if "ends" in kind or kind == "embeddings" else {}
    beside = {"trainable_token_indices": [6, 8]} if kind.startswith("tokens") else on_embeddings
    if kind == "tokens of the head":
        beside = {"trainable_token_indices": {"lm_head": [9, 11]}}
    other = make_adapter(base, tmp_path / "other", r=2, **beside)
    check_adapter("expert", checkpoint(expert), checkpoint(base), shares=True)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    add_student_adapter(backbone, LoraRecipe())
    names = [add_frozen_adapter(backbone, checkpoint(path)) for path in (expert, other)]
    model = backbone.model
    model.train()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(STUDENT_ADAPTER in name.split(".") for name in trained)
    says = {name: plain_logits(base, path) for name, path in zip([*names, None], (expert, other, None), strict=True)}
    assert (says[names[0]] - says[None]).abs().max() > 0.1
    for adapter in (names[0], None, STUDENT_ADAPTER, names[1], names[0]):
        role = Role("a role", model, adapter)
        expected = says[None if adapter == STUDENT_ADAPTER else adapter]
        torch.testing.assert_close(role_logits(role), expected, rtol=1e-5, atol=1e-5)
        check_head(role, vocabulary_rows([role]))


NOT_SHARED: dict[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, r"adapter_config\.json: alora_invocation_tokens: \[5, 6\]: .*plain"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication: .*all roles.*dae merge weights"),
    "KaSA": ({"kasa_config": KasaConfig()}, r"kasa_config: .*dae merge weights"),
    "BD-LoRA": (
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2), "target_modules": ["q_proj"]},
        r"use_bdlora: .*is not supported; merge it with peft",
    ),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, r"monteclora_config: .*is not supported"),
    "a whole MLP": (
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
        r"cannot stand beside the other adapters on its base: \S+mlp is kept whole .*dae merge weights",
    ),
}


@pytest.mark.parametrize("kind", NOT_SHARED)
def test_what_roles_cannot_share_is_named_with_what_helps(kind: str, tmp_path: Path) -> None:
    config, told = NOT_SHARED[kind]
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", **config)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    empty = Backbone(checkpoint(base), checkpoint(base).meta_model())
    for one in (backbone, empty):
        add_student_adapter(one, LoraRecipe())
        with pytest.raises(UserError, match=told):
            add_frozen_adapter(one, checkpoint(expert))


def test_tokens_of_one_expert_and_embeddings_of_another_do_not_stand_beside_each_other(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    tokens = make_adapter(base, tmp_path / "tokens", trainable_token_indices=[5, 6])
    embeddings = make_adapter(base, tmp_path / "embeddings", modules_to_save=["embed_tokens"])
    for first, second in ((tokens, embeddings), (embeddings, tokens)):
        for model in (load_model(checkpoint(base), SETTINGS), checkpoint(base).meta_model()):
            backbone = Backbone(checkpoint(base), model)
            add_frozen_adapter(backbone, checkpoint(first))
            with pytest.raises(UserError, match=r"cannot stand beside the other adapters.*dae merge weights"):
                add_frozen_adapter(backbone, checkpoint(second))


def test_biases_of_the_base_that_an_adapter_trained_are_refused_by_name(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", attention_bias=True)
    expert = make_adapter(base, tmp_path / "expert", bias="lora_only")
    with pytest.raises(UserError, match=r"biases of the base that it trained \(bias\).*dae merge weights"):
        check_adapter("expert", checkpoint(expert), checkpoint(base), shares=True)
    check_adapter("expert", checkpoint(expert), checkpoint(base))
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    with pytest.raises(UserError, match=r"biases of the base that it trained"):
        resume_adapter(backbone, checkpoint(expert))


UNKNOWN: dict[str, Any] = {"use_newest": True, "newest_config": {"scale": 2.0}, "newest_layers": [1], "newest": 0.5}


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_key_that_the_installed_peft_does_not_know_is_refused(key: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert")
    edit(expert, **{key: UNKNOWN[key], "peft_version": "99.1"})
    told = rf"adapter_config\.json: {key}: .*peft .*, which is installed.*99\.1.*Install the peft that wrote it"
    with pytest.raises(UserError, match=told):
        check_adapter("expert", checkpoint(expert), checkpoint(base))
    with pytest.raises(UserError, match=told):
        put_adapter(load_model(checkpoint(base), SETTINGS), checkpoint(expert), STUDENT_ADAPTER)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_says_nothing_is_no_hindrance(value: Any, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert")
    edit(expert, newest=value)
    check_adapter("expert", checkpoint(expert), checkpoint(base), shares=True)


def test_weights_that_are_no_numbers_are_seen_in_the_embeddings_factors_too(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", target_modules=["embed_tokens"])
    file = expert / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if "lora_embedding_A" in name)][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expert: .*lora_embedding_A.* NaN"):
        add_frozen_adapter(Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS)), checkpoint(expert))


# -- the base that an adapter names ------------------------------------------------------------------------------------


def test_another_base_of_the_same_shapes_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, other = make_checkpoint(tmp_path / "a" / "base"), make_checkpoint(tmp_path / "b" / "base", seed=4)
    expert = make_adapter(base, tmp_path / "expert")
    with caplog.at_level(logging.WARNING):
        check_adapter("expert", checkpoint(expert), checkpoint(base))
        assert not [record for record in caplog.records if record.name == "dae"]
        check_adapter("expert", checkpoint(expert), checkpoint(other))
        edit(expert, base_model_name_or_path="elsewhere/another")
        check_adapter("expert", checkpoint(expert), checkpoint(other))
    told = [record.getMessage() for record in caplog.records if record.name == "dae"]
    assert len(told) == 2
    assert str(other) in told[0]
    assert "elsewhere/another" in told[1]


def test_the_same_base_under_another_name_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, copy = make_checkpoint(tmp_path / "base"), make_checkpoint(tmp_path / "copy")
    expert = make_adapter(base, tmp_path / "expert")
    with caplog.at_level(logging.WARNING, logger="dae"):
        check_adapter("expert", checkpoint(expert), checkpoint(copy))
    assert not [record for record in caplog.records if record.name == "dae"]


def test_an_adapter_that_was_trained_with_more_tokens_is_told_what_helps(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(289)
    model.save_pretrained(tmp_path / "wide")
    expert = make_adapter(tmp_path / "wide", tmp_path / "expert", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"tokens were added to its vocabulary.*resize_token_embeddings"):
        check_adapter("expert", checkpoint(expert), checkpoint(base))
