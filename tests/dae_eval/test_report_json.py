"""report.json: it holds the whole report, and every key is documented."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dae_eval.rendering import as_json
from dae_eval.report import Report
from pydantic import TypeAdapter
from reports import bare_report, demo_report, failing_report, full_report, hostile_report, wide_report

REPORTS: tuple[Callable[[], Report], ...] = (
    demo_report, bare_report, failing_report, wide_report, hostile_report, full_report,
)  # fmt: skip
SCHEMA = Path(__file__).parents[2] / "docs" / "report-schema.md"


@pytest.mark.parametrize("make", REPORTS)
def test_json_holds_the_whole_report(make: Callable[[], Report]) -> None:
    report = make()
    assert TypeAdapter(Report).validate_python(json.loads(as_json.render(report))) == report


def test_json_has_no_nan_and_takes_numpy() -> None:
    report = demo_report()
    curve = replace(report.curves[0], values=(math.nan, math.inf, *report.curves[0].values[2:]))
    task = replace(report.tasks[0], n=np.int64(7), p=np.float64(0.25))  # type: ignore[arg-type]
    text = as_json.render(replace(report, curves=(curve,), tasks=(task,)))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    content = json.loads(text, parse_constant=refuse)
    assert content["curves"][0]["values"][:2] == [None, None]
    assert (content["tasks"][0]["n"], content["tasks"][0]["p"]) == (7, 0.25)


def documented() -> dict[str, dict[str, str]]:
    """Section -> key -> type, as docs/report-schema.md has them."""
    sections: dict[str, dict[str, str]] = {}
    for line in SCHEMA.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = sections.setdefault(line[3:], {})
        elif found := re.match(r"\| `(\w+)` \| (.*?) \| .+ \|$", line):
            section[found[1]] = found[2]
    return sections


def visit(value: Any, kind: str, sections: dict[str, dict[str, str]], visited: set[tuple[str, str]]) -> None:
    """Hold a JSON value against its documented type; `visited` gathers (section, key) of what was more than null."""
    base = kind.removesuffix(" or null")
    if value is None:
        assert kind != base or base == "number"  # a number that is not finite
    elif base.startswith("list of pair of "):
        assert all(len(pair) == 2 for pair in value)
        visit([part for pair in value for part in pair], base.replace("pair of ", ""), sections, visited)
    elif base.startswith("list of "):
        for part in value:
            visit(part, base.removeprefix("list of "), sections, visited)
    elif base.startswith("map from role to "):
        for part in value.values():
            visit(part, base.removeprefix("map from role to "), sections, visited)
    elif found := re.fullmatch(r"\[([\w -]+)\]\(#[\w-]+\)", base):
        keys = sections[found[1]]
        assert value.keys() == keys.keys(), found[1]
        for key, part in value.items():
            visit(part, keys[key], sections, visited)
            visited |= {(found[1], key)} if part not in (None, [], {}) else set()
    else:
        types = {"text": (str,), "whole number": (int,), "number": (int, float), "yes or no": (bool,)}
        assert type(value) in types[base], (kind, value)


def test_every_key_is_documented_and_every_documented_key_is_written() -> None:
    sections, visited = documented(), set[tuple[str, str]]()
    for make in REPORTS:
        visit(json.loads(as_json.render(make())), "[report](#report)", sections, visited)
    assert visited == {(section, key) for section, keys in sections.items() for key in keys}
