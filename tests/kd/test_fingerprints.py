"""What a run records of models, rows and machine; and files that are whole or as before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd.data.fingerprint import data_sha256
from kd.errors import MachineError, UserError
from kd.models.checkpoint import checkpoint
from kd.models.checkpoint_files import check_safetensors, model_fingerprint
from kd.runs.environment import environment, masked
from kd.runs.files import append_lines, cut_torn_line, file_sha256, whole_lines, write_text_durably

REPOSITORY = Path(__file__).parents[2]

# -- fingerprints ------------------------------------------------------------------------------------------------------


def safetensors_bytes(data: bytes) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def make_model_folder(folder: Path, data: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(data))
    return folder


def test_fingerprint_is_what_sha256sum_gives_and_follows_weights_and_config_only(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    fingerprint = model_fingerprint(folder)
    command = "LC_ALL=C sha256sum config.json model.safetensors | sha256sum"
    assert fingerprint == subprocess.check_output(command, shell=True, cwd=folder, text=True).split()[0]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / "merged.safetensors").write_bytes(safetensors_bytes(b"something beside it"))
    assert model_fingerprint(folder.rename(tmp_path / "moved")) == fingerprint
    (tmp_path / "moved" / "config.json").write_text('{"a": 1}')
    assert model_fingerprint(tmp_path / "moved") != fingerprint
    assert model_fingerprint(make_model_folder(tmp_path / "other", b"weighty")) != fingerprint


def test_sharded_checkpoints_and_adapters_have_fingerprints(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    with pytest.raises(UserError, match=r"lists model-00002-of-00002\.safetensors, which is missing"):
        model_fingerprint(folder)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(safetensors_bytes(b"more"))
    before = model_fingerprint(folder)
    second.write_bytes(safetensors_bytes(b"MORE"))
    assert model_fingerprint(folder) != before
    index.write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    with pytest.raises(UserError, match="no safetensors file beside it"):
        model_fingerprint(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(b"lora"))
    adapter = model_fingerprint(folder)
    second.unlink()
    assert model_fingerprint(folder) == adapter


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"pickled \(pytorch_model.bin\).*save_pretrained"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, r"pickled \(adapter_model.bin\)"),
        ({"config.json": b"{}"}, r"has config.json but no model.safetensors"),
        ({"config.json": b"{}", "training_args.bin": b"x"}, r"has config.json but no model.safetensors"),
        ({"readme": b"hello"}, "neither config"),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs"}, "git-lfs pull|git lfs pull"),
        ({"config.json": b"{}", "model.safetensors": b""}, "truncated or invalid"),
        ({"config.json": b"{}", "model.safetensors": safetensors_bytes(b"abc")[:-1]}, "bytes where its header says"),
        ({"config.json": b"{}", "provenance.json": b'{"toolkit": "dae-align"}'}, "this run has not finished"),
    ],
)
def test_what_cannot_be_read_safely_and_whole_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        model_fingerprint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_real_safetensors_files_pass_the_size_check(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    half = torch.zeros(3, dtype=torch.bfloat16)
    for number, tensors in enumerate([{}, {"a": half}, {"a": half, "b": torch.ones(2), "c": torch.zeros(0)}]):
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata={"format": "pt"})
        check_safetensors(tmp_path / f"{number}.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nobody/no-such-model-here", "a/b/c"])
def test_a_model_that_cannot_be_had_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^{name}: no such folder"):
        checkpoint(name)


def test_hub_ids_resolve_to_their_cached_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    snapshot = make_model_folder(cached / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checkpoint("some/model").fingerprint == model_fingerprint(snapshot)


def test_data_fingerprints(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    assert data_sha256(rows) == file_sha256(rows) == hashlib.sha256(rows.read_bytes()).hexdigest()
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "data-0.arrow").write_bytes(b"rows")
    before = data_sha256(folder)
    (folder / "cache-1234.arrow").write_bytes(b"left by reading")
    assert data_sha256(folder) == before
    (folder / "data-0.arrow").write_bytes(b"Rows")
    assert data_sha256(folder) != before
    with pytest.raises(UserError, match=r"nowhere.jsonl: "):
        data_sha256("runs/nowhere.jsonl")


def test_a_hub_data_set_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(UserError, match=r"nobody/no-such-rows: .*hub data set"):
        data_sha256("nobody/no-such-rows")
    found = []
    for commit in ("abc", "abd", "abc"):
        builder = SimpleNamespace(hash=commit)
        monkeypatch.setattr(datasets, "load_dataset_builder", {"some/rows": builder}.__getitem__)
        found.append(data_sha256("some/rows"))
    assert found[0] == found[2] != found[1]


# -- environment -------------------------------------------------------------------------------------------------------


def test_secrets_of_the_command_line_are_masked() -> None:
    command = [
        "dae", "align", "--hub-token", "hf_abcdefghijk", "train.hub_token=abc", "--seed", "7", "--api-key=xyz",
        "https://me:pw@host/x", "--note", "sk-abcdefghijklm", "train.max_new_tokens=5",
        "--compare", "next-token=runs/ntp",
    ]  # fmt: skip
    assert masked(command) == [
        "dae", "align", "--hub-token", "***", "train.hub_token=***", "--seed", "7", "--api-key=***",
        "https://***@host/x", "--note", "***", "train.max_new_tokens=5",
        "--compare", "next-token=runs/ntp",
    ]  # fmt: skip


def test_the_environment_holds_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_seen")
    monkeypatch.setenv("SOME_PLAIN_NAME", "not-for-publishing")
    facts = environment(["dae", "align"])
    text = json.dumps(facts)
    assert "never_to_be_seen" not in text
    assert "not-for-publishing" not in text
    assert facts["libraries"].keys() >= {"torch", "transformers", "peft"}
    assert facts["torch"]["threads"] >= 1
    assert facts["command"] == ["dae", "align"]


def test_importing_runs_imports_no_torch() -> None:
    script = "import sys, kd.runs.run_folder; print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY, text=True).strip() == "set()"


# -- files -------------------------------------------------------------------------------------------------------------


LONG = "x" * 70_000


@pytest.mark.parametrize("content", ["", "abc", "abc\n", "abc\ndef", "\n" + 3 * LONG, LONG + "\n" + LONG])
def test_cut_torn_line_keeps_exactly_the_whole_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lines"
    path.write_text(content)
    whole = content[: content.rfind("\n") + 1]
    assert cut_torn_line(path) is (whole != content)
    assert path.read_text() == whole


def test_blocks_that_a_power_loss_kept_from_the_disk_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw\0\0\0three\nfour\n")
    assert whole_lines(path) == [b"one\n"]
    assert cut_torn_line(path)
    assert path.read_bytes() == b"one\n"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text_durably(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=f"{path}: the disk is full"):
        write_text_durably(path, "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_line_that_did_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_lines(path, "one\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    with pytest.raises(MachineError):
        append_lines(path, "two\n")
    assert path.read_text() == "one\n"
