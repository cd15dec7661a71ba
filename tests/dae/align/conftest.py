"""The world that a run of `dae align` is given, as the current folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import logits_of
from torch import Tensor
from worlds import make_world

import kd.training.publishing
from kd.models.roles import LoadSettings


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all that a run is given."""
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    monkeypatch.chdir(place)
    return place


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is loaded with plain transformers and peft and compared, not in a fresh process: that is slow."""

    def compare(
        folder: Path, ids: Sequence[int], expected_TV: Tensor, settings: LoadSettings, _base: Any = None
    ) -> None:
        logits_TV = logits_of(folder, torch.tensor([ids]), settings.dtype)
        tolerance = 1e-5 if settings.dtype == torch.float32 else 2**-5
        scale = float(expected_TV.abs().max())
        torch.testing.assert_close(logits_TV, expected_TV.float(), rtol=0, atol=tolerance * scale)

    monkeypatch.setattr(kd.training.publishing, "verify_saved", compare)
