"""A student that starts on the line from the base to its experts."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from align_runs import logits_of, merged, run, start_of
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint
from processes import Signal
from processes import dae as run_dae
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from worlds import align_command, make_adapter, metrics_of

import dae.start
import kd.training.evaluating
from dae import cli
from dae.start import STEPS
from kd.models.line import Pull, described, start_adapter
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


def exchange(kl: dict[str, float], at_base: dict[str, float]) -> float:
    """Nats gained on domain routes for each nat lost on the general route."""
    gained = sum(at_base[route] - value for route, value in kl.items() if route != "general")
    return gained / (kl["general"] - at_base["general"])


def test_auto_goes_as_far_as_the_domain_gains_enough(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dae.start, "EXCHANGE", 1.5)
    student = run("start=auto", *STILL)
    told = json.loads((student / "run.json").read_text())["summary"]["start"]
    weight = told["weights"]["domain"]
    assert 0 < weight < 1
    kl = {point["weights"]["domain"]: point["kl"] for point in told["curve"]}
    assert start_of(student) == pytest.approx(kl[weight], rel=1e-5)
    assert exchange(kl[weight], kl[0.0]) >= 1.5 > exchange(kl[round(weight + 1 / STEPS, 4)], kl[0.0])
    torch.testing.assert_close(logits_of(student), logits_of(linear_merge("expert", weight, "mix")), rtol=0, atol=5e-5)


def test_auto_gives_each_expert_its_own_weight(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dae.start, "EXCHANGE", 1.5)
    make_adapter(world / "near", world / "base", seed=8, size=0.02)
    command = ["--expert", "shop=expert", "--expert", "law=near", "--base", "base", "--output", "both"]
    rows = ["--general-data", "general.jsonl", "--domain-data", "law=shop.jsonl", "--domain-data", "shop=shop.jsonl"]
    assert cli.run(["align", *command, *rows, "start=auto", "lora.rank=16", *STILL]) == 0
    told = json.loads(Path("both/run.json").read_text())["summary"]["start"]
    assert told["weights"]["law"] > told["weights"]["shop"]
    assert exchange(start_of(Path("both")), told["curve"][0]["kl"]) >= 1.5


def test_auto_that_stays_at_the_base_is_the_base(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dae.start, "EXCHANGE", math.inf)
    first = run("train.max_steps=2", output="first")
    second = run("train.max_steps=2", "start=auto", output="second")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_start_is_in_the_card_and_in_the_first_line_of_the_metrics(world: Path) -> None:
    student = run("start=auto", *STILL)
    told = json.loads((student / "run.json").read_text())["summary"]["start"]
    assert metrics_of(student)[0]["start"] == told
    assert told["curve"][0]["weights"] == {"domain": 0.0}
    card = (student / "README.md").read_text()
    assert "## Start" in card and f"On the line from the base to the experts: {described(told['weights'])}." in card
    assert all(f"| {described(point['weights'])} | " in card for point in told["curve"])


@pytest.mark.parametrize("lora", ["lora.rank=8", "lora=null"])
def test_the_teachers_are_asked_once_and_the_curve_is_that_of_starts_given_by_hand(
    world: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    asked: list[int] = []
    original = kd.training.evaluating.teacher_views
    monkeypatch.setattr("kd.training.evaluating.teacher_views", lambda *given: asked.append(1) or original(*given))
    facts = metrics_of(run(lora, *STILL, output="auto"))[0]["start"]
    assert len(facts["curve"]) > 3
    assert len(asked) == 2 * 64 / 8  # batches of 64 rows of both routes
    for point in facts["curve"][:3]:
        by_hand = run(lora, f"start={point['weights']['domain']}", *STILL, output=f"at-{point['weights']['domain']}")
        assert point["kl"] == pytest.approx(start_of(by_hand), rel=1e-5, abs=1e-7)


def test_a_run_that_goes_on_does_not_look_for_its_start_again(world: Path) -> None:
    settings = ("start=auto", "train.max_steps=6", "train.save_steps=2")
    whole = run(*settings, output="whole")
    stop = Signal("kd.training.trainer:RoutedTrainer.training_step", 4, signal.SIGTERM)
    assert run_dae(align_command(*settings, output="stopped"), world, signals=[stop]).status == 143
    again = run_dae(align_command(*settings, output="stopped"), world)
    assert again.status == 0 and "start: " not in again.err
    starts = [
        json.loads((folder / "run.json").read_text())["summary"]["start"] for folder in (world / "stopped", whole)
    ]
    assert starts[0] == starts[1]


def test_a_check_with_weights_shows_where_training_would_start(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", *align_command("start=auto", *STILL), "--weights"]) == 0
    shown = capsys.readouterr().out
    assert not Path("student").exists()
    student = run("start=auto", *STILL)
    weight = json.loads((student / "run.json").read_text())["summary"]["start"]["weights"]["domain"]
    (chosen,) = (line for line in shown.splitlines() if ", chosen" in line)
    assert chosen.startswith(f"{described({'domain': weight})}, chosen")
    assert float(chosen.split()[-1]) == pytest.approx(start_of(student)["domain"], abs=6e-5)
    Path("r.yaml").write_text("base: base\nexpert: expert\ndata: {domain: shop.jsonl, general: general.jsonl}\n")
    assert cli.run(["check", "r.yaml", "--weights"]) == 0
    assert "base" in capsys.readouterr().out.split("start ")[-1]


def test_weights_are_loaded_for_a_check_only(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*align_command(*STILL), "--weights"]) == 2
    assert "dae check align ... --weights" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_auto_places_all_weights_where_it_says(world: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many points it tried before."""
    monkeypatch.setattr(dae.start, "EXCHANGE", 1.5)
    expert = "expert" if kind == "adapter" else str(merged("expert", "whole"))
    student = run(f"expert={expert}", "lora=null", "start=auto", *STILL)
    told = json.loads((student / "run.json").read_text())["summary"]["start"]
    weight = told["weights"]["domain"]
    assert 0 < weight < 1 and len(told["curve"]) > 3
    torch.testing.assert_close(logits_of(student), logits_of(linear_merge(expert, weight, "mix")), rtol=0, atol=5e-5)
    start = full("base")
    moved = torch.cat([(weight - start[name]).flatten() for name, weight in full(str(student)).items()])
    assert told["distance"] == pytest.approx(float(moved.square().mean().sqrt()), rel=0.1)


def test_auto_stays_at_the_base_where_the_student_cannot_go_and_says_why(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_adapter(world / "odd", world / "base", seed=3, use_dora=True)
    first = run("expert=odd", "start=base", "train.max_steps=2", output="first")
    second = run("expert=odd", "train.max_steps=2", output="second")
    assert "start=auto: the student starts at the base, because of this: " in caplog.text
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_expert_of_another_architecture_is_on_no_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(world / "deep", num_hidden_layers=3)
    assert cli.run(align_command("expert=deep", "start=0.5", *STILL, output="refused")) == 2
    assert "no line from the base to this expert" in capsys.readouterr().err


def test_a_learning_rate_far_above_the_starts_is_told(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dae")
    for rate, words in (
        ("1e-4", "suggested learning rate for this start and 2 steps"),
        ("1", "learning_rate 1 is over 3 times the"),
    ):
        run("start=0.3", f"train.learning_rate={rate}", "train.max_steps=2", output=f"rate-{rate}")
        (told,) = (record.getMessage() for record in caplog.records if "for this start and 2 steps" in record.message)
        assert words in told
        caplog.clear()
