"""The attention-cost benchmark compares like with like: two ways, one loss."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import attention_cost


def test_both_ways_have_the_same_loss_at_every_step_and_the_third_has_less() -> None:
    losses = {}
    for way in attention_cost.WAYS:
        losses[way] = attention_cost.work(way, attention_cost.SHAPES["tiny"], 3)["losses"]
    assert losses["straightforward"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["without"][0] < 0.99 * losses["ours"][0]
    assert len(set(losses["ours"])) == 4


def test_nothing_is_reported_of_ways_whose_losses_differ() -> None:
    def runs(theirs: list[float]) -> dict[str, list[dict[str, Any]]]:
        return {"ours": [{"losses": [0.5, 0.4]}], "straightforward": [{"losses": theirs}]}

    assert attention_cost.largest_difference(runs([0.5, 0.4])) == 0
    with pytest.raises(ValueError, match="not the same steps"):
        attention_cost.largest_difference(runs([0.5, 0.4001]))
