"""`dae sft`, the short command of `dae align`, trackers, threads."""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from align_runs import run, trained_steps
from worlds import align_command, make_rows

from dae import cli


@pytest.mark.parametrize("lora", ["lora.rank=4", "lora=null"])
def test_sft_learns_its_rows_and_writes_where_it_came_from(world: Path, lora: str) -> None:
    settings = ["train.max_steps=30", "train.learning_rate=1e-2", "train.logging_steps=10"]
    command = ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "made", lora, *settings]
    assert cli.run(command) == 0
    steps = trained_steps(Path("made"))
    assert steps[-1]["train/ntp"] < steps[0]["train/ntp"] - 0.5
    assert "train/kl" not in steps[-1]
    provenance = json.loads(Path("made/provenance.json").read_text())
    assert provenance["stage"] == "sft"
    digest = hashlib.sha256(Path("shop.jsonl").read_bytes()).hexdigest()
    assert len(provenance["data"]["train"][0].pop("encoded")) == 64
    assert provenance["data"] == {"train": [{"path": "shop.jsonl", "sha256": digest, "share": 1.0}]}


def test_the_short_command_works_as_typed(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["train.max_steps=4"]
    assert cli.run(["sft", "--base", "base", "--data", "general.jsonl", "--output", "ckpt", "lora=null", *few]) == 0
    assert cli.run(["sft", "--base", "ckpt", "--data", "shop.jsonl", "--output", "ecom-expert", *few]) == 0
    short = ["align", "--base", "ckpt", "--expert", "ecom-expert", "--reference", "ckpt"]
    assert cli.run(short) == 0
    sources = yaml.safe_load(Path("runs/align/recipe.yaml").read_text())["data"]
    assert sources["domain"][0]["path"] == "shop.jsonl"
    assert sources["general"][0]["path"] == "general.jsonl"
    capfd.readouterr()
    make_rows(world / "shop.jsonl", 77)
    assert cli.run([*short, "--output", "again"]) == 2
    told = capfd.readouterr().err
    assert "add --domain-data PATH; ecom-expert was trained on shop.jsonl, which has changed since" in told
    assert not Path("again").exists()


def test_trackers_get_what_metrics_jsonl_gets(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    folder = run("train.report_to=tensorboard")
    assert [line["domain/kl"] for line in logged if "domain/kl" in line] == [
        line["domain/kl"] for line in trained_steps(folder)
    ]


class WriterToDisk:
    """What transformers' callback asks of a SummaryWriter: scalars by name, in a file of its folder."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = Path(log_dir) / "events"

    def add_text(self, *_: Any) -> None:
        pass

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{name} {step}\n")

    def flush(self) -> None:
        pass

    close = flush


def test_the_files_of_a_tracker_stay_in_the_run_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=WriterToDisk))
    folder = run("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1")
    assert "train/domain/kl 2" in (folder / "trackers" / "events").read_text().splitlines()
    assert cli.run(align_command("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1")) == 0
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    run("train.report_to=tensorboard", "train.max_steps=2", "train.logging_steps=1", output="other")
    assert Path("elsewhere/events").is_file()
    assert not Path("other/trackers").exists()


def test_align_runs_in_a_thread(world: Path) -> None:
    """From a notebook's or a server's thread, where Python lets nobody take signals."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(cli.run, align_command("train.max_steps=1")).result() == 0


def test_a_tracker_that_is_not_there_is_told(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(align_command("train.report_to=trackio")) == 2
    assert "train.report_to=trackio: trackio is not installed" in capfd.readouterr().err
