"""Errors to exit statuses and one message; the command from outside, as a process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dae as package
from dae import cli, process
from dae.commands.stages import report_run
from dae.recipe import AlignRecipe
from kd.errors import MachineError, Stopped, UserError

ROOT = Path(__file__).parents[2]


def dae(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command from outside, as it is started from a checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    return subprocess.run(
        [sys.executable, "-m", "dae", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `dae align` fail with this error."""
    import kd.stages.run_stage

    def fail(_stage: Any, _recipe: AlignRecipe) -> None:
        raise error

    monkeypatch.setattr(kd.stages.run_stage, "run_stage", fail)


ENOUGH = ["align", "--base", "b", "--expert", "e", "--domain-data", "d.jsonl", "--general-data", "g.jsonl"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("rows.jsonl:7: is broken"), 2, "dae align: rows.jsonl:7: is broken"),
        (MachineError("runs/x: the disk is full"), 4, "dae align: runs/x: the disk is full"),
        (Stopped(2, "stopped after step 3"), 130, "dae align: stopped after step 3"),
        (Stopped(15, "stopped after step 3"), 143, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "same command"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 4, "runs/x: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 2, "runs/x: read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: permission denied"),
        (MemoryError(), 4, "out of memory: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            4,
            "Tried to allocate 2 GiB; halve",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "gradient_accumulation_steps"),
    ],
)
def test_errors_have_their_status_and_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: str
) -> None:
    failing(monkeypatch, error)
    assert cli.run(ENOUGH) == status
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), RuntimeError("odd"), FileNotFoundError(2, "x", "y")]
)
def test_our_own_faults_leave_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, error)
    assert cli.run(ENOUGH) == 3
    told = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert told.strip().endswith(f"traceback in {log}")
    assert told.count("\n") == 1
    assert "Traceback (most recent call last)" in log.read_text()
    assert type(error).__name__ in log.read_text()


def test_a_fault_is_told_even_where_no_log_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    failing(monkeypatch, ZeroDivisionError("x"))
    assert cli.run(ENOUGH) == 3
    assert "ZeroDivisionError in test_exit_status.py" in capsys.readouterr().err


def test_other_ranks_do_not_repeat_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    failing(monkeypatch, UserError("once is enough"))
    assert cli.run(ENOUGH) == 2
    assert capsys.readouterr().err == ""


def test_help_names_the_commands_and_has_no_colour_codes_when_piped(tmp_path: Path) -> None:
    ran = dae("--help", cwd=tmp_path, COLUMNS="80")
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout
    for command in ("align", "sft", "sample", "check", "keys", "demo", "--version", "--install-completion"):
        assert command in ran.stdout
    assert max(len(line) for line in ran.stdout.splitlines()) <= 80


def test_the_version_is_that_of_the_distribution_and_costs_no_torch(tmp_path: Path) -> None:
    assert package.__version__ == metadata.version("dae-align")
    ran = dae("--version", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"dae {package.__version__}\n", "")
    code = "import sys, dae; dae.__version__; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_a_shell_is_told_how_a_word_goes_on(tmp_path: Path) -> None:
    asked = {"_DAE_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for words, expected in (("dae align --gen", "--general-data\n"), ("dae check ali", "align\n")):
        ran = dae(cwd=tmp_path, COMP_WORDS=words, **asked)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, expected, "")


@pytest.mark.parametrize(("name", "value"), [(None, None), ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5")])
def test_threads_sleep_while_they_wait_unless_the_user_chose(
    name: str | None, value: str | None, tmp_path: Path
) -> None:
    code = (
        "import os, subprocess, sys; from dae import cli; before = dict(os.environ); cli.prepare_process(os.environ);"
        "shown = 'import os; print(os.environ.get(\"OMP_WAIT_POLICY\"))';"
        "print(before.get('OMP_WAIT_POLICY'), os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules, flush=True);"
        "subprocess.run([sys.executable, '-c', shown])"
    )
    clean = {key: text for key, text in os.environ.items() if key not in process.SPINNING}
    if name is not None and value is not None:
        clean[name] = value
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    chosen = clean.get("OMP_WAIT_POLICY")
    policy = "PASSIVE" if name is None else chosen
    assert ran.stdout == f"{chosen} {policy} False\n{policy}\n"


def test_warnings_of_peft_are_shown() -> None:
    code = (
        "import os, warnings; from dae import cli; cli.prepare_process(os.environ)\n"
        "for name in ('torch.x', 'transformers.x', 'accelerate.x', 'peft.x', 'mine'):\n"
        "    warnings.warn_explicit(name, UserWarning, 'file', 1, name)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in ran.stderr.splitlines() if "UserWarning" in line] == ["peft.x", "mine"]


def test_a_mistake_ends_the_process_with_2_and_writes_nothing(tmp_path: Path) -> None:
    ran = dae("sft", "--base", "b", "--output", "o", "sed=1", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "sed=1: unknown key; did you mean `seed`?" in ran.stderr
    assert "add --data PATH" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_fault(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m dae keys | head -1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    assert ran.returncode in (0, 141)


def test_what_is_told_of_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {
        "steps": 3,
        "rows": {"general": 9, "shop": 4, "silent": 1, "eval.shop": 2},
        "initial_kl": {"general": -1e-9, "shop": 1.5},
        "last": {"loss": 0.2, "general/kl": 0.01, "shop/kl": 0.25, "shop/ntp": 0.4},
        "held_out": {"eval_shop_kl": 0.3, "eval_shop_ntp": 0.5},
    }
    report_run(SimpleNamespace(path="student", summary=summary))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["student:", "finished,", "3", "steps"],
        ["general", "KL", "to", "its", "teacher", "0.000", "->", "0.010"],
        ["shop", "KL", "to", "its", "teacher", "1.500", "->", "0.250;", "eval", "set", "0.300"],
        ["silent", *["no", "logged", "step", "had", "any", "of", "its", "rows"]],
    ]


def test_what_is_told_of_a_run_without_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"steps": 3, "rows": {"train": 9}, "initial_kl": {}, "last": {"train/ntp": 0.4}, "held_out": {}}
    report_run(SimpleNamespace(path="expert", summary=summary))  # type: ignore[arg-type]
    assert "next-token loss 0.400" in capsys.readouterr().out
