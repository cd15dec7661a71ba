"""`dae merge` as a process: killed at any moment, given again, given otherwise, on a full disk."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
from pico import make_checkpoint
from processes import Signal, dae
from worlds import make_adapter

from dae import cli

COMMANDS = {
    "moe": ["merge", "moe", "--base", "base", "--expert", "base", "--expert", "lora", "--gate", "random"],
    "weights": ["merge", "weights", "--method", "dare_ties", "--base", "base", "--expert", "lora"],
    "to-lora": ["merge", "to-lora", "--reference", "base", "--expert", "expert", "--rank", "4", "min_energy=0"],
}
MOMENTS = {
    "with the adapter merged": Signal("dae.merging.checkpoints:whole_checkpoint", 2, after=True),
    "with the weights written": Signal("dae.merging.mergekit_calls:mix", after=True),
    "with half the result written": Signal("dae.merging.checkpoints:write_merge_card"),
    "with half the result in place": Signal("os:replace", name="model.safetensors", after=True),
    "just before it is called finished": Signal("kd.runs.run_folder:RunFolder.mark_finished"),
}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """base, expert (full) and lora (on base)."""
    place = tmp_path / "world"
    make_checkpoint(place / "base", "mistral")
    make_checkpoint(place / "expert", "mistral", seed=1)
    make_adapter(place / "lora", place / "base")
    return place


def files_of(run: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((run / "run.json").read_text())["files"]
    return {name: sha256 for name, sha256 in files.items() if name != "README.md"}  # the card names the folder


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(world: Path) -> None:
    command = COMMANDS["moe"]
    assert dae([*command, "--output", "calm"], world).status == 0
    for moment, kill in MOMENTS.items():
        ended = dae([*command, "--output", "moe"], world, signals=[kill])
        assert ended.status == -signal.SIGKILL, f"{moment}: {ended}"
        assert not (world / "moe" / "run.json").exists(), moment
    ended = dae([*command, "--output", "moe"], world)
    assert ended.status == 0, ended.err
    assert files_of(world / "moe") == files_of(world / "calm")
    assert not [name for name in (world / "moe").iterdir() if name.name.startswith((".tmp", ".publishing"))]


@pytest.mark.parametrize("kind", COMMANDS)
def test_given_again_it_is_finished(world: Path, kind: str) -> None:
    command = [*COMMANDS[kind], "--output", "out", *(["max_left_out=1"] if kind == "to-lora" else [])]
    first = dae(command, world)
    assert first.status == 0, first.err
    assert "Traceback" not in first.err and "it/s" not in first.err  # neither noise nor progress bars of libraries
    again = dae(command, world)
    assert (again.status, again.err) == (0, "out: already finished; nothing to do\n")
    assert again.out == first.out


def test_a_changed_input_is_noticed(world: Path) -> None:
    command = [*COMMANDS["weights"], "--output", "out"]
    assert dae(command, world).status == 0
    shutil.rmtree(world / "lora")
    make_adapter(world / "lora", world / "base", seed=9)
    ended = dae(command, world)
    assert ended.status == 2
    assert "content of expert" in ended.err


def test_a_full_disk_is_the_machine_s(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dae.merging.mergekit_calls.merge", full)
    assert cli.run([*COMMANDS["weights"], "--output", "out"]) == 4
    assert "the disk is full" in capsys.readouterr().err
    assert not list((world / "out").glob(".tmp*"))  # the adapter's merged copy went with it
    monkeypatch.undo()
    monkeypatch.chdir(world)
    assert cli.run([*COMMANDS["weights"], "--output", "out"]) == 0


def test_mergekit_s_way_of_giving_up_is_a_message(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("mergekit.scripts.moe.is_bad_config", lambda *_, **__: True)
    assert cli.run([*COMMANDS["moe"], "--output", "out"]) == 2
    assert "mixture: mergekit failed" in capsys.readouterr().err
    assert not (world / "out").exists()
