"""A run of `dae align`: the student, its folder, metrics and provenance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from align_runs import EVEN_SHARES, HELD_OUT, held_out, logits_of, run, start_of, trained_steps
from pico import make_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import align_command

import kd.training.publishing
from dae import cli
from kd.training.verify import verify_saved


def test_the_student_comes_to_match_each_teacher_on_its_rows(world: Path) -> None:
    folder = run(*HELD_OUT, *EVEN_SHARES, "train.max_steps=60", "train.save_steps=0.1")
    last = held_out(folder)[-1]
    assert start_of(folder)["general"] == 0
    assert last["eval_domain_kl"] < 0.4 * start_of(folder)["domain"]
    assert last["eval_general_kl"] < 0.25 * start_of(folder)["domain"]


@pytest.mark.slow
def test_a_run_folder_is_proved_in_a_fresh_process_and_holds_what_others_need(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd.training.publishing, "verify_saved", verify_saved)
    folder = run("--merge", "train.max_steps=4")
    names = {entry.name for entry in folder.iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "environment.json",
        "merged", "metrics.jsonl", "provenance.json", "recipe.yaml", "run.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    torch.testing.assert_close(logits_of(folder / "merged"), logits_of(folder), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token == "</s>"
    assert not [file for file in folder.glob("*") if file.suffix in (".bin", ".pt")]
    assert not [name for name in names if name.startswith(".staging")]


def test_a_result_that_does_not_load_is_not_called_finished(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: Any) -> None:
        raise RuntimeError("the saved model differs from the trained one")

    monkeypatch.setattr(kd.training.publishing, "verify_saved", differs)
    monkeypatch.setattr("tempfile.tempdir", str(world))
    assert cli.run(align_command()) == 3
    assert not Path("student/run.json").exists()


def test_provenance_names_every_model_and_file_by_content(world: Path) -> None:
    folder = run("train.max_steps=2", "data.eval.domain=heldout_shop.jsonl")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["stage"] == "align"
    assert provenance["inputs"].keys() == {"base", "reference", "expert.domain"}
    assert provenance["base"] == {"path": "base", "fingerprint": provenance["inputs"]["base"]}
    files = {
        name: hashlib.sha256(Path(f"{name}.jsonl").read_bytes()).hexdigest()
        for name in ("shop", "general", "heldout_shop")
    }
    expected = {
        "general": [{"path": "general.jsonl", "sha256": files["general"], "share": 0.9}],
        "domain": [{"path": "shop.jsonl", "sha256": files["shop"], "share": 0.1}],
        "eval.domain": [{"path": "heldout_shop.jsonl", "sha256": files["heldout_shop"], "share": None}],
    }
    assert all(len(source.pop("encoded")) == 64 for sources in provenance["data"].values() for source in sources)
    assert provenance["data"] == expected
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["learning_rate"] == 0.01
    assert "arXiv 2406.19112" in (folder / "README.md").read_text()


def test_metrics_tell_each_route(world: Path) -> None:
    folder = run("data.eval.domain=heldout_shop.jsonl")
    assert start_of(folder).keys() == {"general", "domain"}
    for line in trained_steps(folder):
        wanted = {"step", "loss", "learning_rate", "grad_norm", "response_tokens_per_second", "peak_memory_gib"}
        for route in ("general", "domain"):
            wanted |= {f"{route}/{what}" for what in ("loss", "kl", "ntp", "tokens")}
        assert wanted <= line.keys()
        assert line["domain/loss"] == pytest.approx(line["domain/kl"])
        assert line["response_tokens_per_second"] > 0
    assert [line["step"] for line in trained_steps(folder)] == [2, 4, 6, 8, 10, 12]
    for line in held_out(folder):
        assert {"step", "eval_loss", "eval_domain_loss", "eval_domain_kl", "eval_domain_ntp"} <= line.keys()
        assert "eval_general_kl" not in line
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["steps"] == 12
    assert summary["rows"] == {"general": 120, "domain": 120, "eval.domain": 24}


def test_a_far_teacher_is_warned_of(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    far = AutoModelForCausalLM.from_pretrained(make_checkpoint(world / "far", seed=9))
    with torch.no_grad():
        far.lm_head.weight *= 6
    far.save_pretrained("far")
    folder = run("expert=far", "train.max_steps=1")
    assert start_of(folder)["domain"] > 2
    assert "route domain: KL(teacher || student)" in caplog.text
    assert "route general" not in caplog.text


def test_an_adapter_on_the_head(world: Path) -> None:
    folder = run("lora.target_modules=[q_proj, lm_head]", "train.gradient_accumulation_steps=2")
    weights = load_file(folder / "adapter_model.safetensors")
    assert any("lm_head.lora_B" in name and tensor.any() for name, tensor in weights.items())
    assert start_of(folder)["general"] == 0


def test_from_python(world: Path) -> None:
    from dae import AlignRecipe, align

    given = {
        "base": "base",
        "expert": "expert",
        "output": "s",
        "data": {"general": "general.jsonl", "domain": "shop.jsonl"},
    }
    result = align(AlignRecipe.model_validate({**given, "train": {"max_steps": 2}}))
    assert result.path == Path("s")
    assert result.summary["steps"] == 2
