"""The step-cost benchmark compares like with like: five ways, one loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step_cost, step_ways

TINY = step_ways.SHAPES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step_cost")
    step_ways.prepare(TINY, folder)
    return folder


def test_all_ways_have_the_same_loss_at_every_step(folder: Path) -> None:
    losses = {}
    for kind in step_cost.KINDS:
        step = step_ways.optimizer_steps(kind, TINY, folder)
        losses[kind] = [step() for _ in range(4)]
    assert losses["ours"][0] > 1e-2, "a loss of about nothing would agree with anything"
    assert losses["ours"][-1] < losses["ours"][0]
    for kind in step_cost.KINDS[1:]:
        assert losses[kind][0] == pytest.approx(losses["ours"][0], rel=1e-5)
        # AdamW makes whole steps of what rounding leaves of a gradient near 0, differently on each processor.
        assert losses[kind] == pytest.approx(losses["ours"], rel=step_cost.LOSS_TOLERANCE)


def test_operations_of_the_head_are_those_that_the_docstring_counts(folder: Path) -> None:
    """More vocabulary costs the straightforward way 4 products over all positions, and ours 3 over the responses."""
    wide = dataclasses.replace(TINY, vocabulary=2 * TINY.vocabulary)
    wide_folder = folder / "wide"
    step_ways.prepare(wide, wide_folder)
    product = 2 * TINY.width * TINY.vocabulary  # per position, forward or backward
    positions, responses = TINY.rows * TINY.tokens, TINY.rows * (TINY.tokens - TINY.prompt)
    for kind, products in (("straightforward", 4 * positions), ("ours", 3 * responses)):
        added = step_ways.count_flops(kind, wide, wide_folder) - step_ways.count_flops(kind, TINY, folder)
        assert added == products * product


def _runs(losses: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    measured = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "peak_mib": 1.0}
    return {kind: [{"losses": losses.get(kind, [0.5, 0.4]), **measured}] for kind in step_cost.KINDS}


def test_nothing_is_reported_of_ways_whose_losses_differ() -> None:
    flops = dict.fromkeys(step_cost.KINDS, 1)
    assert step_cost.summary(flops, _runs({}))["largest_relative_loss_difference"] == 0
    with pytest.raises(ValueError, match="not the same steps"):
        step_cost.summary(flops, _runs({"lean": [0.5, 0.4001]}))
