"""What a run records of where it ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kd.runs.environment import environment

ROOT = Path(__file__).parents[2]


def test_the_commit_is_that_of_the_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(environment()["commit"]).removesuffix("-dirty") == head.stdout.strip()
