"""Roles on one backbone say exactly what separate models say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import FAMILIES, make_checkpoint, make_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from kd.config.stage_recipe import LoraRecipe
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
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
    check_packing,
    load_model,
    refuse_unmergeable,
    resume_adapter,
    vocabulary_rows,
)

SETTINGS = LoadSettings(torch.float32)
IDS = torch.arange(3, 15)[None]


def make_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter with weights far from zero, saved by plain peft."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.1)
    peft_model.save_pretrained(str(folder))
    return folder


def plain_logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def role_logits(role: Role) -> torch.Tensor:
    with activate(role) as model, torch.no_grad():
        return head_of(model).logits(final_hidden_states(model, {"input_ids": IDS})[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_three_roles_on_one_backbone_equal_separate_models(family: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    expert = make_adapter(base, tmp_path / "expert")
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    student = add_student_adapter(backbone, LoraRecipe())
    name = add_frozen_adapter(backbone, checkpoint(expert))
    student.train()
    roles = [Role("student", student, STUDENT_ADAPTER), Role("expert", student, name), Role("reference", student, None)]
    expected = [plain_logits(base), plain_logits(base, expert), plain_logits(base)]
    for role, logits in zip(roles, expected, strict=True):
        torch.testing.assert_close(role_logits(role), logits, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["dora", "head_saved", "lora_on_head", "rslora", "lora_on_embeddings"],
)
def test_experts_of_each_kind(config: dict[str, Any], tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", **config)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    student = add_student_adapter(backbone, LoraRecipe())
    name = add_frozen_adapter(backbone, checkpoint(expert))
    for role, adapter in ((Role("expert", student, name), expert), (Role("reference", student, None), None)):
        torch.testing.assert_close(role_logits(role), plain_logits(base, adapter), rtol=1e-5, atol=1e-5)
        check_head(role, vocabulary_rows([role]))


def test_dropout_on_the_head_matters_to_the_adapter_that_trains_and_to_no_frozen_one(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    on_head = {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.3}
    expert = make_adapter(base, tmp_path / "expert", **on_head)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    student = add_student_adapter(backbone, LoraRecipe())
    role = Role("expert.shop", student, add_frozen_adapter(backbone, checkpoint(expert)))
    student.train()
    check_head(role, 288)
    torch.testing.assert_close(role_logits(role), plain_logits(base, expert), rtol=1e-5, atol=1e-5)

    trained = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    dropped = LoraRecipe(dropout=0.3, target_modules=("q_proj", "lm_head"))
    role = Role("student", add_student_adapter(trained, dropped), STUDENT_ADAPTER)
    with pytest.raises(UserError, match=r"role student: .*set lora\.dropout=0, or leave the output layer out"):
        check_head(role, 288)


def test_an_experts_head_that_cannot_be_used_is_told_a_remedy_for_a_finished_expert(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", target_modules=["q_proj", "lm_head"], use_dora=True)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    name = add_frozen_adapter(backbone, checkpoint(expert))
    role = Role("expert.shop", backbone.model, name)
    with pytest.raises(UserError, match=r"role expert\.shop: .*DoRA.*merge it into its base") as caught:
        check_head(role, 288)
    assert "target_modules" not in str(caught.value)


def test_switching_roles_leaves_everything_as_it_was(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", modules_to_save=["lm_head"])
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    student = add_student_adapter(backbone, LoraRecipe(dropout=0.1))
    name = add_frozen_adapter(backbone, checkpoint(expert))
    student.train()
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trainable and all(f".{STUDENT_ADAPTER}." in n for n in trainable)
    before = role_logits(Role("student", student, STUDENT_ADAPTER))
    for role in (Role("expert", student, name), Role("reference", student, None)):
        with activate(role) as model:
            assert not model.training
        with pytest.raises(RuntimeError, match="in the middle"), activate(role):
            raise RuntimeError("in the middle")
        assert student.training
        assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable
    torch.testing.assert_close(role_logits(Role("student", student, STUDENT_ADAPTER)), before, rtol=0, atol=0)


def test_an_adapter_with_base_weights_of_its_own_cannot_share(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert", target_modules=["embed_tokens"])
    file = expert / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("embed_tokens.base_layer.weight"))
    tensors[name][5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    with pytest.raises(UserError, match=r"brings weights of its own for model\.embed_tokens"):
        add_frozen_adapter(backbone, checkpoint(expert))


def test_an_adapter_folder_is_put_on_once(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert")
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    assert add_frozen_adapter(backbone, checkpoint(expert)) == add_frozen_adapter(backbone, checkpoint(expert))
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "mixtral"])
def test_heads_and_packing_of_known_architectures(family: str) -> None:
    role = Role(family, make_model(family), None)
    check_head(role, 288)
    check_packing(role, 288)


def test_a_head_that_does_something_else_is_refused_by_name() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.5

    model = make_model()
    head = model.lm_head
    model.lm_head = Odd(16, 288, bias=False)
    model.lm_head.weight = head.weight
    with pytest.raises(UserError, match="Odd is not supported"):
        check_head(Role("reference", model, None), 288)
    model.lm_head = head
    model.config.logit_scale = 2.0  # our reading of the config no longer says what the model does
    with pytest.raises(UserError, match="LlamaForCausalLM transforms its logits"):
        check_head(Role("reference", model, None), 288)


def test_packing_is_refused_where_rows_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    forward = model.forward

    def positions_ignored(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", positions_ignored)
    with pytest.raises(UserError, match=r"LlamaForCausalLM see each other .* set data.packing=false"):
        check_packing(Role("reference", model, None), 288)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expert = make_adapter(base, tmp_path / "expert")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(UserError, match=r"bad: model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
        load_model(checkpoint(tmp_path / "bad"), SETTINGS)
    tensors = load_file(expert / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, expert / "adapter_model.safetensors", metadata={"format": "pt"})
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    with pytest.raises(UserError, match=r"expert: .*lora_B.* contains NaN or infinite"):
        add_frozen_adapter(backbone, checkpoint(expert))


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "mixtral"])
def test_no_position_is_projected_to_the_vocabulary(family: str) -> None:
    model = make_model(family)
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output.shape))
    hidden = final_hidden_states(model, {"input_ids": IDS})
    assert hidden.shape == (1, IDS.shape[1], 16)
    assert seen == [torch.Size([1, 0, 288])]


def test_unknown_target_modules_are_the_users_mistake(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        add_student_adapter(backbone, LoraRecipe(target_modules=("no_such_layer",)))


def test_a_bias_that_the_base_has_no_place_for_is_not_merged(tmp_path: Path) -> None:
    for has_place in (False, True):
        base = make_checkpoint(tmp_path / f"base-{has_place}", attention_bias=has_place)
        earlier = make_adapter(base, tmp_path / f"a-{has_place}", target_modules=["q_proj"], lora_bias=True)
        backbone = Backbone(checkpoint(base), load_model(checkpoint(base), SETTINGS))
        student = resume_adapter(backbone, checkpoint(earlier))
        if has_place:
            refuse_unmergeable(student)
        else:
            with pytest.raises(UserError, match=r"merge: true: .*lora_bias.*q_proj.* set merge: false"):
                refuse_unmergeable(student)
