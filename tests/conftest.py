"""Shared test set-up: one thread and no denormals, so that suites run side by side and figures repeat."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import pico`

from in_double import InDouble

hypothesis.settings.register_profile("untimed", deadline=None)  # no timing in a test
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)
torch.set_flush_denormal(True)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def in_double() -> Iterator[None]:
    """The test in float64 all the way (not for gradient checkpointing: a recomputation is outside of such modes)."""
    with InDouble():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Small real models and data beside the checkout; tests that want them are skipped where they are not."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real models and data")
    return SHARED
