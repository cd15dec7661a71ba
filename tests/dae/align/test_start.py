"""A student that starts on the line from the base to its experts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from align_runs import logits_of, merged, run, start_of
from peft import LoraConfig, get_peft_model
from processes import Signal
from processes import dae as run_dae
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from worlds import align_command, make_adapter

import dae.start
from dae import cli
from dae.start import GENERAL_KL, STEPS
from kd.models.line import Pull, start_adapter
from kd.models.roles import STUDENT_ADAPTER, Role

STILL = ("train.learning_rate=0", "train.max_steps=1")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def linear_merge(expert: str, weight: float, output: str) -> Path:
    command = ["merge", "weights", "--method", "linear", "--base", "base", "--expert", expert]
    assert cli.run([*command, "--output", output, f"weight={weight}"]) == 0
    return Path(output)


@pytest.mark.parametrize("lora", ["lora.rank=8", "lora=null"])
def test_weight_0_is_the_start_from_the_base_bit_for_bit(world: Path, lora: str) -> None:
    first = run(lora, "train.max_steps=3", output="first")
    second = run(lora, "train.max_steps=3", "start.domain=0", output="second")
    name = "model.safetensors" if lora == "lora=null" else "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("lora", ["lora.rank=8", "lora=null"])
def test_weight_1_is_the_expert(world: Path, lora: str) -> None:
    student = run(lora, "start=1", *STILL)
    torch.testing.assert_close(logits_of(student), logits_of(Path("expert")), rtol=0, atol=2e-5)
    assert start_of(student)["domain"] == pytest.approx(0, abs=1e-6)
    assert start_of(student)["general"] > 0.01


@pytest.mark.parametrize("lora", ["lora.rank=8", "lora=null"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_start_is_mergekits_linear_merge(world: Path, lora: str, kind: str) -> None:
    expert = "expert" if kind == "adapter" else str(merged("expert", "whole"))
    student = run(f"expert={expert}", lora, "start=0.3", *STILL)
    torch.testing.assert_close(logits_of(student), logits_of(linear_merge(expert, 0.3, "mix")), rtol=0, atol=5e-5)
    told = json.loads((student / "run.json").read_text())["summary"]["start"]
    assert told["weights"] == {"domain": 0.3}
    if lora != "lora=null":
        assert told["energy_kept"] == pytest.approx(1, abs=1e-4)


def test_two_experts_are_summed_in_one_adapter(world: Path) -> None:
    make_adapter(world / "other", world / "base", seed=8, r=3, lora_alpha=7)
    command = ["--expert", "shop=expert", "--expert", "law=other", "--base", "base", "--output", "both"]
    rows = ["--general-data", "general.jsonl", "--domain-data", "law=shop.jsonl", "--domain-data", "shop=shop.jsonl"]
    start = ["start.shop=0.5", "start.law=0.25", "lora.rank=16", "lora.alpha=5"]
    assert cli.run(["align", *command, *rows, *start, *STILL]) == 0
    base = {name: weight.clone() for name, weight in full("base").items()}
    for expert, weight in (("expert", 0.5), ("other", 0.25)):
        theirs = full(str(merged(expert, f"merged-{expert}")))
        for name, start_weight in full("base").items():
            base[name] += weight * (theirs[name] - start_weight)
    ours = full(str(merged("both", "merged-both")))
    for name, expected in base.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-6)


def full(folder: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_smaller_rank_takes_the_nearest_update(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])
    student = Role("student", get_peft_model(model, config, STUDENT_ADAPTER), STUDENT_ADAPTER)
    wide = LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False)
    student.model.add_adapter("teacher", wide)
    energy = start_adapter(student, [Pull(Role("expert", student.model, "teacher"), 0.4)])
    layer = student.model.base_model.model.model.layers[0].self_attn.q_proj
    whole = 0.4 * layer.get_delta_weight("teacher")
    u, s, v = torch.linalg.svd(whole)
    nearest = u[:, :2] * s[:2] @ v[:2]
    torch.testing.assert_close(layer.get_delta_weight(STUDENT_ADAPTER), nearest, rtol=0, atol=1e-6)
    assert 0.3 < energy.share < 1


@pytest.mark.parametrize(
    ("expert", "more", "words"),
    [
        ({"use_dora": True}, (), "has a magnitude (use_dora)"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, (), "is kept whole"),
        ({"r": 16}, ("lora.rank=1",), "squared difference"),
        ({"target_modules": ["q_proj"]}, ("lora.target_modules=[v_proj]",), "0%"),
    ],
)
def test_what_a_start_cannot_take_is_refused_by_name(
    world: Path, capsys: pytest.CaptureFixture[str], expert: dict, more: tuple[str, ...], words: str
) -> None:
    make_adapter(world / "odd", world / "base", seed=3, **expert)
    command = ["align", "--base", "base", "--expert", "odd", "--general-data", "general.jsonl"]
    command += ["--domain-data", "shop.jsonl", "--output", "refused", "start=0.5", *more, *STILL]
    assert cli.run(command) == 2
    told = capsys.readouterr().err
    assert "start" in told and words in told


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("start=0.5x", "start"),
        ("start.shop=0.5", "start.shop"),
        ("start.domain=1.5", "start.domain"),
        ("start.domain=-0.1", "start.domain"),
        ("start.domain=.nan", "start.domain"),
    ],
)
def test_wrong_starts(world: Path, capsys: pytest.CaptureFixture[str], start: str, words: str) -> None:
    command = ["align", "--base", "base", "--expert", "expert", "--general-data", "general.jsonl"]
    assert cli.run([*command, "--domain-data", "shop.jsonl", "--output", "refused", start]) == 2
    assert words in capsys.readouterr().err
    assert not Path("refused").exists()


def test_a_started_student_resumes_to_the_same_bits(world: Path) -> None:
    whole = run("start=0.4", "train.max_steps=6", output="whole")
    command = align_command("start=0.4", "train.max_steps=6", output="stopped")
    stop = Signal("kd.training.trainer:RoutedTrainer.training_step", 4, signal.SIGTERM)
    assert run_dae(command, world, signals=[stop]).status == 143
    assert run_dae(command, world).status == 0
    assert weights(world / "stopped").keys() == weights(whole).keys()
    assert (world / "stopped" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


def test_auto_goes_as_far_as_the_general_route_allows(world: Path) -> None:
    student = run("start=auto", *STILL)
    told = json.loads((student / "run.json").read_text())["summary"]["start"]
    weight = told["weights"]["domain"]
    kl = {point["weights"]["domain"]: point["kl"]["general"] for point in told["curve"]}
    assert start_of(student)["general"] == pytest.approx(kl[weight], rel=1e-5) if weight else True
    assert kl.get(weight, 0.0) <= GENERAL_KL
    assert weight == 1 or kl[round(weight + 1 / STEPS, 4)] > GENERAL_KL
    torch.testing.assert_close(logits_of(student), logits_of(linear_merge("expert", weight, "mix")), rtol=0, atol=5e-5)


def test_auto_gives_each_expert_its_own_weight(world: Path) -> None:
    make_adapter(world / "near", world / "base", seed=8, size=0.02)
    command = ["--expert", "shop=expert", "--expert", "law=near", "--base", "base", "--output", "both"]
    rows = ["--general-data", "general.jsonl", "--domain-data", "law=shop.jsonl", "--domain-data", "shop=shop.jsonl"]
    assert cli.run(["align", *command, *rows, "start=auto", "lora.rank=16", *STILL]) == 0
    weights = json.loads(Path("both/run.json").read_text())["summary"]["start"]["weights"]
    assert weights["law"] > weights["shop"]
    assert start_of(Path("both"))["general"] <= GENERAL_KL


def test_auto_that_stays_at_the_base_is_the_base(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dae.start, "GENERAL_KL", 0.0)
    first = run("train.max_steps=2", output="first")
    second = run("train.max_steps=2", "start=auto", output="second")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
