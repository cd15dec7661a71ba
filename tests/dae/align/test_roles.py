"""Student and teachers on shared and own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import PROBE, assert_same_student, logits_of, merged, recipe, run, start_of, trained_steps
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_adapter, make_rows

import dae.alignment
from dae import cli
from kd.models.roles import activate
from kd.stages.stage import StageRoles


def test_where_all_teachers_are_the_base_nothing_moves_at_all(world: Path) -> None:
    folder = run("expert=base", "train.weight_decay=0")
    weights = load_file(folder / "adapter_model.safetensors")
    begun = load_file(min((folder / "checkpoints").iterdir()) / "adapter_model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, begun[name])
        assert ("lora_B" in name) == (not tensor.any())
    assert {line["loss"] for line in trained_steps(folder)} == {0.0}
    assert {line["grad_norm"] for line in trained_steps(folder)} == {0.0}


def test_where_all_teachers_are_the_base_full_weights_do_not_move_either(world: Path) -> None:
    folder = run("expert=base", "lora=null", "train.weight_decay=0")
    before, after = load_file("base/model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_teachers_do_not_move_while_the_student_does(world: Path, lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[StageRoles] = []
    before: list[dict[str, Tensor]] = []
    build = dae.alignment.Align.build_roles

    def keep(*arguments: Any) -> StageRoles:
        kept.append(build(*arguments))
        before.append(logits_of_roles(kept[0]))
        return kept[0]

    monkeypatch.setattr(dae.alignment.Align, "build_roles", keep)
    run(lora, "train.max_steps=10")
    after = logits_of_roles(kept[0])
    for name in ("reference", "expert.domain"):
        assert torch.equal(after[name], before[0][name])
    assert not torch.equal(after["student"], before[0]["student"])
    assert torch.equal(before[0]["student"], before[0]["reference"])
    shared = len({id(parameter) for role in kept[0].all for parameter in role.model.parameters()})
    alone = len(load_file("base/model.safetensors"))
    adapters = len(load_file("expert/adapter_model.safetensors"))
    assert shared == (alone + 2 * adapters if lora != "lora=null" else 2 * alone + adapters)


def logits_of_roles(roles: StageRoles) -> dict[str, Tensor]:
    logits = {}
    for role in roles.all:
        with activate(role) as model, torch.no_grad():
            logits[role.name] = model(input_ids=PROBE).logits.clone()
    return logits


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
def test_an_adapter_teaches_what_its_merged_checkpoint_does(world: Path, kind: dict[str, Any]) -> None:
    make_adapter(world / "adapter", world / "base", **kind)
    merged("adapter", "whole")
    one, other = run("expert=adapter", output="one"), run("expert=whole", output="other")
    assert start_of(one)["domain"] > 0.01
    assert start_of(one) == pytest.approx(start_of(other), rel=1e-4, abs=1e-7)
    assert_same_student(one, other, 2e-3)


def test_a_head_of_the_experts_own_is_its_own_only(world: Path) -> None:
    make_adapter(world / "adapter", world / "base", target_modules=["q_proj"], modules_to_save=["lm_head"])
    weights = load_file("adapter/adapter_model.safetensors")
    head = next(name for name in weights if "lm_head" in name)
    weights[head] *= 1.5
    from safetensors.torch import save_file

    save_file(weights, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    merged("adapter", "whole")
    one, other = run("expert=adapter", output="one"), run("expert=whole", output="other")
    assert start_of(one)["general"] == 0
    assert start_of(one) == pytest.approx(start_of(other), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("padded", ["base", "expert"])
def test_padded_vocabularies_do_not_matter(world: Path, padded: str) -> None:
    merged("expert", "teacher")
    begin = ["expert=teacher", f"student_from={make_adapter(world / 'begin', world / 'base', size=0.01)}"]
    plain = run(*begin, output="plain")
    model = AutoModelForCausalLM.from_pretrained("base" if padded == "base" else "teacher")
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():  # were the rows of padding read, they would take nearly all of the probability
        model.get_output_embeddings().weight[288:] = 3.0
    model.save_pretrained("wide")
    AutoTokenizer.from_pretrained("base").save_pretrained("wide")
    wide = run(*begin, *(["--base", "wide"] if padded == "base" else ["expert=wide"]))
    assert start_of(wide)["domain"] == pytest.approx(start_of(plain)["domain"], rel=1e-4)
    if padded == "expert":
        torch.testing.assert_close(logits_of(wide), logits_of(plain), rtol=0, atol=1e-4)


def test_the_reference_may_be_another_checkpoint(world: Path) -> None:
    make_adapter(world / "other", world / "base", seed=7)
    merged("other", "reference")
    folder = run("--reference", "reference", "train.max_steps=40", "train.save_steps=0.5")
    assert start_of(folder)["general"] > 0.05
    assert trained_steps(folder)[-1]["general/kl"] < 0.7 * start_of(folder)["general"]
    adapter = run("--reference", "other", output="adapter")
    assert start_of(adapter) == pytest.approx(start_of(folder), rel=1e-4)


def test_experts_are_paired_with_rows_by_name(world: Path) -> None:
    make_adapter(world / "expert2", world / "base", seed=8, size=0.2)
    make_rows(world / "law.jsonl", 9)
    alone = [
        run("train.max_steps=1", output="a"),
        run("expert=expert2", "data.domain=law.jsonl", "train.max_steps=1", output="b"),
    ]
    command = [
        "align", "--base", "base", "--expert", "shop=expert", "--expert", "law=expert2",
        "--general-data", "general.jsonl", "--domain-data", "law=law.jsonl", "--domain-data", "shop=shop.jsonl",
        "--output", "both", "train.max_steps=20", "train.logging_steps=20",
    ]  # fmt: skip
    assert cli.run(command) == 0
    start = start_of(Path("both"))
    assert start["shop"] == pytest.approx(start_of(alone[0])["domain"])
    assert start["law"] == pytest.approx(start_of(alone[1])["domain"])
    assert {"general/kl", "shop/kl", "law/kl"} <= trained_steps(Path("both"))[-1].keys()
    shares = {k: v[0]["share"] for k, v in json.loads(Path("both/provenance.json").read_text())["data"].items()}
    assert shares == pytest.approx({"general": 0.9, "shop": 0.05, "law": 0.05})


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_a_student_goes_on_from_an_earlier_one(world: Path, lora: str) -> None:
    first = run(lora, output="first")
    still = run(lora, "--recipe", recipe("student_from: first"), "train.learning_rate=0", output="still")
    torch.testing.assert_close(logits_of(still), logits_of(first), rtol=0, atol=1e-6)
    assert start_of(still)["general"] > 0
    assert start_of(still)["domain"] < start_of(first)["domain"]
