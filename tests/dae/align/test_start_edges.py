"""Starts that only some experts allow: layers that they leave alone, mixtures, tied weights, several experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import logits_of, merged, run, start_of
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from worlds import align_command, make_adapter

import dae.start
import kd.models.line
from dae import cli
from kd.models.line import Pull, start_adapter
from kd.models.roles import STUDENT_ADAPTER, Role
from kd.models.summable import forward_keys

STILL = ("train.learning_rate=0", "train.max_steps=1")


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["summary"]
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a run with these settings is refused with."""
    capsys.readouterr()
    assert cli.run(align_command(*words, output="refused")) == 2
    assert not Path("refused").exists()
    return " ".join(capsys.readouterr().err.split())


def save_full(model: Any, folder: str) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("base").save_pretrained(folder)
    return folder


def test_layers_that_a_full_expert_leaves_alone_begin_as_new_ones_and_train(world: Path) -> None:
    make_adapter(world / "queries", world / "base", seed=3, target_modules=["q_proj"])
    merged("queries", "whole")
    fresh = factors(run("expert=whole", "start=base", *STILL, output="fresh"))
    started = factors(run("expert=whole", "start=0.5", *STILL, output="started"))
    trained = factors(run("expert=whole", "start=0.5", "train.max_steps=2", "train.learning_rate=0.01"))
    for name, factor in started.items():
        if "q_proj" not in name:
            torch.testing.assert_close(factor, fresh[name], rtol=0, atol=0)
            assert "lora_B" not in name or trained[name].abs().max() > 1e-3
        elif "lora_A" in name:  # an expert of rank 4 in a student of rank 8
            torch.testing.assert_close(factor[4:], fresh[name][4:], rtol=0, atol=0)
            assert (factor[:4] != fresh[name][:4]).all()
        else:
            assert (factor[:, :4].abs().amax(0) > 1e-3).all() and not factor[:, 4:].any()


def test_a_rank_that_two_adapters_do_not_fill_begins_as_a_new_one() -> None:
    """Two adapters with the same update: rank 3 of 6 concatenated, cut to a student of rank 5."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False))
    config = LoraConfig(r=5, target_modules=["0"])
    student = Role("student", get_peft_model(model, config, STUDENT_ADAPTER), STUDENT_ADAPTER)
    layer = student.model.base_model.model[0]
    for name in ("one", "two"):
        student.model.add_adapter(name, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    layer.lora_A["two"].weight.data.copy_(layer.lora_A["one"].weight)
    layer.lora_B["two"].weight.data.copy_(layer.lora_B["one"].weight)
    fresh = layer.lora_A[STUDENT_ADAPTER].weight.detach().clone()
    pulls = [Pull(Role(name, student.model, name), 0.5) for name in ("one", "two")]
    assert start_adapter(student, pulls).share == pytest.approx(1, abs=1e-6)
    ours = layer.get_delta_weight(STUDENT_ADAPTER)
    torch.testing.assert_close(ours, layer.get_delta_weight("one"), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.lora_A[STUDENT_ADAPTER].weight[3:], fresh[3:], rtol=0, atol=0)


def test_rows_of_an_adapter_that_are_0_in_both_factors_are_no_part_of_the_start() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=False))
    student = Role(
        "student", get_peft_model(model, LoraConfig(r=4, target_modules=["0"]), STUDENT_ADAPTER), STUDENT_ADAPTER
    )
    layer = student.model.base_model.model[0]
    student.model.add_adapter("one", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    layer.lora_A["one"].weight.data[1] = 0
    layer.lora_B["one"].weight.data[:, 1] = 0
    fresh = layer.lora_A[STUDENT_ADAPTER].weight.detach().clone()
    start_adapter(student, [Pull(Role("one", student.model, "one"), 0.5)])
    torch.testing.assert_close(layer.lora_A[STUDENT_ADAPTER].weight[2:], fresh[2:], rtol=0, atol=0)
    torch.testing.assert_close(
        layer.get_delta_weight(STUDENT_ADAPTER), 0.5 * layer.get_delta_weight("one"), rtol=0, atol=1e-6
    )


def test_an_expert_with_the_bases_weights_is_told_and_the_student_trains(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained("base")
    model.config.my_note = "another fingerprint"
    save_full(model, "twin")
    student = run("expert=twin", "reference=expert", "start=0.5", "train.max_steps=2", "train.learning_rate=0.01")
    assert "have the base's weights, so the student starts at the base" in caplog.text
    assert all(factor.any() for name, factor in factors(student).items() if "lora_B" in name)


def test_a_matrix_is_decomposed_once_for_all_points(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged("expert", "whole")
    decomposed: list[int] = []
    original = kd.models.line.low_rank
    monkeypatch.setattr(kd.models.line, "low_rank", lambda *given: decomposed.append(1) or original(*given))
    student = run("expert=whole", "start=auto", *STILL, output="auto")
    facts = summary_of(student)["start"]
    assert len(facts["curve"]) > 3 and len(decomposed) == len(factors(student)) / 2
    for point in facts["curve"][1:4]:
        weight = point["weights"]["domain"]
        by_hand = run("expert=whole", f"start={weight}", *STILL, output=f"at-{weight}")
        assert point["kl"] == pytest.approx(start_of(by_hand), rel=1e-5, abs=1e-7)


def test_a_mixture_whose_experts_are_adapted_takes_no_full_expert(
    world: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(world / "mixture", "mixtral")
    make_checkpoint(world / "whole", "mixtral", seed=1)
    models = ("base=mixture", "expert=whole")
    told = refused(capsys, *models, "start=0.3", *STILL)
    assert "start: expert.domain: is a full checkpoint, and the student's adapter is on parameters of" in told
    assert "lora.target_modules" in told and "lora=null" in told
    run(*models, *STILL, output="auto")
    assert "start=auto: the student starts at the base, because of this: start: expert.domain" in caplog.text
    student = run(*models, "start=1", "lora=null", *STILL)
    torch.testing.assert_close(logits_of(student), logits_of(Path("whole")), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_tied_base_cannot_take_two_differences_at_once(
    world: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make_checkpoint(world / "tied", tie_word_embeddings=True)
    if kind == "adapter":
        make_adapter(world / "other", world / "tied", seed=3, target_modules=["q_proj", "lm_head"])
    else:
        model = AutoModelForCausalLM.from_pretrained("tied")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
        model.config.tie_word_embeddings = False
        save_full(model, "other")
    told = refused(capsys, "base=tied", "expert=other", "start=0.5", "lora=null", *STILL)
    assert "changes model.embed_tokens.weight and lm_head.weight differently, and the base ties them" in told


def test_a_tied_base_takes_the_difference_of_a_tied_expert(world: Path) -> None:
    make_checkpoint(world / "tied", tie_word_embeddings=True)
    make_checkpoint(world / "other", tie_word_embeddings=True, seed=1)
    student = run("base=tied", "expert=other", "start=1", "lora=null", *STILL)
    torch.testing.assert_close(logits_of(student), logits_of(Path("other")), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.5), ("rope_theta", 10.0)])
def test_an_expert_with_another_forward_pass_is_on_no_line(
    world: Path, capsys: pytest.CaptureFixture[str], key: str, value: float
) -> None:
    make_checkpoint(world / "whole", **{key: value})
    told = refused(capsys, "expert=whole", "start=0.5", *STILL)
    assert "start: expert.domain: its config has r" in told and "and the base's" in told and "use start=base" in told


@pytest.mark.parametrize(
    ("family", "file"),
    [
        ("qwen2", {"use_mrope": False, "attention_dropout": 0.1, "max_position_embeddings": 64}),
        ("llama", {"layer_types": ["full_attention"] * 2, "head_dim": 4, "rope_theta": 10000.0, "note": "mine"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 10000.0,
                                       "partial_rotary_factor": 1.0}}),
        ("gemma2", {"hidden_act": "gelu", "initializer_range": 0.5}),
    ],
)  # fmt: skip
def test_what_a_config_says_beside_the_forward_pass_is_no_difference(
    tmp_path: Path, family: str, file: dict[str, Any]
) -> None:
    """Keys that files have and no model reads, that only training reads, or that are given as they are implied."""
    make_checkpoint(tmp_path / "base", family)
    make_checkpoint(tmp_path / "expert", family)
    written = tmp_path / "expert" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | file))
    ours, theirs = (AutoConfig.from_pretrained(tmp_path / name) for name in ("base", "expert"))
    assert [key for key, (one, other) in forward_keys(ours, theirs).items() if one != other] == []


def test_heads_are_part_of_the_forward_pass(tmp_path: Path) -> None:
    """By whatever name: GPT-2 calls their number n_head, and its weights' shapes do not have it."""
    for name, heads in (("base", 4), ("expert", 2)):
        make_checkpoint(tmp_path / name, "gpt2", n_head=heads)
    ours, theirs = (AutoConfig.from_pretrained(tmp_path / name) for name in ("base", "expert"))
    assert {key: both for key, both in forward_keys(ours, theirs).items() if both[0] != both[1]} == {"n_head": (4, 2)}


def two_experts(*settings: str, output: str) -> list[str]:
    command = ["align", "--base", "base", "--expert", "shop=expert", "--expert", "law=odd", "--output", output]
    rows = ["--general-data", "general.jsonl", "--domain-data", "law=shop.jsonl", "--domain-data", "shop=shop.jsonl"]
    return [*command, *rows, *STILL, *settings]


def test_auto_leaves_out_the_one_expert_that_cannot_be_summed(
    world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dae.start, "EXCHANGE", 1.0)
    make_adapter(world / "odd", world / "base", seed=3, use_dora=True)
    assert cli.run(two_experts("lora.rank=4", output="both")) == 0
    facts = summary_of(Path("both"))["start"]
    assert facts["weights"]["law"] == 0 and facts["weights"]["shop"] > 0
    assert all(point["weights"]["law"] == 0 for point in facts["curve"])
    assert "start=auto: expert law gets weight 0, because of this: start: expert.law: " in caplog.text
    assert cli.run(two_experts("lora.rank=4", f"start.shop={facts['weights']['shop']}", output="by-hand")) == 0
    assert start_of(Path("both")) == pytest.approx(start_of(Path("by-hand")), rel=1e-6)


def test_a_share_decides_what_a_source_counts_before_the_first_step(world: Path) -> None:
    """The KL of two sources of a route is between those of each, nearer to that of the larger share."""

    def measured(*general: tuple[str, float]) -> float:
        sources = ", ".join(f"{{path: {path}, share: {share}}}" for path, share in general)
        settings = ["data.domain.0.share=0.2", f"data.general=[{sources}]"]
        name = "-".join(f"{path}{share}" for path, share in general).replace(".", "")
        return start_of(run("start=0.5", *settings, *STILL, output=name))["general"]

    one, two = measured(("general.jsonl", 0.8)), measured(("shop.jsonl", 0.8))
    mostly_one = measured(("general.jsonl", 0.72), ("shop.jsonl", 0.08))
    mostly_two = measured(("general.jsonl", 0.08), ("shop.jsonl", 0.72))
    low, high = sorted((one, two))
    assert low < min(mostly_one, mostly_two) and max(mostly_one, mostly_two) < high
    assert abs(mostly_one - one) < 0.25 * abs(two - one)
    assert abs(mostly_two - two) < 0.25 * abs(two - one)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"use_dora": True}, "has a magnitude (use_dora)"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "is kept whole (modules_to_save)"),
        ({"trainable_token_indices": [5]}, "is trained by rows (trainable_token_indices)"),
    ],
)
def test_a_check_knows_from_the_config_what_the_run_would_refuse(
    world: Path, capsys: pytest.CaptureFixture[str], adapter: dict[str, Any], words: str
) -> None:
    make_adapter(world / "odd", world / "base", seed=3, **adapter)
    command = align_command("expert=odd", "start=0.5", *STILL)
    assert cli.run(["check", *command]) == 2
    assert f"start: expert.domain: {words}" in " ".join(capsys.readouterr().err.split())
    assert cli.run(["check", *align_command("expert=odd", "start=0", *STILL)]) == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("start=true", "start=true: expected base, auto, or a weight for each expert, such as {ecom: 0.4}"),
        ("start.domain=true", "start.domain=true: expected a number"),
        ("start.domain='0.3'", "start.domain='0.3': expected a number"),
        ("start.domain=.nan", "start.domain=.nan: expected a finite number"),
        ("budget=0.02", "budget=0.02: expected nats per token for a route, such as budget.general=0.02"),
        ("budget.general=.inf", "budget.general=.inf: expected a finite number"),
    ],
)
def test_one_mistake_is_one_line_with_the_key_as_it_was_typed(
    world: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    assert refused(capsys, setting) == f"dae align: {words}"


def test_one_weight_for_several_experts(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(world / "odd", world / "base", seed=3)
    assert cli.run(two_experts("start=0.5", output="both")) == 2
    assert "a single number works with one expert only; write start.NAME=0.4 for each expert" in capsys.readouterr().err


def test_prompts_without_answers_are_pointed_to_sampling(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "KETTLE COSTS"}\n')
    told = refused(capsys, "data.domain.0.path=prompts.jsonl")
    assert "let a model answer prompts: dae sample --model MODEL --prompts FILE --output ROWS" in told


@pytest.mark.parametrize(
    ("changed", "student", "remedy"),
    [
        ("lm_head", "[q_proj]", "most is lost at lm_head.weight: adapt that, too (lora.target_modules)"),
        ("embed_tokens", "[q_proj, embed_tokens]", "most is lost at model.embed_tokens: train all weights (lora=null)"),
        ("q_proj", "[q_proj]", "q_proj: raise lora.rank"),
    ],
)
def test_what_an_adapter_loses_most_is_named_with_a_remedy_that_helps(
    world: Path, capsys: pytest.CaptureFixture[str], changed: str, student: str, remedy: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained("base")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if changed in name:
                weight.add_(torch.randn_like(weight))
    expert = f"expert={save_full(model, 'whole')}"
    told = refused(capsys, expert, "start=0.5", "lora.rank=1", f"lora.target_modules={student}")
    assert remedy in told and "start: expert.domain: the student's adapter can take only" in told
