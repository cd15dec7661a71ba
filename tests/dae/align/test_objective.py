"""The objective of `dae align`, and its eval sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from align_runs import EVEN_SHARES, HELD_OUT, cut, held_out, logits_of, run, start_of, trained_steps
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import FORGETTING


@pytest.mark.parametrize("weights", ["routes", "tokens", "{general: 1.0, domain: 3.0}"])
def test_weights_of_routes(world: Path, weights: str) -> None:
    folder = run(f"weights={weights}", "train.logging_steps=1", *cut(4, 2))
    factors = {"general": 1.0, "domain": 3.0 if weights.startswith("{") else 1.0}
    for line in trained_steps(folder):
        routes = [route for route in factors if f"{route}/loss" in line]
        share = {r: line[f"{r}/tokens"] if weights == "tokens" else factors[r] for r in routes}
        expected = sum(share[r] * line[f"{r}/loss"] for r in routes) / sum(share.values())
        assert line["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("settings", "kl_weight", "ntp_weight"), [(["lambda=0"], 0, 1), (["lambda=0.25"], 0.25, 0.75), (["lambda=1"], 1, 0)]
)
def test_lambda_mixes_divergence_and_next_tokens(
    world: Path, settings: list[str], kl_weight: float, ntp_weight: float
) -> None:
    for line in trained_steps(run(*settings)):
        for route in ("general", "domain"):
            expected = ntp_weight * line[f"{route}/ntp"] + kl_weight * line.get(f"{route}/kl", 0.0)
            assert line[f"{route}/loss"] == pytest.approx(expected, rel=1e-5)


def test_other_divergences_and_temperatures_lead_to_the_teacher_too(world: Path) -> None:
    students = {}
    for number, settings in enumerate(
        [["divergence=reverse_kl"], ["divergence=jsd", "beta=0.3"], ["temperature=2"], ["divergence=forward_kl"]]
    ):
        more = [*settings, *EVEN_SHARES, "train.max_steps=30", "train.logging_steps=10", "train.save_steps=0.5"]
        folder = run(*more, output=f"s{number}")
        assert trained_steps(folder)[-1]["domain/kl"] < 0.5 * start_of(folder)["domain"]
        students[settings[0]] = logits_of(folder)
    plain = students.pop("divergence=forward_kl")
    assert all((logits - plain).abs().max() > 1e-3 for logits in students.values())


def test_the_best_checkpoint_is_published(world: Path) -> None:
    folder = run(*FORGETTING)
    losses = {line["step"]: line["eval_loss"] for line in held_out(folder)}
    assert min(losses, key=lambda step: losses[step]) == 2
    kept = folder / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    assert kept.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["best_step"] == 2
    assert summary["held_out"]["eval_loss"] == losses[2]


def test_held_out_kl_is_that_of_the_definition(world: Path) -> None:
    folder = run("data.eval.domain=heldout_shop.jsonl", "train.max_steps=2")
    tokenizer = AutoTokenizer.from_pretrained("base")
    expert = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "expert").eval().double()
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), str(folder)).eval().double()
    total, tokens = 0.0, 0
    for line in Path("heldout_shop.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p, log_q = (model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (expert, student))
        kl_T = (log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt) - 1 : -1]
        total, tokens = total + float(kl_T.sum()), tokens + len(kl_T)
    assert held_out(folder)[-1]["eval_domain_kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_early_stopping(world: Path) -> None:
    settings = [*HELD_OUT, "early_stopping_patience=2", "train.learning_rate=0", "train.max_steps=40"]
    folder = run(*settings)
    assert [line["step"] for line in held_out(folder)] == [2, 4, 6]
    assert json.loads((folder / "run.json").read_text())["summary"]["steps"] == 6
    finished = (folder / "run.json").stat().st_mtime_ns
    assert run(*settings) == folder
    assert (folder / "run.json").stat().st_mtime_ns == finished
