"""Checkpoints: whole or passed over, and never more of them than were asked for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.runs.checkpoints import Checkpoints, checkpoint_fault


@pytest.fixture
def held(tmp_path: Path) -> Checkpoints:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return Checkpoints(tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl")


def save_checkpoint(held: Checkpoints, step: int) -> Path:
    staging = held.staging / f"checkpoint-{step}"
    (staging / "inner").mkdir(parents=True)
    (staging / "weights").write_text(f"weights after {step}")
    (staging / "inner" / "state").write_text(f"state after {step}")
    return held.seal(staging, step)


def test_what_was_sealed_is_whole(held: Checkpoints) -> None:
    assert checkpoint_fault(save_checkpoint(held, 1)) is None


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def symlink(path: Path) -> None:
    target = path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(target)


def plant(path: Path) -> None:
    path.with_name("optimizer.pt").write_bytes(b"pickled")


@pytest.mark.parametrize(
    ("harm", "name", "reason"),
    [
        (tear, "weights", "torn or altered"),
        (alter, "inner/state", "torn or altered"),
        (Path.unlink, "weights", "weights is missing"),
        (symlink, "weights", "no plain file"),
        (plant, "weights", "optimizer.pt is not in its manifest"),
        (Path.unlink, "manifest.json", "cannot be read"),
        (tear, "manifest.json", None),
        (lambda path: path.write_text("[]"), "manifest.json", "cannot be read"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_with_a_warning(
    held: Checkpoints, harm: Callable[[Path], Any], name: str, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_checkpoint(held, 9), save_checkpoint(held, 10)
    assert held.latest() == newer == held.at(10)
    harm(newer / name)
    if reason is None:  # only the manifest's final newline is gone: it still says all it said
        assert held.latest() == newer
        return
    with caplog.at_level(logging.WARNING):
        assert held.latest() == older
    assert f"{newer}: passed over: " in caplog.text
    assert reason in caplog.text
    assert save_checkpoint(held, 10) == newer
    assert held.latest() == newer


def test_the_manifest_holds_the_hash_of_each_file(held: Checkpoints) -> None:
    checkpoint = save_checkpoint(held, 3)
    assert checkpoint.name == "step-000003"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    expected = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in {"weights": "weights after 3", "inner/state": "state after 3"}.items()
    }
    assert {name: entry["sha256"] for name, entry in files.items()} == expected


def test_steps_are_ordered_as_numbers(held: Checkpoints) -> None:
    save_checkpoint(held, 999_999)
    newest = save_checkpoint(held, 1_000_000)
    assert held.latest() == newest


def test_prune_keeps_the_newest_and_the_best(held: Checkpoints) -> None:
    for step in range(1, 6):
        save_checkpoint(held, step)
    held.prune(2, best=1)
    assert {entry.name for entry in held.folder.glob("step-*")} == {
        "step-000001",
        "step-000004",
        "step-000005",
    }


def test_prune_does_not_count_a_torn_checkpoint_as_the_newest(held: Checkpoints) -> None:
    for step in (1, 2):
        save_checkpoint(held, step)
    tear(held.at(2) / "weights")
    assert held.latest() == held.at(1)
    held.prune(1)
    assert [entry.name for entry in held.folder.glob("step-*")] == ["step-000001"]
