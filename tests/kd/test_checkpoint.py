"""A checkpoint as one value: looked up once, read once, and never stale."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pico import make_checkpoint
from worlds import make_adapter, make_world

import kd.models.checkpoint_files
from dae import cli
from kd.errors import UserError
from kd.models.checkpoint import checkpoint

# By which transformers and peft ask a hub themselves where they are given an id.
HUB_FUNCTIONS = ("hf_hub_download", "file_exists", "model_info", "list_repo_files", "check_file_exists_on_hf_hub")


def hub_of(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A hub that holds these folders; what it is asked for, by id or by the function that should not have asked."""
    asked: Counter[str] = Counter()

    def snapshot_download(name: str, **_: Any) -> str:
        asked[name] += 1
        return str(folders[name])

    def forbidden(function: str) -> Any:
        def ask(*_: Any, **__: Any) -> Any:
            asked[function] += 1
            raise OSError(function)

        return ask

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("huggingface_hub", "transformers", "peft"):
            for function in HUB_FUNCTIONS:
                if function in vars(module):
                    monkeypatch.setattr(module, function, forbidden(function))
    return asked


def test_align_asks_a_hub_once_for_each_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = make_world(tmp_path / "hub")
    make_checkpoint(hub / "reference", seed=7)
    config = hub / "expert" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "some/base"}))
    ids = {f"some/{name}": hub / name for name in ("base", "expert", "reference")}
    monkeypatch.chdir(tmp_path)
    asked = hub_of(ids, monkeypatch)
    command = ["align", "--base", "some/base", "--expert", "some/expert", "--reference", "some/reference"]
    command += ["--domain-data", str(hub / "shop.jsonl"), "--general-data", str(hub / "general.jsonl")]
    command += ["--output", "student", "train.max_steps=2"]
    assert cli.run(command) == 0
    assert asked == Counter(dict.fromkeys(ids, 1))
    assert json.loads(Path("student/adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert "base_model: some/base" in Path("student/README.md").read_text()


def test_a_path_is_one_value_until_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "here" / "base")
    first = checkpoint(folder)
    assert checkpoint(str(folder)) is first and not first.is_adapter
    make_adapter(folder, make_checkpoint(tmp_path / "there" / "base"))
    assert checkpoint(folder) is not first and checkpoint(folder).is_adapter
    found = []
    for place in ("here", "there"):
        monkeypatch.chdir(tmp_path / place)
        found.append(checkpoint("base").is_adapter)
    assert found == [True, False]


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = kd.models.checkpoint_files.files_sha256

    def counted(folder: Path, names: list[str]) -> dict[str, str]:
        read.append(folder)
        return real(folder, names)

    monkeypatch.setattr(kd.models.checkpoint_files, "files_sha256", counted)
    folder = make_checkpoint(tmp_path / "base")
    before = {checkpoint(folder).fingerprint for _ in range(3)}
    assert len(read) == len(before) == 1
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert checkpoint(folder).fingerprint not in before
    assert len(read) == 2


def test_an_adapter_whose_config_is_no_object_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_checkpoint(tmp_path / "base"))
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter/adapter_config\.json: is no JSON object; save or download"):
        _ = checkpoint(adapter).base


def test_every_meta_model_is_a_new_one(tmp_path: Path) -> None:
    source = checkpoint(make_checkpoint(tmp_path / "base"))
    one, other = source.meta_model(), source.meta_model()
    assert one is not other
    assert all(parameter.is_meta for parameter in one.parameters())
