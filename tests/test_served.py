"""benchmarks/served.py: what it compares, and that unlike runs are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.served import compared, markdown


def run(shift: float = 0.0, ids: int = 1, losses: tuple[float, ...] = (1.0, 2.0), rows: int = 2) -> dict[str, Any]:
    kept = {
        "ids": torch.tensor([[0, ids], [2, 3]]),
        "log_q": torch.full((2, 2), -1.0) - shift,
        "log_tail": torch.full((2,), -3.0) - 2 * shift,
    }
    return {"seconds": 10.0, "stored": {bytes([row]): kept for row in range(rows)}, "losses": list(losses)}


def test_the_largest_differences_are_found() -> None:
    found = compared(run(), run(0.25, losses=(1.0, 2.5)))
    assert (found["log_q"], found["log_tail"], found["loss"], found["largest_loss"]) == (0.25, 0.5, 0.5, 2.0)
    assert (found["rows"], found["positions"], found["positions_with_other_tokens"]) == (2, 4, 0)
    record = {"date": "2026-11-29", "server": "vLLM", "version": "1", "top_k": 2, "found": found}
    page = markdown(record)
    assert "| log-probability of a token, largest difference | 2.5e-01 |" in page
    assert "CPU, vLLM 1." in page and "all tokens but the 2 largest" in page


def test_positions_with_other_tokens_are_counted_apart() -> None:
    found = compared(run(), run(0.25, ids=4))
    assert found["positions_with_other_tokens"] == 2 and found["log_q"] == 0.25


def test_no_position_with_the_same_tokens_is_no_difference() -> None:
    other = run()
    other["stored"] = {row: {**kept, "ids": kept["ids"] + 9} for row, kept in other["stored"].items()}
    found = compared(run(), other)
    assert (found["positions_with_other_tokens"], found["log_q"], found["log_tail"]) == (4, 0.0, 0.0)


@pytest.mark.parametrize("other", [run(rows=1), run(rows=3), run(losses=(1.0,))])
def test_unlike_runs_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="same rows"):
        compared(run(), other)
