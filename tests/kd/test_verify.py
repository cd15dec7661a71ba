"""The saved model is compared by a process that knows nothing of the toolkit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import make_checkpoint, make_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kd.errors import MachineError
from kd.models.roles import LoadSettings
from kd.training.verify import TOLERANCE, verify_saved

IDS = [1, 40, 41, 42, 43, 44, 45, 46]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


def save_adapter(base: Path, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """A LoRA adapter with an effect, and the logits it gives."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(folder))
    return logits_of(adapted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_opened_on_its_base_and_a_forgotten_one_is_noticed(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_checkpoint(tmp_path / "base")
    expected = save_adapter(base, tmp_path / "adapter", dtype)
    settings = LoadSettings(dtype)
    found = verify_saved(tmp_path / "adapter", IDS, expected, settings)
    assert found.relative <= TOLERANCE[found.dtype] / 10
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.scale == pytest.approx(float(expected.float().abs().max()))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(RuntimeError, match=r"the saved model is not the trained one.*of their scale"):
        verify_saved(tmp_path / "adapter", IDS, expected, settings)


def test_a_full_place_for_temporary_files_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(MachineError, match=rf"^{tmp_path}/dae-verify-\S+: the disk is full"):
        verify_saved(tmp_path / "student", IDS, torch.zeros(8, 288), LoadSettings(torch.float32))


@pytest.mark.slow
def test_a_full_checkpoint_is_opened_as_saved_with_the_asked_attention(tmp_path: Path) -> None:
    model = make_model("gemma2")
    model.save_pretrained(tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    found = verify_saved(tmp_path, IDS, expected, LoadSettings(torch.bfloat16, attn_implementation="eager"))
    assert found.dtype == "float32"
    assert found.relative <= TOLERANCE["float32"] / 10
    with pytest.raises(RuntimeError, match="is not the trained one"):
        verify_saved(tmp_path, IDS, expected * float("nan"), LoadSettings(torch.float32))


@pytest.mark.slow
def test_what_does_not_open_or_has_another_vocabulary_says_so(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    expected = torch.zeros(len(IDS), 300)
    with pytest.raises(RuntimeError, match=r"gives logits of shape \[8, 288\], not \[8, 300\]"):
        verify_saved(tmp_path, IDS, expected, LoadSettings(torch.float32))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match=f"{tmp_path}: a fresh process cannot open the saved model"):
        verify_saved(tmp_path, IDS, expected, LoadSettings(torch.float32))


@pytest.mark.slow
def test_a_launchers_variables_and_files_beside_the_caller_do_not_reach_the_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in ("data.py", "torch.py", "losses.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger was imported')")
    monkeypatch.chdir(tmp_path)
    model = make_model("gpt2")
    model.save_pretrained("saved")
    assert verify_saved(Path("saved"), IDS, logits_of(model), LoadSettings(torch.float32)).difference < 1e-5
