"""Rows that are dropped or cut are told: when a run starts, in run.json and in the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import align_command, make_world

import kd.training.publishing
from dae import cli

LONG_PROMPT = json.dumps({"prompt": "one " * 400, "completion": "two"}) + "\n"
LONG_RESPONSE = json.dumps({"prompt": "one", "completion": " two" * 400}) + "\n"


def test_a_run_tells_what_it_dropped_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(make_world(tmp_path / "world"))
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)
    for name, lost in (("shop", LONG_PROMPT * 60 + LONG_RESPONSE * 3), ("heldout_shop", LONG_PROMPT * 7)):
        with Path(f"{name}.jsonl").open("a") as file:
            file.write(lost)
    settings = ("data.max_length=64", "data.eval.domain=heldout_shop.jsonl", "train.max_steps=2", "train.save_steps=1")
    assert cli.run(align_command(*settings)) == 0
    reason = "prompt fills max_length: no response token left"
    told = [line for line in caplog.messages if line.startswith("data.")]
    assert told == [
        f"data.domain: shop.jsonl: of 183 rows, 60 dropped (60 x {reason}) and 3 cut to data.max_length",
        f"data.eval.domain: heldout_shop.jsonl: of 31 rows, 7 dropped (7 x {reason})",
    ]
    summary = json.loads(Path("student/run.json").read_text())["summary"]
    assert summary["rows"] == {"general": 120, "domain": 123, "eval.domain": 24}
    assert summary["dropped"] == {"general": 0, "domain": 60, "eval.domain": 7}
    assert summary["truncated"] == {"general": 0, "domain": 3, "eval.domain": 0}
    card = Path("student/README.md").read_text()
    assert "| domain | `shop.jsonl` | 123 | 3 | 60 | 10.0% |" in card
    assert "| domain | `heldout_shop.jsonl` | 24 | 0 | 7 |  |" in card
    caplog.clear()
    assert cli.run(align_command(*settings)) == 0  # it is finished
    assert not [line for line in caplog.messages if line.startswith("data.")]
