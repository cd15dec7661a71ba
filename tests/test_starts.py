"""benchmarks/starts.py: its commands are valid recipes that differ in what is compared alone, and its tables."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import make_model, make_tokenizer
from torch.nn.functional import kl_div

from benchmarks import starts, starts_kl, starts_picture, starts_tables, starts_ways
from benchmarks.starts_pooled import read_pooled
from benchmarks.starts_ways import COEFFICIENTS, SEEDS, WAY_FIELDS, WAYS, Run, Way
from dae.merging.recipe import WeightsRecipe
from dae.pipeline.recipe import read_pipeline
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
TRAINED = tuple(way for way in WAYS if not way.merge)
MERGED = tuple(way for way in WAYS if way.merge)


def recipe_of(run: Run) -> Any:
    """The student's recipe, from the line of the shell that is printed for it."""
    words = shlex.split(starts.command(run).strip("()"))
    if run.way.pair == "world":
        place = words.index("run") + 1
        path = ROOT / words[place].removeprefix("../../../")
        return next(stage for stage in read_pipeline(path, words[place + 1 :]).pipeline().stages).recipe
    if run.way.merge:
        settings = words[3 : words.index("&&")]
        given = {settings[i].removeprefix("--"): settings[i + 1] for i in range(0, 6, 2)}
        return load_recipe(WeightsRecipe, None, given, settings[6:])
    first = words.index("--recipe") + 1
    end = words.index("&&")
    output, settings = words[first + 2], words[first + 3 : end]
    return load_recipe(AlignRecipe, ROOT / words[first], {"output": output}, settings)


def a_run(way: Way, seed: int = SEEDS[0]) -> Run:
    return Run(way, (way.rates or (way.rate_of or way).rates)[-1], seed)


@pytest.mark.parametrize("pair", ["world", "category", "questions"])
def test_ways_differ_in_what_is_compared_alone(pair: str) -> None:
    ways = [way for way in TRAINED if way.pair == pair]
    recipes = [recipe_of(a_run(way, SEEDS[1])) for way in ways]
    assert len({recipe.output for recipe in recipes}) == len(recipes) >= 4
    varied = {"output": "", "start": "base", "lambda_": 1.0, "budget": {}, "lora": None}
    for way, recipe in zip(ways, recipes, strict=True):
        train = {key: value for key, value in recipe.train.items() if key not in ("max_steps", "learning_rate")}
        first = {key: value for key, value in recipes[0].train.items() if key in train}
        assert train == first and recipe.seed == SEEDS[1]
        assert (recipe.lora is None) == way.all_weights
        assert recipe.lora in (None, recipes[0].lora)
        alike = {**varied, "train": {}}
        assert recipe.model_copy(update=alike) == recipes[0].model_copy(update=alike)


def test_the_starts_are_those_of_the_ways() -> None:
    found = {(way.start, str(recipe_of(a_run(way)).start)) for way in TRAINED if way.pair == "world"}
    assert found == {("base", "base"), ("auto", "auto"), ("0.5", "{'shop': 0.5}")}


def test_every_pair_is_merged_by_every_method() -> None:
    recipes = [recipe_of(Run(way, rate, 0)) for way in MERGED for rate in way.rates]
    found = [(recipe.method, recipe.weight) for recipe in recipes]
    assert found == 3 * [(method, rate) for method, rates in COEFFICIENTS.items() for rate in rates]
    assert len({recipe.output for recipe in recipes}) == len(recipes)


def test_other_seeds_wait_for_a_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: dict[float, float | None] = {rate: rate for rate in starts_ways.WARM["category"]}
    monkeypatch.setattr(starts_ways, "validation_score", lambda run: scores.get(run.rate))
    monkeypatch.setattr(Run, "is_scored", property(lambda _: False))
    way, longer = starts_ways.CATEGORY["auto"][0], starts_ways.longer(starts_ways.CATEGORY["auto"][0])

    def missing() -> list[tuple[int, float, int]]:
        return [(run.way.steps, run.rate, run.seed) for run in starts.missing_runs((way, longer))]

    searched = [(300, rate, 0) for rate in way.rates]
    others = [(300, max(way.rates), seed) for seed in (1, 2)]
    assert missing() == searched + others + [(600, max(way.rates), seed) for seed in (0, 1, 2)]
    scores[way.rates[1]] = None
    assert missing() == searched


def test_rates_of_an_earlier_record_take_the_place_of_a_search() -> None:
    """A longer way takes the known rate of the one that it follows; a search that is not complete is none."""
    way, other = starts_ways.CATEGORY["auto"]
    lines = [
        {name: getattr(each, name) for name in WAY_FIELDS} | {"learning_rate": 0.002, "all_rates_tried": done}
        for each, done in ((way, True), (other, False))
    ]
    asked = (way, starts_ways.longer(way), other, starts_ways.longer(other))
    found = starts_ways.with_rates_of({"lines": lines}, asked)
    assert [each.rates for each in found[:2]] == [(0.002,), (0.002,)] and not any(each.rate_of for each in found[:2])
    assert [(each.pair, each.start, each.steps) for each in found] == [(e.pair, e.start, e.steps) for e in asked]
    assert found[2:] == list(asked[2:])


def write_scores(run: Run, **scores: list[float]) -> None:
    tasks = {task: {"documents": [{"score": score} for score in of]} for task, of in scores.items()}
    file = starts_ways.scores_file(run.folder.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"tasks": tasks}))


def test_tables_of_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A category run with scores: its line shows test documents only, and that the search is not complete."""
    monkeypatch.setattr(starts_ways, "WORK", tmp_path)
    monkeypatch.setattr(starts_ways, "DEMOS", tmp_path)
    monkeypatch.setattr(starts_tables, "ends", lambda: {"base": {"0": dict.fromkeys(starts_ways.GROUPS, 0.25)}})
    monkeypatch.setattr(starts_ways, "completion_bytes", lambda _shared, _task: np.full(6, 2.0))
    way = starts_ways.CATEGORY["auto"][0]
    run = Run(way, way.rates[0], 0)
    write_scores(run, real_category=[1, 0, 0, 1, 0, 0], real_stories=[2, 2, 9, 4, 4, 9])
    run.folder.mkdir()
    (run.folder / "run.json").write_text(json.dumps({"summary": {"start": {"weights": {"domain": 0.3}}}}))
    run.kl_file.parent.mkdir()
    run.kl_file.write_text(json.dumps({"general KL": 0.02, "domain KL": 3.0}))
    merged = Run(next(way for way in MERGED if (way.pair, way.merge) == ("category", "task_arithmetic")), 0.5, 0)
    write_scores(merged, real_category=[1, 1, 0, 1, 0, 0], real_stories=[2, 2, 9, 4, 4, 9])
    assert starts_ways.real_figures(run, is_validation=False) == {"category": 0.5, "stories": 1.5}
    assert starts_ways.validation_score(run) == 0.0 - 4.5
    record = starts_tables.results(WAYS, rates_from="search.json")
    text = starts_tables.markdown(record)
    fixed = {"learning_rate": 0.001, "all_rates_tried": True, "searched": False, "merge": "", "weights": {}}
    assert starts_tables.names({**record["lines"][0], **fixed})[-1] == "0.001 (not searched)"
    assert "| auto (0.30) | DAE | 300 | 0.0005 (search not complete) | 1 | 50.0 | 1.500 | 0.020 | 3.000 |" in text
    assert "| merge | task arithmetic, coefficient 0.5 |  |  | 1 | 75.0 | 1.500 |  |  |" in text
    assert "Students of search.json and, at the rates that were chosen there" in text
    assert "| base |  |  |  | 1 | 25.0 | 25.0 | 25.0 | 25.0 |  |  |" in text
    starts_picture.draw(record, tmp_path / "starts.svg")
    assert "<!-- 300 -->" in (tmp_path / "starts.svg").read_text()


def test_one_pair_alone_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(starts_ways, "WORK", tmp_path)
    monkeypatch.setattr(starts_ways, "completion_bytes", lambda _shared, _task: np.full(3, 2.0))
    earlier = {
        "rates": {"world": "a.json"},
        "ends": {"base": {}},
        "lines": [{"pair": "category", "start": "auto"}, {"pair": "questions"}],
    }
    run = Run(next(way for way in TRAINED if way.pair == "questions"), 5e-3, 0)
    write_scores(run, real_hetpqa=[3.0] * 3, real_stories=[3.0] * 3)
    run.folder.mkdir()
    (run.folder / "run.json").write_text(json.dumps({"summary": {}}))
    assert starts_ways.validation_score(run) == -3.0
    record = starts_tables.results([way for way in WAYS if way.pair == "questions"], earlier)
    assert (record["rates"], record["ends"]) == (earlier["rates"], earlier["ends"])
    assert record["lines"][0] == earlier["lines"][0]
    assert [line["pair"] for line in record["lines"]] == ["category", "questions"]
    assert record["lines"][1]["figures"] == {"0": {"questions": 1.5, "stories": 1.5}}


def line_of(way: Way, seeds: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    figures = {seed: dict.fromkeys(starts_ways.GROUPS, value) for seed, value in seeds.items()}
    whole = {"date": "2026-11-30", "learning_rate": 0.001, "all_rates_tried": True, "figures": figures}
    whole |= {"weights": dict.fromkeys(seeds, 0.3), "budgets": {}}
    return {name: getattr(way, name) for name in WAY_FIELDS} | whole | fields


def test_students_of_two_machines_are_further_runs_of_the_same_ways(tmp_path: Path) -> None:
    """At another rate they are another line. The order is that of the ways."""
    base, loss_alone, auto = (way for way in WAYS[:3])
    different = {"pair": "world", "first": ["auto", "dae", 900], "second": ["base", "dae", 900]}

    def record(value: float, lines: list[dict[str, Any]], low: float, **fields: Any) -> dict[str, Any]:
        ends = {"base": {"0": dict.fromkeys(starts_ways.GROUPS, value)}}
        figures = {group: [value, low, 0.9] for group in starts_ways.GROUPS}
        return {"ends": ends, "lines": lines, "differences": [{**different, "seed": 0, "figures": figures}], **fields}

    mine = [line_of(auto, {"0": 0.5, "1": 0.6}), line_of(loss_alone, {"0": 0.1})]
    theirs = [line_of(base, {"0": 0.2}), line_of(auto, {"0": 0.8}), line_of(loss_alone, {"0": 0.3}, learning_rate=0.01)]
    (tmp_path / "starts.json").write_text(json.dumps(record(0.2, mine, -0.1, rates={"world": "search.json"})))
    (tmp_path / "search.json").write_text(json.dumps(record(0.4, theirs, 0.1)))
    text = starts_tables.markdown(read_pooled(tmp_path))
    shown = re.compile(r"^\| (base|auto[^|]*) \| ([^|]*) \| 900 \| ([^|]*) \| (\d) \| ([^|]*) \|", re.MULTILINE)
    assert shown.findall(text) == [
        ("base", "DAE", "0.001", "1", "20.0"),
        ("base", "next-token loss", "0.001", "1", "10.0"),
        ("base", "next-token loss", "0.01", "1", "30.0"),
        ("auto (0.30)", "DAE", "0.001", "3", "63.3 (50.0 to 80.0)"),
    ]
    assert "| base |  |  |  | 2 | 30.0 (20.0 to 40.0)" in text
    assert "| auto, DAE, 900; minus base, DAE, 900 (2 runs) | +30.0 (+20.0 to +40.0); 1 above 0 |" in text
    assert "| auto, DAE, 900; minus base, DAE, 900 | 0, search | +40.0 (+10.0 to +90.0) |" in text


def test_kl_is_over_response_tokens_alone() -> None:
    """The mean over the answers' tokens, whatever the batch is padded to, is the mean of torch's KL."""
    base, student, tokenizer = make_model(seed=0), make_model(seed=1), make_tokenizer()
    documents = [("the price is", " low"), ("in", " the red shop of all"), ("which size", " a b c")]
    expected = []
    for prompt, completion in documents:
        ids = tokenizer(prompt + completion)["input_ids"]
        first = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            log_base, log_student = (
                torch.log_softmax(model(torch.tensor([ids])).logits[0, first - 1 : -1].double(), -1)
                for model in (base, student)
            )
        expected += kl_div(log_student, log_base, reduction="none", log_target=True).sum(-1).tolist()
    assert starts_kl.mean_kl(base, student, tokenizer, documents) == pytest.approx(np.mean(expected), rel=1e-6)
    assert starts_kl.mean_kl(base, base, tokenizer, documents) == 0.0
