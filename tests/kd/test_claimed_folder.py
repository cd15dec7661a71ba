"""A claimed folder: who holds it, what it refuses, what it leaves behind. Every command's: tests/dae/."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.runs.claimed_folder import ClaimedFolder

REPOSITORY = Path(__file__).parents[2]


def claim(path: Path) -> ClaimedFolder:
    return ClaimedFolder(path, "mark.json", own=frozenset({"replies"}), inside=("parts",))


def test_the_lock_names_its_living_holder_and_ends_with_it_even_if_a_fork_lives_on(tmp_path: Path) -> None:
    script = f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(REPOSITORY)!r})
        from kd.runs.claimed_folder import ClaimedFolder
        with ClaimedFolder(Path({str(tmp_path / "run")!r}), "mark.json").held(lambda: None):
            holder = os.getpid()
            if os.fork() == 0:
                print(holder, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        with (
            pytest.raises(UserError, match=rf"held by a live process \(process {pid} on \S+\)"),
            claim(tmp_path / "run").held(lambda: None),
        ):
            pass
        process.kill()
        process.wait()
        with claim(tmp_path / "run").held(lambda: None):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_names_of_folders_that_are_made_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced in a folder is lost in a power loss with the folder's own name."""
    synced: list[Path] = []
    monkeypatch.setattr("kd.runs.claimed_folder.fsync_path", synced.append)
    with claim(tmp_path / "above" / "run").held(lambda: None):
        assert set(synced) == {tmp_path, tmp_path / "above"}


def test_a_fork_that_leaves_the_claim_neither_frees_nor_empties_the_lock(tmp_path: Path) -> None:
    with claim(tmp_path).held(lambda: None):
        child = os.fork()
        if child == 0:
            os._exit(in_child(tmp_path))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(UserError, match=rf"\(process {os.getpid()} on"), claim(tmp_path).held(lambda: None):
            pass
    assert list(tmp_path.iterdir()) == []


def in_child(path: Path) -> int:
    """Unwinds a claim of its parent's, as an error in a forked worker does."""
    try:
        with claim(path).held(lambda: None):
            return 1
    except UserError:
        return 0


def test_where_files_cannot_be_locked_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match="this file system cannot lock files"),
        claim(tmp_path / "run").held(lambda: None),
    ):
        pass


def test_the_holder_s_name_goes_with_it_wherever_the_folder_is_moved(tmp_path: Path) -> None:
    with claim(tmp_path / "run").held(lambda: None):
        (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / ".lock").read_text() == ""


def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), claim(tmp_path / "made" / "run").held(lambda: None):
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path / "made" / "run").held(lambda: None):
        (tmp_path / "made" / "run" / "mark.json").touch()
    assert [entry.name for entry in (tmp_path / "made" / "run").iterdir()] == ["mark.json"]


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (["thesis.tex"], "thesis.tex"),
        ([".tmp-thesis", "a", "b", "c"], r"\.tmp-thesis, a, b, \.\.\."),
        (["replies", "thesis.tex"], "thesis.tex"),
        ([".lock", ".tmp-mark.json", "replies"], None),
        ([".tmpoX7XOp"], None),  # of a kill while safetensors wrote a file
        (["mark.json", "thesis.tex"], None),
    ],
)
def test_files_of_something_else(tmp_path: Path, names: list[str], foreign: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    if foreign is None:
        with claim(tmp_path).held(lambda: None):
            assert not (tmp_path / ".tmp-mark.json").exists()
        return
    with pytest.raises(UserError, match=rf"holds files that this command did not write \({foreign}\)"):
        claim(tmp_path).held(lambda: None).__enter__()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "parts"):
        (place / ".staging" / "half").mkdir(parents=True)
        for name in ("mark.json", ".tmp-mark.json", ".tmpoX7XOp", "kept"):
            (place / name).touch()

    def refuse() -> None:
        raise UserError("other settings")

    for enter in (claim(tmp_path).look, lambda check: claim(tmp_path).held(check).__enter__()):
        with pytest.raises(UserError, match="other settings"):
            enter(refuse)
        assert (tmp_path / ".staging").exists()
    with claim(tmp_path).held(lambda: None):
        for place in (tmp_path, tmp_path / "parts"):
            assert {entry.name for entry in place.iterdir()} <= {"mark.json", "kept", "parts", ".lock"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"{tmp_path}.*cannot be written"), claim(tmp_path / "run").held(lambda: None):
        pass
