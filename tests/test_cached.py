"""benchmarks/cached.py: its runs differ in the cache alone, and its tables show what is there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cached, starts
from benchmarks.cached import KINDS, LIVE, SEEDS
from dae.pipeline.recipe import read_pipeline
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def recipe_of(line: str) -> Any:
    words = shlex.split(line.strip("()"))
    if "run" in words:
        place = words.index("run") + 1
        path = ROOT / words[place].removeprefix("../../../")
        return next(stage for stage in read_pipeline(path, words[place + 1 :]).pipeline().stages).recipe
    first = words.index("--recipe") + 1
    settings = words[first + 3 : words.index("&&")]
    return load_recipe(AlignRecipe, ROOT / words[first], {"output": words[first + 2]}, settings)


@pytest.mark.parametrize("pair", ["world", "category"])
def test_runs_differ_in_the_cache_alone(pair: str) -> None:
    live = recipe_of(starts.command(cached.run_of(pair, LIVE, 0)))
    assert live.cache is None
    recipes = [recipe_of(cached.command(pair, kind, 0)) for kind in KINDS]
    assert len({recipe.output for recipe in recipes}) == len({str(recipe.cache) for recipe in recipes}) == len(KINDS)
    for recipe in recipes:
        assert recipe.model_copy(update={"cache": None, "output": live.output}) == live


def test_the_page_shows_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cached, "figures_of", lambda run: dict.fromkeys(cached.UNITS[run.way.pair], 0.5))
    monkeypatch.setattr(starts.Run, "is_scored", property(lambda run: getattr(run, "kind", "") != "int8"))
    monkeypatch.setattr(cached, "COSTS", tmp_path / "costs.json")
    cost = {"step": 2.0, "bytes": 0}
    costs = {LIVE: cost} | {kind: {"step": 1.5, "fill": 20.0, "bytes": 1e6} for kind in KINDS}
    (tmp_path / "costs.json").write_text(json.dumps({"repeats": 3, "kinds": costs}))
    page = cached.markdown(cached.results())
    assert "| live teachers | 3 | 50.0 (50.0 to 50.0) |" in page
    seeds = len(SEEDS["category"])
    assert f"| live teachers | {seeds} | 50.0 (50.0 to 50.0) | 0.500 (0.500 to 0.500) |" in page
    assert "int8`, minus" not in page
    assert "| `kind: sampled, samples: 12`, minus live | 3 | 0.0 (0.0 to 0.0) |" in page
    assert "| `kind: sampled, samples: 12` | 1.00 | 20 | 1.50 | 0.75 |" in page
    assert all("int8" in line for line in cached.missing_commands())
