"""`dae merge to-lora`: exact where the rank suffices, else the nearest of it; what is lost is told and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pico import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_adapter, make_rows

import dae.alignment
import kd.training.publishing
from dae import cli
from dae.merging.recipe import ToLoraRecipe
from dae.merging.to_lora import low_rank, what_is_kept
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.roles import LoadSettings
from kd.runs.provenance import base_fingerprint_of

IDS = torch.tensor([[5, 60, 70, 80, 90, 100, 110, 120, 130, 31, 41, 59]])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # a fresh process takes seconds
    return tmp_path


def make_pair(world: Path, family: str = "llama", rank: int = 4, **settings: Any) -> None:
    """reference, and expert: the reference with a LoRA of this rank merged into its weights."""
    make_checkpoint(world / "reference", family, **settings)
    make_adapter(world / "lora", world / "reference", r=rank)
    merge_adapter("lora", "expert")


def merge_adapter(adapter: str, target: str) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("reference"), adapter)
    model.merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained("reference").save_pretrained(target)


def change(folder: str, name: str, difference: Tensor | float) -> None:
    """Move one tensor of a checkpoint."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] + difference}, file, metadata={"format": "pt"})


def command(*more: str, output: str = "found") -> list[str]:
    return ["merge", "to-lora", "--reference", "reference", "--expert", "expert", "--output", output, *more]


def summary_of(output: str = "found") -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((Path(output) / "run.json").read_text())["summary"]
    return summary


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def with_adapter(adapter: str) -> Tensor:
    """Logits of reference and adapter, by plain transformers and peft."""
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("reference"), adapter))


@pytest.mark.parametrize(
    ("family", "asked"),
    [("llama", "--rank=4"), ("llama", "--energy=0.999999"), ("qwen2", "--rank=4"), ("gpt2", "--rank=4")],
)
def test_a_lora_merged_into_full_weights_comes_back(world: Path, family: str, asked: str) -> None:
    make_pair(world, family)
    assert cli.run(command(asked)) == 0
    expert, reference = (logits_of(AutoModelForCausalLM.from_pretrained(name)) for name in ("expert", "reference"))
    assert float((expert - reference).abs().max()) > 0.1
    torch.testing.assert_close(with_adapter("found"), expert, rtol=0, atol=2e-5 * float(expert.abs().max()))
    summary = summary_of()
    assert summary["energy_kept"] == pytest.approx(1, abs=1e-6)
    assert summary["rank"]["highest"] == 4
    assert summary["left_out_share"] == 0


def test_what_is_cut_off_is_the_smallest_part_of_each_matrix(world: Path) -> None:
    """Against numpy's decomposition in float64."""
    make_checkpoint(world / "reference")
    make_checkpoint(world / "expert", seed=1)
    assert cli.run(command("--rank=3", "min_energy=0", "max_left_out=1")) == 0
    reference, expert = (load_file(Path(name) / "model.safetensors") for name in ("reference", "expert"))
    found = load_file("found/adapter_model.safetensors")
    kept = whole = 0.0
    for name in (name for name in reference if name.endswith("_proj.weight")):
        u, s, v = np.linalg.svd((expert[name] - reference[name]).double().numpy(), full_matrices=False)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        update = (found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]).double().numpy()
        np.testing.assert_allclose(update, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
        kept, whole = kept + (s[:3] ** 2).sum(), whole + (s**2).sum()
    summary = summary_of()
    assert summary["energy_kept"] == pytest.approx(kept / whole, rel=1e-5)
    left = sum(float((expert[n] - reference[n]).double().square().sum()) for n in reference if "_proj" not in n)
    assert summary["left_out_share"] == pytest.approx(left / (left + whole), rel=1e-5)
    norm = float((expert["lm_head.weight"] - reference["lm_head.weight"]).double().norm())
    assert summary["left_out"]["output layer"] == pytest.approx(norm, rel=1e-5)


def test_energy_takes_the_lowest_rank_that_keeps_it() -> None:
    """Singular values 3, 2, 1: squares 9, 4, 1 of 14."""
    u_33, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    difference = u_33 @ torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    ranks = {share: len(low_rank(difference, None, share).a_RI) for share in (0.5, 9 / 14 - 0.01, 0.7, 0.92, 0.94, 1.0)}
    assert ranks == {0.5: 1, 9 / 14 - 0.01: 1, 0.7: 2, 0.92: 2, 0.94: 3, 1.0: 3}
    two = low_rank(difference, 2, None)
    assert (two.kept, two.whole) == (pytest.approx(13), pytest.approx(14))
    assert what_is_kept({"a.q": two, "b.q": low_rank(difference, 1, None)}, {"norms": 4.0}) == {
        "energy_kept": pytest.approx(22 / 28),
        "by_kind": {"q": pytest.approx(22 / 28)},
        "matrices": 2,
        "rank": {"lowest": 1, "highest": 2},
        "left_out": {"norms": 2.0},
        "left_out_share": pytest.approx(4 / 32),
    }


def test_matrices_that_did_not_move_get_no_adapter(world: Path) -> None:
    make_checkpoint(world / "reference")
    make_checkpoint(world / "expert")
    change("expert", "model.layers.1.mlp.up_proj.weight", torch.ones(32, 16))
    assert cli.run(command("--rank=8")) == 0
    assert json.loads(Path("found/adapter_config.json").read_text())["target_modules"] == ["model.layers.1.mlp.up_proj"]
    expert = logits_of(AutoModelForCausalLM.from_pretrained("expert"))
    torch.testing.assert_close(with_adapter("found"), expert, rtol=0, atol=1e-4)


def test_bfloat16_checkpoints_are_decomposed_in_float32(world: Path) -> None:
    make_checkpoint(world / "reference", dtype=torch.bfloat16)
    make_checkpoint(world / "expert", seed=1, dtype=torch.bfloat16)
    assert cli.run(command("--energy=1", "max_left_out=1")) == 0
    found = load_file("found/adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    reference, expert = (load_file(Path(name) / "model.safetensors") for name in ("reference", "expert"))
    name = "model.layers.0.self_attn.q_proj"
    update = found[f"base_model.model.{name}.lora_B.weight"] @ found[f"base_model.model.{name}.lora_A.weight"]
    exact = expert[f"{name}.weight"].float() - reference[f"{name}.weight"].float()
    torch.testing.assert_close(update, exact, rtol=0, atol=1e-5)


def test_the_expert_shares_the_backbone_in_align(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pair(world)
    assert cli.run(command("--rank=4")) == 0
    assert base_fingerprint_of("found") == checkpoint("reference").fingerprint
    loaded: list[str] = []
    real = dae.alignment.load_model

    def counted(source: Checkpoint, settings: LoadSettings) -> Any:
        loaded.append(str(source))
        return real(source, settings)

    monkeypatch.setattr(dae.alignment, "load_model", counted)
    for seed, name in enumerate(("shop", "general")):
        make_rows(world / f"{name}.jsonl", seed)
    align = ["align", "--base", "reference", "--expert", "found", "--domain-data", "shop.jsonl"]
    align += ["--general-data", "general.jsonl", "--output", "student", "train.max_steps=2"]
    assert cli.run(align) == 0
    assert loaded == ["reference"]


def test_the_folder_tells_what_was_carried(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(world)
    change("expert", "model.norm.weight", 0.01)
    assert cli.run(command("--rank=4")) == 0
    said = capsys.readouterr().out
    assert "found: finished, 14 matrices, rank 4 to 4, 100.00% of their squared difference kept" in said
    assert "norms 0.04" in said
    assert len(said.splitlines()) == 1 + 7 + 1  # seven kinds of matrix
    card = Path("found/README.md").read_text()
    assert "library_name: peft" in card and "A LoRA adapter on `reference`" in card
    provenance = json.loads(Path("found/provenance.json").read_text())
    assert (provenance["stage"], provenance["base"]["path"]) == ("merge", "reference")
    assert provenance["inputs"] == {
        "base": checkpoint("reference").fingerprint,
        "expert": checkpoint("expert").fingerprint,
    }


def test_two_runs_write_the_same_adapter(world: Path) -> None:
    make_pair(world)
    for output in ("first", "second"):
        assert cli.run(command("--rank=2", "min_energy=0", output=output)) == 0
    assert checkpoint("first").fingerprint == checkpoint("second").fingerprint


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert cli.run(command(*more)) == 2
    assert not Path("found").exists()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("dae merge: ")
    return message


def test_too_low_a_rank_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(world)
    message = refusal(capsys, "--rank=1")
    assert "rank 1 keeps" in message and "min_energy (0.9)" in message
    assert "q_proj" in message
    assert cli.run(command("--rank=1", "min_energy=0.1")) == 0


def test_too_much_where_no_lora_goes_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(world)
    change("expert", "model.embed_tokens.weight", 0.5)
    message = refusal(capsys, "--rank=4")
    assert "(norms: embeddings" in message and "max_left_out (0.1)" in message


def test_an_adapter_is_no_full_expert(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pair(world)
    assert "expert: lora: is already an adapter" in refusal(capsys, "--rank=4", "--expert", "lora")
    assert "reference: lora: is an adapter" in refusal(capsys, "--rank=4", "--reference", "lora")
    assert "expert reference: is identical" in refusal(capsys, "--rank=4", "--expert", "reference")


def test_the_experts_of_a_mixture_are_refused_by_name(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(world / "reference", "mixtral")
    make_checkpoint(world / "expert", "mixtral", seed=1)
    assert "model.layers.0.mlp.experts.gate_up_proj is [2, 64, 16]" in refusal(capsys, "--rank=4")


def test_another_architecture_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(world / "reference")
    make_checkpoint(world / "expert", "mistral")
    assert "expert expert: is a MistralForCausalLM, but reference is a Llama" in refusal(capsys, "--rank=4")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "rank: is required: add --rank, or --energy"),
        (["--rank=4", "--energy=0.9"], "--energy: energy = 0.9: "),
        (["--energy=1.5"], "must be at most 1"),
        (["--energy=0.5"], "add min_energy=0.5"),
        (["--rank=0"], "must be at least 1"),
    ],
)
def test_rank_and_energy(world: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    assert words in refusal(capsys, *more)


def test_the_thresholds_are_those_that_are_documented() -> None:
    recipe = ToLoraRecipe(reference="r", expert="e", rank=4, output="o")
    assert (recipe.min_energy, recipe.max_left_out) == (0.9, 0.1)
