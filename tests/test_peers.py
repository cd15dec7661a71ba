"""The short form of the bench against other trainers: real trainings of the tiny shape, one run of each way.

Nothing is asserted about time. TRL's ways are run where TRL is installed (`make bench-peers` installs it elsewhere).
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_inputs, peer_tables, peer_ways, peers
from benchmarks.peer_setting import SHAPES, WAYS, available_ways

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What peers.measure gives, in this process: importing torch for each way would take most of the time."""
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "hub"))
        patch.setenv("OMP_NUM_THREADS", "1")
        facts = peer_inputs.prepare(TINY, folder)
        peer_ways.fill_cache(folder)
        runs = {}
        for way in available_ways():
            peers.work(way, folder, folder / way, time.time())
            runs[way] = [json.loads((folder / f"{way}.json").read_text())]
    return peers.result_of(TINY, facts, runs, threads=1)


def test_ways_of_one_loss_agree_in_losses_and_gradients(result: dict[str, Any]) -> None:
    assert {"dae-align", "dae-align-cached", "three-models", "dae-sft", "trainer-sft"} <= result["runs"].keys()
    assert result["largest_relative_differences"]["losses"] < peers.TOLERANCE["losses"]
    for run in (run for runs in result["runs"].values() for run in runs):
        assert len(run["losses"]) == len(run["step_cpu"]) + 1 == TINY.steps


def test_nothing_is_reported_of_ways_whose_steps_differ(result: dict[str, Any]) -> None:
    for what in peers.TOLERANCE:
        runs = copy.deepcopy(result["runs"])
        runs["trainer-sft"][0][what][-1] *= 1.01
        with pytest.raises(ValueError, match="not the same steps"):
            peers.check_losses(runs)
    runs = copy.deepcopy(result["runs"])
    for way in runs:
        runs[way][0]["losses"] = [0.0] * TINY.steps
    with pytest.raises(ValueError, match="too small to compare"):
        peers.check_losses(runs)


def test_tables_and_picture_are_written(result: dict[str, Any], tmp_path: Path) -> None:
    growth = {what: [result, result] for what in peers.GROWTH}
    record = {
        "date": "2026-11-29",
        "machine": peers.machine(),
        "shapes": [result],
        "first_step": result,
        "growth": growth,
    }
    peers.write(tmp_path, record)
    page = (tmp_path / "peers.md").read_text()
    assert all(way in page for way in result["runs"])
    assert (tmp_path / "peers.svg").read_text().count("</svg>") == 1
    assert json.loads((tmp_path / "peers.json").read_text())["shapes"][0]["setting"]["name"] == "tiny"
    assert str(tmp_path) not in page
    for part in ({"shapes": [result]}, {"growth": growth}, {"first_step": result}):  # each may be measured alone
        peers.write(tmp_path / "part", {"date": "", "machine": peers.machine(), "shapes": [], **part})


def test_weights_are_counted_by_copies_and_adapters() -> None:
    four = peers.replace(TINY, experts=3)
    assert WAYS["dae-align"].weight_bytes(four, base=1000, adapter=10) == 1000 + 4 * 10
    assert WAYS["dae-align-cached"].weight_bytes(four, base=1000, adapter=10) == 1000 + 10
    assert WAYS["three-models"].weight_bytes(four, base=1000, adapter=10) == 5 * 1000 + 10
    assert WAYS["trl-gkd"].weight_bytes(four, base=1000, adapter=10) == 2 * 1000 + 10


def test_ratios_are_taken_repeat_by_repeat() -> None:
    def run(cpu: float) -> dict[str, Any]:
        return {"step_cpu": [cpu, cpu]}

    runs = {"dae-align": [run(1.0), run(3.0)], "trl-sft": [run(2.0), run(3.0)], "dae-sft": [run(4.0)]}
    measured = peer_tables.ratio({"runs": runs}, "dae-align", "trl-sft", peer_tables.step_cpu)
    assert measured == peer_tables.Spread(0.75, 0.5, 1.0)
    once = peer_tables.ratio({"runs": runs}, "dae-sft", "trl-sft", peer_tables.step_cpu)
    assert once == peer_tables.Spread(2.0, 2.0, 2.0)
    assert peer_tables.ratio({"runs": runs}, "dae-align", "trl-gkd", peer_tables.step_cpu) is None


def test_records_are_joined_part_by_part(result: dict[str, Any]) -> None:
    host = {"versions": {"torch": "1"}}
    first = {"date": "a", "machine": host, "shapes": [result]}
    other = copy.deepcopy(result)
    other["setting"]["name"] = "other"
    joined = peer_tables.joined(first, {"date": "b", "machine": host, "shapes": [other], "growth": {}})
    assert [one["setting"]["name"] for one in joined["shapes"]] == ["tiny", "other"]
    assert (joined["date"], joined["growth"]) == ("a", {})
    with pytest.raises(ValueError, match="not"):
        peer_tables.joined(first, {"machine": {"versions": {"torch": "2"}}, "shapes": []})
