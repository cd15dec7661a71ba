"""benchmarks/starts.py: its commands are valid recipes that differ in what is compared alone, and its tables."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import starts, starts_picture
from benchmarks.starts import SEEDS, WAYS, Run
from dae.pipeline.recipe import read_pipeline
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def recipe_of(run: Run) -> Any:
    """The student's recipe, from the line of the shell that is printed for it."""
    words = shlex.split(starts.command(run).strip("()"))
    if run.way.pair == "world":
        place = words.index("run") + 1
        path = ROOT / words[place].removeprefix("../../../")
        return next(stage for stage in read_pipeline(path, words[place + 1 :]).pipeline().stages).recipe
    first = words.index("--recipe") + 1
    end = words.index("&&")
    output, settings = words[first + 2], words[first + 3 : end]
    return load_recipe(AlignRecipe, ROOT / words[first], {"output": output}, settings)


@pytest.mark.parametrize("pair", ["world", "category", "questions"])
def test_ways_differ_in_what_is_compared_alone(pair: str) -> None:
    recipes = [recipe_of(Run(way, way.rates[0], SEEDS[1])) for way in WAYS if way.pair == pair]
    assert len({recipe.output for recipe in recipes}) == len(recipes) >= 4
    varied = {"output": "", "start": "base", "lambda_": 1.0, "budget": {}}
    for recipe in recipes:
        train = {key: value for key, value in recipe.train.items() if key not in ("max_steps", "learning_rate")}
        first = {key: value for key, value in recipes[0].train.items() if key in train}
        assert train == first and recipe.seed == SEEDS[1]
        alike = {**varied, "train": {}}
        assert recipe.model_copy(update=alike) == recipes[0].model_copy(update=alike)


def test_the_starts_are_those_of_the_ways() -> None:
    found = {(way.start, str(recipe_of(Run(way, way.rates[0], 0)).start)) for way in WAYS if way.pair == "world"}
    assert found == {("base", "base"), ("auto", "auto"), ("0.5", "{'shop': 0.5}")}


def test_tables_of_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A category run with scores: its line shows test documents only, and that the search is not complete."""
    monkeypatch.setattr(starts, "WORK", tmp_path)
    monkeypatch.setattr(starts, "ends", lambda: {"base": {"0": dict.fromkeys(starts.GROUPS, 0.25)}})
    monkeypatch.setattr(starts, "completion_bytes", lambda _shared, _task: starts.np.full(6, 2.0))
    way = next(way for way in WAYS if way.pair == "category" and way.start == "auto" and way.loss == "dae")
    run = Run(way, way.rates[0], 0)
    scores = {"real_category": [1, 0, 0, 1, 0, 0], "real_stories": [2, 2, 9, 4, 4, 9]}
    tasks = {task: {"documents": [{"score": score} for score in of]} for task, of in scores.items()}
    starts.scores_file(run.folder.name).parent.mkdir(parents=True)
    starts.scores_file(run.folder.name).write_text(json.dumps({"tasks": tasks}))
    run.folder.mkdir()
    (run.folder / "run.json").write_text(json.dumps({"summary": {"start": {"weights": {"domain": 0.3}}}}))
    assert starts.real_figures(run, is_validation=False) == {"category": 0.5, "stories": 1.5}
    assert starts.validation_score(run) == 0.0 - 4.5
    text = starts.markdown(starts.results(list(starts.TITLES)))
    assert "| auto | 0.30 | DAE | 300 | 0.0005 (search not complete) | 1 | 50.0 | 1.500 |" in text
    assert "| base |  |  |  |  | 1 | 25.0 | 25.0 | 25.0 | 25.0 |" in text
    starts_picture.draw(starts.results(list(starts.TITLES)), tmp_path / "starts.svg")
    assert "<!-- 300 -->" in (tmp_path / "starts.svg").read_text()


def test_one_pair_alone_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(starts, "WORK", tmp_path)
    monkeypatch.setattr(starts, "completion_bytes", lambda _shared, _task: starts.np.full(3, 2.0))
    earlier = {"ends": {"base": {}}, "lines": [{"pair": "category", "start": "auto"}, {"pair": "questions"}]}
    run = Run(next(way for way in WAYS if way.pair == "questions"), 5e-3, 0)
    tasks = {task: {"documents": [{"score": 3.0}] * 3} for task in ("real_hetpqa", "real_stories")}
    starts.scores_file(run.folder.name).parent.mkdir(parents=True)
    starts.scores_file(run.folder.name).write_text(json.dumps({"tasks": tasks}))
    run.folder.mkdir()
    (run.folder / "run.json").write_text(json.dumps({"summary": {}}))
    assert starts.validation_score(run) == -3.0
    record = starts.results(["questions"], earlier)
    assert record["ends"] == earlier["ends"] and record["lines"][0] == earlier["lines"][0]
    assert [line["pair"] for line in record["lines"]] == ["category", "questions"]
    assert record["lines"][1]["figures"] == {"0": {"questions": 1.5, "stories": 1.5}}
