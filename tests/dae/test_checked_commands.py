"""`dae check align ...` and `dae align ... --check` on real checkpoints: one report, and nothing trained or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pico import make_checkpoint
from worlds import make_adapter

from dae import cli


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "expert", tmp_path / "base")
    rows = [{"prompt": f"Q{n}: how big is the blue kettle?", "completion": " two cups"} for n in range(12)]
    for name in ("shop", "general"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_three_ways_to_check_give_one_report_and_write_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--domain-data", "shop.jsonl", "--general-data", "general.jsonl"]
    command = ["align", "--base", "base", "--expert", "expert", *rows, "data.max_length=64"]
    (world / "r.yaml").write_text(
        "base: base\nexpert: expert\ndata: {domain: shop.jsonl, general: general.jsonl, max_length: 64}\n"
    )
    before = sorted(world.rglob("*"))
    reports = []
    for words in (["check", *command], [*command, "--check"], ["check", "r.yaml"]):
        assert cli.run(words) == 0
        reports.append(capsys.readouterr().out)
    assert "steps" in reports[0] and "memory" in reports[0]
    assert reports[0] == reports[1] == reports[2]
    assert sorted(world.rglob("*")) == before


def test_what_a_run_would_refuse_is_refused_by_the_flag_too(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sft", "--base", "base", "--data", "nowhere.jsonl", "--output", "o"]
    for words in (["check", *command], [*command, "--check"]):
        assert cli.run(words) == 2
        assert "nowhere.jsonl" in capsys.readouterr().err
    assert not (world / "o").exists()
