"""The trade-off benchmark's tables and picture, from made-up records."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trade_off_plot, trade_off_tables
from benchmarks.trade_off_plan import GRID, WAYS


def line(pair: str, way: str, at: float | None, *seeds: tuple[float, float], **more: Any) -> dict[str, Any]:
    known = WAYS[pair].get(way)  # type: ignore[call-overload]
    figures = {str(seed): {"domain": domain, "general": general} for seed, (domain, general) in enumerate(seeds)}
    facts = {"part": known.part if known else "alignment", "title": known.title if known else way}
    setting = known.setting if known else ""
    rest = {"is_rate_chosen": True, "learning_rate": 3e-3, "planned_seeds": 3, "setting": setting, "at": at}
    return {"pair": pair, "way": way, **facts, **rest, "figures": figures, **more}


def record(*lines: dict[str, Any], **more: Any) -> dict[str, Any]:
    tuning = [{"pair": "world", "way": "dae", "scores": {"0.0015": 0.5, "0.003": 0.75, "0.006": None}, "chosen": None}]
    empty = {"planned": [model("dae 0.7", 0, True)], "commands": ["dae sft"], "trial_steps": None}
    facts = {"date": "2026-01-02", "versions": {"torch": "2"}, "grid": list(GRID), "seeds": [0, 1, 2]}
    return {**facts, **empty, "tuning": tuning, "results": list(lines), **more}


def model(name: str, seed: int, scored: bool, **more: str) -> dict[str, Any]:
    return {"pair": "world", "part": "alignment", "name": name, "seed": seed, "scored": scored, **more}


WORLD = (
    line("world", "base", None, (0.25, 0.98), (0.25, 0.98), (0.25, 0.98)),
    line("world", "expert", None, (1.0, 0.4), (1.0, 0.4), (1.0, 0.4)),
    line("world", "dae", 0.7, (0.9, 0.9), (0.8, 0.92), (1.0, 0.94)),
    line("world", "ntp", 0.7, (0.85, 0.9), (0.85, 0.9), (0.85, 0.9)),
    line("world", "linear", 0.5, (0.5, 0.6), learning_rate=None),
)
REAL = (
    line("real", "base", None, (2.8, 1.3), planned_seeds=1),
    line("real", "dae", 1.0, (1.5, 1.4), (1.5, 1.4), (1.5, 1.4)),
    line("real", "ntp", 1.0, (1.6, 1.5), (1.6, 1.5), (1.6, 1.5)),
)


def rows_of(text: str, start: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith(f"| {start}")
    ]


def test_the_table_shows_means_spread_front_and_what_is_missing() -> None:
    text = trade_off_tables.markdown(record(*WORLD, *REAL))
    dae, real_dae = rows_of(text, "DAE |")
    assert dae[1:] == ["share of domain rows 0.7", "0.003", "3", "90.0 (80.0 to 100.0)", "92.0 (90.0 to 94.0)", "yes"]
    assert real_dae[-3:] == ["1.500 (1.500 to 1.500)", "1.400 (1.400 to 1.400)", "yes"]
    ntp, real_ntp = rows_of(text, "next-token loss, same mixed rows")
    assert ntp[-1] == ""  # 90 and 92 are better than 85 and 90
    assert real_ntp[-1] == ""  # and so are fewer bits
    (merged,) = rows_of(text, "merge, linear")
    assert merged[2:5] == ["", "1 of 3", "50.0"]
    minus = rows_of(text, "DAE minus")
    assert minus[0][2:] == ["3", "+5.0 (-5.0 to +15.0)", "+2.0 (+0.0 to +4.0)"]
    assert minus[1][-1] == "-0.100 (-0.100 to -0.100)"
    assert "| world | `dae` | 50.0 | 75.0 |  |  |" in text
    (unsure,) = rows_of(trade_off_tables.markdown(record({**WORLD[2], "is_rate_chosen": False})), "DAE |")
    assert unsure[2] == "0.003, not chosen yet"


def test_what_is_missing_is_said_first() -> None:
    assert "Complete: all 1 planned models are scored, seeds 0, 1, 2." in trade_off_tables.markdown(record(*WORLD))
    planned = [model("dae 0.7", 0, True), *(model("dae 0.3", seed, False) for seed in (1, 2))]
    text = trade_off_tables.markdown(record(*WORLD, planned=[*planned, model("moe", 0, False, part="mixture")]))
    assert "**Partial: 1 of 4 planned models are scored (seeds 0, 1, 2).**" in text
    assert "- alignment, world: 2 of 3 (seeds in parentheses): `dae 0.3` (1, 2)\n" in text
    assert "- mixture, world: 1 of 1 (seeds in parentheses): `moe` (0)\n" in text


def test_differences_are_between_equal_settings_over_the_seeds_that_both_have() -> None:
    lines = [
        line("world", "dae", 0.7, (0.9, 0.9), (0.5, 0.9)),
        line("world", "dae", 0.3, (0.6, 0.9)),
        line("world", "ntp", 0.7, (0.8, 0.9)),
        line("world", "ntp", 0.1, (0.2, 0.9)),
    ]
    ((_, setting, values),) = trade_off_tables.difference_rows(lines, "dae", "ntp")
    assert setting.endswith("0.7")
    assert values["domain"] == pytest.approx([0.1])


def test_distillation_shows_its_teacher_and_each_part_its_own_lines() -> None:
    small = [
        {**line("world", way, None, (0.0, score)), "figures": {"0": {"general": score}}}
        for way, score in (("small_sft", 0.5), ("small_kd", 0.6), ("small_attention", 0.55))
    ]
    text = trade_off_tables.markdown(record(*WORLD, *small, line("world", "moe", None, (0.7, 0.8))))
    part = text.partition("## Distillation")[2].partition("## ")[0]
    assert rows_of(text, "teacher")[0][-1] == "98.0 (98.0 to 98.0)"
    assert rows_of(text, "KD minus")[0][-1] == "+10.0"
    assert rows_of(text, "KD and attention loss minus")[0][-1] == "-5.0"
    assert "merge" not in part
    assert "mixture" not in part
    assert rows_of(text, "DAE, mixture")[0][-2:] == ["70.0", "80.0"]


def test_the_picture_is_the_same_for_the_same_record_and_names_every_way(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trade_off_plot.write_picture(record(*WORLD, *REAL), tmp_path / name)
    one, two = ((tmp_path / name / "trade_off.svg").read_bytes() for name in ("one", "two"))
    assert one == two
    assert ET.fromstring(one).tag.endswith("svg")
    assert (tmp_path / "one" / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    figure = trade_off_plot.draw([*WORLD, *REAL])
    world_axes, real_axes = figure.axes
    assert not world_axes.xaxis_inverted()
    assert real_axes.xaxis_inverted()
    assert real_axes.yaxis_inverted()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["base = reference", "expert", "DAE", "next-token loss, same mixed rows", "merge, linear"]
    points = {tuple(point) for drawn in world_axes.lines for point in drawn.get_xydata().tolist()}  # type: ignore[union-attr]
    assert {(50.0, 60.0), (100.0, 94.0)} <= points
    assert not trade_off_plot.draw([]).axes
