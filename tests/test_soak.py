"""The short form of the soak: a few kills of each command with a fixed seed, and a few power losses."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.lost_writes import Call, File, FileSystem, calls, content
from benchmarks.power_loss import power_loss
from benchmarks.soak import page, soak, write
from benchmarks.soak_targets import TARGETS, make_soak_world

ROOT = "/world/out"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_soak_world(tmp_path_factory.mktemp("soak") / "world")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_kills_lose_nothing(world: Path, tmp_path: Path, name: str) -> None:
    found = soak(name, world, kills=3, seed=0, failed=tmp_path / "failed")
    assert found["failures"] == []
    assert found["kills"] == 3 == sum(found["phases"].values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_few_power_losses_lose_nothing(world: Path, tmp_path: Path) -> None:
    found = power_loss(world, cuts=3, seed=0, place=tmp_path)
    assert found["failures"] == []
    assert found["folders"] > found["calls"] > 100


# -- the model of lost writes ------------------------------------------------------------------------------------------


def system_after(*made: Call) -> FileSystem:
    system = FileSystem(Path(ROOT))
    system.root_lasts = True
    for call in made:
        assert system.apply(call), call
    return system


def opened(name: str, descriptor: int = 3) -> Call:
    arguments = ("AT_FDCWD", f"{ROOT}/{name}".encode(), "O_WRONLY|O_CREAT", "0666")
    return Call("openat", arguments, {0: "/world"}, descriptor)


def written(name: str, data: bytes, descriptor: int = 3) -> Call:
    return Call("write", (str(descriptor), data, str(len(data))), {0: f"{ROOT}/{name}"}, len(data))


def synced(name: str = "") -> Call:
    return Call("fsync", ("9",), {0: f"{ROOT}/{name}".rstrip("/")}, 0)


def renamed(old: str, new: str) -> Call:
    return Call("rename", (f"{ROOT}/{old}".encode(), f"{ROOT}/{new}".encode()), {}, 0)


def left(system: FileSystem, target: Path, seed: int | None = None) -> dict[str, bytes]:
    system.build(target, None if seed is None else random.Random(seed))
    return {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}


def test_what_was_not_synced_is_lost(tmp_path: Path) -> None:
    place = tmp_path / "out"
    made = [opened("a"), written("a", b"new")]
    assert left(system_after(*made), place) == {}
    assert left(system_after(*made, synced("a")), place) == {}  # the name is the folder's
    assert left(system_after(*made, synced()), place) == {"a": b""}
    assert left(system_after(*made, synced("a"), synced()), place) == {"a": b"new"}
    unnamed = system_after(*made, synced("a"), synced())
    unnamed.root_lasts = False
    assert left(unnamed, place) == {}


def test_a_rename_without_a_sync_of_the_folder_may_be_lost_or_not(tmp_path: Path) -> None:
    made = [opened("a"), written("a", b"old"), synced("a"), synced()]
    made += [opened("b"), written("b", b"new"), synced("b"), synced(), renamed("b", "a")]
    ends = [left(system_after(*made), tmp_path / "out", seed) for seed in range(20)]
    assert {frozenset(end.items()) for end in ends} == {
        frozenset({("a", b"old"), ("b", b"new")}),
        frozenset({("a", b"new")}),
    }
    assert left(system_after(*made, synced()), tmp_path / "out") == {"a": b"new"}


def test_a_rename_without_a_sync_of_the_file_may_leave_it_empty(tmp_path: Path) -> None:
    """The mistake that the writer must not make."""
    made = [opened("b"), written("b", b"new"), renamed("b", "a"), synced()]
    assert left(system_after(*made), tmp_path / "out") == {"a": b""}


def test_what_was_synced_of_a_file_that_grows_stays() -> None:
    file = File(bytearray(b"line\n" * 400), b"line\n" * 200)
    ends = [content(file, random.Random(seed)) for seed in range(50)]
    assert all(end.startswith(b"line\n" * 200) for end in ends)
    assert any(b"\0" in end for end in ends) and bytes(file.data) in ends


def test_a_record_is_read_call_by_call(tmp_path: Path) -> None:
    name = "".join(f"\\x{byte:02x}" for byte in b"/world/out/a")
    log = tmp_path / "log"
    log.write_text(
        f'1  openat(AT_FDCWD<\\x2f>, "{name}", O_WRONLY|O_CREAT, 0666) = 3<{name}>\n'
        f'1  openat(AT_FDCWD<\\x2f>, "{name}", O_RDONLY) = -1 ENOENT (No such file or directory)\n'
        f"1  write(3<{name}>,  <unfinished ...>\n"
        f"2  fsync(4<{name}>) = 0\n"
        '1  <... write resumed>"\\x61\\x62", 2) = 2\n'
        f'1  writev(3<{name}>, [{{iov_base="\\x61", iov_len=1}}, {{iov_base="\\x62\\x63", iov_len=2}}], 2) = 3\n'
    )
    found = list(calls(log))
    assert [call.name for call in found] == ["openat", "fsync", "write", "writev"]
    assert found[2].arguments[:2] == ("3", b"ab") and found[3].arguments[:2] == ("3", b"abc")
    assert found[0].places == {0: "/"} and found[3].places == {0: "/world/out/a"}


def test_calls_outside_of_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="not in the model"):
        FileSystem(Path(ROOT)).apply(Call("sendfile", ("3", "4"), {0: f"{ROOT}/a"}, 1))
    mapped = ("NULL", "4096", "PROT_READ|PROT_WRITE", "MAP_SHARED", "3", "0")
    with pytest.raises(ValueError, match="shared writable mapping"):
        FileSystem(Path(ROOT)).apply(Call("mmap", mapped, {4: f"{ROOT}/a"}, 1))


# -- the figures -------------------------------------------------------------------------------------------------------


def test_figures_of_other_targets_stay(tmp_path: Path) -> None:
    one = {
        "date": "2026-11-29", "command": "soak", "kills": 2, "outputs": 1, "random": 1, "aimed": 1,
        "phases": {"start": 2}, "files_compared": 3, "not_compared": ["out/manifest.json"], "failures": [],
    }  # fmt: skip
    write(tmp_path, targets={"sample": one})
    write(tmp_path, targets={"align": one})
    write(tmp_path, power_loss={"command": "loss", "calls": 1, "folders": 2, "resumed": 1, "failures": []})
    record = json.loads((tmp_path / "soak.json").read_text())
    assert list(record["targets"]) == ["align", "sample"]
    assert (tmp_path / "soak.md").read_text() == page(record)
    assert "4 kills in all, 0 outputs ended otherwise" in page(record)
