"""The trade-off benchmark: its plan, its choice of learning rates, and its runner; nothing is trained."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pico import make_checkpoint

from benchmarks import (
    real_pair,
    trade_off,
    trade_off_inputs,
    trade_off_plan,
    trade_off_scores,
)
from benchmarks.trade_off_commands import Job, jobs, making
from benchmarks.trade_off_plan import BLOCKS, GRID, WAYS, Plan, Run, grid_runs, planned_runs, tuned_ways
from dae.demo import story, world
from dae.merging.recipe import MoeRecipe, WeightsRecipe
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.config.schema import Frozen
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS: dict[str, type[Frozen]] = {
    "sft": SftRecipe,
    "align": AlignRecipe,
    "distill": DistillRecipe,
    "merge moe": MoeRecipe,
    "merge weights": WeightsRecipe,
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)  # recipes are named from the repository's root
    folders = (tmp_path / "shared", tmp_path / "work", tmp_path / "demo", tmp_path / "real")
    return Plan(*folders, (0, 1, 2), ("alignment", "distillation", "mixture"), ("world", "real"))


def all_rates(plan: Plan, rate: float = GRID[0]) -> dict[Any, float]:
    return dict.fromkeys(tuned_ways(plan), rate)


def recipe_of(command: Iterable[str]) -> Any:
    """A printed command, read as the command line reads it."""
    _, *words = command
    stage = " ".join(words[:2]) if words[0] == "merge" else words[0]
    rest = iter(words[len(stage.split()) :])
    recipe, flags, assignments = None, dict[str, Any](), []
    for word in rest:
        if not word.startswith("--"):
            assignments.append(word)
            continue
        value, key = next(rest), word[2:]
        name, equals, path = value.partition("=")
        named = (f".{name}", path) if equals else ("", value)
        if key == "recipe":
            recipe = Path(value)
        elif key == "expert" and stage == "merge moe":
            flags[f"experts.{name}"] = {"path": path}
        elif key in ("expert", "domain-data"):
            flags[("expert" if key == "expert" else "data") + named[0]] = named[1]
        else:
            flags[{"data": "data.train", "general-data": "data.general"}.get(key, key)] = value
    return load_recipe(SCHEMAS[stage], recipe, flags, assignments)


def recipe_of_run(plan: Plan, run: Run) -> Any:
    return recipe_of(making(plan, run))


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_every_command_is_a_valid_recipe_and_waits_for_what_it_reads(plan: Plan) -> None:
    before: set[str] = set()
    stages: set[str] = set()
    for job in jobs(plan, all_rates(plan), {}):
        assert set(job.after) <= before, job.name
        assert job.name not in before
        before.add(job.name)
        for command in job.commands:
            if command[0] == "dae" and command[1] in ("sft", "align", "distill", "merge"):
                recipe = recipe_of(command)
                stages.add(command[1])
                made = [str(path) for path in (plan.work, plan.demo_runs, plan.real_runs)]
                bases = [value for value in (recipe.base, getattr(recipe, "teacher", None)) if value]
                assert all(base.startswith((*made, str(plan.shared))) for base in bases)
    assert stages == {"sft", "align", "distill", "merge"}
    # Every planned model is trained or merged, and scored, unless another benchmark does so.
    for run in planned_runs(plan, all_rates(plan)):
        assert run.is_finished_elsewhere or {run.name, f"score-{run.name}"} <= before


def test_grids_come_before_what_waits_for_them_and_blocks_in_their_order(plan: Plan) -> None:
    names = [job.name for job in jobs(plan, {}, {})]
    assert not any(job.startswith("score-world-dae") for job in names), "no test score before the rate is chosen"
    grid = [run for pair, way in tuned_ways(plan) for run in grid_runs(plan, pair, way)]
    assert {f"validate-{run.name}" for run in grid if run.pair == "world"} <= set(names)
    known = [job.name for job in jobs(plan, all_rates(plan), {})]
    places = [
        known.index(name)
        for name in ("score-world-linear-0.3-0", "world-sft-lr0.0015-0", "world-dae-0.3-lr0.0015-0", "real-pair")
    ]
    assert places == sorted(places)
    assert known.index("world-dae-0.1-lr0.0015-0") > known.index("world-dense-lr0.0015-2")
    assert {(part, pair) for part, pair, _ in BLOCKS} == {
        (way.part, pair) for pair, ways in WAYS.items() for way in ways.values()
    }


def same_but(one: Any, other: Any, **differing: Any) -> None:
    """Two recipes that are equal but for `output` and the keys given with the second one's values."""
    for key, value in differing.items():
        assert getattr(one, key) != value
        assert getattr(other, key) == value
    back = {key: getattr(one, key) for key in ("output", *differing)}
    assert other.model_copy(update=back) == one


@pytest.mark.parametrize("pair", ["world", "real"])
def test_sides_differ_in_what_is_compared_alone(plan: Plan, pair: trade_off_plan.Pair) -> None:
    for at in WAYS[pair]["dae"].settings:
        dae, ntp = (recipe_of_run(plan, Run(pair, way, at, 1, 6e-3)) for way in ("dae", "ntp"))
        same_but(dae, ntp, lambda_=0.0)
        assert dae.train["learning_rate"] == 6e-3
        assert dae.seed == 1
    sft, kd, attention = (
        recipe_of_run(plan, Run(pair, way, None, 1, 3e-3)) for way in ("small_sft", "small_kd", "small_attention")
    )
    assert (kd.base, kd.data, kd.train, kd.lora, kd.seed) == (
        sft.base,
        sft.data,
        sft.train,
        sft.lora,
        sft.seed,
    )
    assert kd.lambda_ == 1.0
    same_but(kd, attention, attention=attention.attention)
    assert attention.attention.weight == 1.0
    assert attention.attention.layers == ("even" if pair == "world" else ((0, 0), (1, 2), (2, 4)))
    dense = recipe_of_run(plan, Run(pair, *(("dense", None) if pair == "world" else ("dae", 1.0)), 1, 3e-3))
    moe = recipe_of_run(plan, Run(pair, "moe", None, 1, 3e-3))
    same_but(dense, moe, base=str(plan.work / f"{pair}-mixture-{1 if pair == 'world' else 0}"))
    if pair == "world":
        merged = recipe_of_run(plan, Run(pair, "merged", None, 1, 3e-3))
        same_but(dense, merged, base=str(plan.work / "world-linear-0.5-1"))
    assert moe.lora is None
    domain = recipe_of_run(plan, Run(pair, "sft", None, 1, 3e-3))
    dae = recipe_of_run(plan, Run(pair, "dae", WAYS[pair]["dae"].settings[0], 1, 3e-3))
    assert rows_and_steps(domain) == rows_and_steps(dae)


def rows_and_steps(recipe: Any) -> tuple[int, int]:
    train = recipe.train
    return train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1), train["max_steps"]


def test_settings_are_shares_on_the_world_and_weights_on_the_real_pair(plan: Plan) -> None:
    for at in WAYS["world"]["dae"].settings:
        recipe = recipe_of_run(plan, Run("world", "dae", at, 0, 3e-3))
        assert recipe.data.routes["shop"][0].share == pytest.approx(at)
        assert recipe.weights == "routes"
    for at in WAYS["real"]["dae"].settings:
        recipe = recipe_of_run(plan, Run("real", "dae", at, 0, 3e-3))
        assert recipe.weights == ("routes" if at == 1.0 else {"domain": at, "general": 1.0})


def test_runs_finished_elsewhere_are_those_that_would_be_made_here(plan: Plan) -> None:
    """Otherwise the same line of the table would stand for two kinds of student."""
    theirs = [command for _, command in story.commands(plan.demo(1), ROOT / "recipes" / "demo", 1)]
    demo = [command for command in theirs if command[1] == "align"]
    for way, command in zip(("dae", "ntp"), demo, strict=True):
        run = Run("world", way, 0.7, 1, 3e-3)
        assert run.is_finished_elsewhere
        ours = recipe_of_run(plan, run)
        finished = recipe_of(command)
        assert Path(finished.output) == trade_off_plan.checkpoint(plan, run)
        assert ours.model_copy(update={"output": finished.output}) == finished
        assert not replace(run, at=0.3).is_finished_elsewhere
        assert not replace(run, rate=6e-3).is_finished_elsewhere
    real = real_pair.Plan(plan.shared, plan.real_runs, ("questions",), ("full",), (1,))
    for way in ("dae", "ntp"):
        run = Run("real", way, 1.0, 1, 3e-3)
        job = real_pair.student_job(real, "questions", "full", way, 1)
        ours, finished = recipe_of_run(plan, run), recipe_of(job.commands[0])
        assert Path(finished.output) == trade_off_plan.checkpoint(plan, run)
        assert trade_off_plan.test_scores(plan, run) == real_pair.scores_file(real, job.name)
        assert ours.model_copy(update={"output": finished.output, "reference": None}) == finished


# -- figures and learning rates ----------------------------------------------------------------------------------------


def test_the_search_for_a_rate_ends_with_the_best_between_two_worse_ones(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[str, float] = {
        "world-dae-0.7-lr0.0015-0": 0.8,
        "world-dae-0.7-lr0.003-0": 0.9,
        "world-dae-0.7-lr0.006-0": 0.9,  # a tie: the lower one
        "real-sft-lr0.0015-0": -1.0,
        "real-sft-lr0.003-0": -1.2,  # and one is missing
    }
    monkeypatch.setattr(trade_off_scores, "validation_score", lambda _, run: scores.get(run.name))

    def found() -> tuple[dict[Any, float], tuple[float, ...]]:
        tuned = trade_off_scores.tuning(plan)
        assert trade_off_scores.grids(tuned)["world", "dae"] == GRID
        return trade_off_scores.chosen_rates(tuned), trade_off_scores.grids(tuned)["real", "sft"]

    assert found() == ({("world", "dae"): 3e-3}, GRID)
    scores["real-sft-lr0.006-0"] = -1.3
    assert found() == ({("world", "dae"): 3e-3}, (0.75e-3, *GRID)), "the best stands at an end: beyond it"
    scores["real-sft-lr0.00075-0"] = -1.1
    assert found() == ({("world", "dae"): 3e-3, ("real", "sft"): 1.5e-3}, (0.75e-3, *GRID))
    scores["real-sft-lr0.00075-0"], scores["real-sft-lr0.000375-0"] = -0.9, -0.8
    scores["real-sft-lr0.0001875-0"] = -0.7
    rates, tried = found()
    assert rates["real", "sft"] == tried[0] == GRID[0] / 8, "no further than that"
    scores["real-sft-lr0.006-0"] = -0.1
    assert found()[1] == (*GRID, 12e-3)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_real(plan: Plan, run: Run) -> None:
    """Nine documents a task of 10 bytes each; document i costs i bits. Document 1 of hetPQA was seen in training."""
    data = plan.shared / "data"
    rows = [{"prompt": f"Question: q\nEvidence: e{i}\nAnswer:", "completion": "0123456789"} for i in range(9)]
    write_rows(data / "ecom/heldout_hetpqa.jsonl", rows)
    write_rows(data / "ecom/heldout_epqa.jsonl", rows)
    write_rows(data / "ecom/train.jsonl", [rows[1]])
    write_rows(data / "general/heldout_stories.jsonl", [{"text": "0123456789"} for _ in range(9)])
    documents = [{"id": i, "hash": str(i), "score": float(i)} for i in range(9)]
    tasks = {task: {"documents": documents} for task in ("real_hetpqa", "real_epqa", "real_stories")}
    tasks["real_story_endings"] = {"documents": [{**document, "score": 1.0} for document in documents[:2]]}
    path = trade_off_plan.test_scores(plan, run)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"tasks": tasks}), encoding="utf-8")


def test_every_third_document_of_the_real_pair_is_for_validation(plan: Plan) -> None:
    run = Run("real", "sft", None, 0, 3e-3)
    assert trade_off_scores.test_figures(plan, run) is None
    assert trade_off_scores.validation_score(plan, run) is None
    write_real(plan, run)
    figures = trade_off_scores.test_figures(plan, run)
    assert figures is not None
    stories, het, e = (0 + 1 + 3 + 4 + 6 + 7) / 60, (0 + 3 + 4 + 6 + 7) / 50, sum(range(9)) / 90
    assert figures == pytest.approx(
        {"general": stories, "hetPQA": het, "ePQA": e, "domain": (het + e) / 2, "story endings": 1.0}
    )
    assert trade_off_scores.validation_score(plan, run) == pytest.approx(-(2 + 5 + 8) / 30)
    few = trade_off_scores.test_figures(replace(plan, limit=4), run)
    assert few is not None
    assert few["general"] == pytest.approx((0 + 1 + 3) / 30)


def test_validation_documents_are_no_test_documents(tmp_path: Path) -> None:
    found = trade_off_inputs.validation_documents()
    tested = world.documents()
    taught = {row.key for row in world.general_rows("align", world.ALIGNED_SKILLS, world.GENERAL_ALIGN_ROWS)}
    for name, quartets in found.items():
        prompts = {question.prompt for quartet in quartets for question in quartet}
        assert len(quartets) == len(tested[name])
        assert not prompts & {question.prompt for quartet in tested[name] for question in quartet}
        assert all(len({question.answer for question in quartet}) == 4 for quartet in quartets)
        keys = {question.key for quartet in quartets for question in quartet}
        if name in world.DRILLS:
            assert not keys & {question.key for quartet in tested[name] for question in quartet}
        if name in world.DRILLS and name != "arithmetic":
            assert not keys & taught
    facts = world.catalogue()
    assert all(q.answer == facts["price"].values[q.key.split(":")[1]] for quartet in found["price"] for q in quartet)
    asked = {question.prompt for row in world.shop_rows(world.SHOP_KINDS) for question in (row,)}
    assert not asked & {q.prompt for kind in world.ALIGNED_KINDS for quartet in found[kind] for q in quartet}


def test_the_smaller_real_student_keeps_three_of_five_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path / "base", "llama", num_hidden_layers=5)
    trade_off_inputs.save_small_real(tmp_path / "base", tmp_path / "small")
    base, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("base", "small"))
    assert {name.split(".")[2] for name in small if ".layers." in name} == {"0", "1", "2"}
    for ours, theirs in (("0", "0"), ("1", "2"), ("2", "4")):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert small[name.format(ours)].equal(base[name.format(theirs)])


# -- the runner --------------------------------------------------------------------------------------------------------


def touch(path: Path, text: str = "x") -> tuple[str, ...]:
    return ("python", "-c", f"open({str(path)!r}, 'a').write({text!r})")


def run_jobs(plan: Plan, planned: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(trade_off, "jobs", lambda *_: planned)
    monkeypatch.setattr(trade_off, "write_results", lambda _plan, _output: None)
    return trade_off.run_all(plan, 2, plan.work / "results")


def test_finished_jobs_stay_and_what_waits_for_a_failed_one_does_not_start(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, late, never = (tmp_path / name for name in ("once", "late", "never"))
    failing = Job("failing", (("python", "-c", "raise SystemExit(3)"), touch(never)))
    planned = [
        Job("first", (touch(once),)),
        Job("second", (touch(late),), ("first",)),
        failing,
        Job("waiting", (touch(never),), ("failing", "first")),
        Job("elsewhere", (touch(never),), made=(tmp_path,)),
    ]
    assert run_jobs(plan, planned, monkeypatch) == ["failing", "waiting"]
    assert not never.exists()
    assert run_jobs(plan, planned, monkeypatch) == ["failing", "waiting"]
    assert (once.read_text(), late.read_text()) == ("x", "x")
    changed = [Job("first", (touch(once, "y"),)), *planned[1:2], replace(failing, commands=(touch(late, "z"),))]
    assert run_jobs(plan, changed, monkeypatch) == []
    assert (once.read_text(), late.read_text()) == ("xy", "xz")


def test_a_stop_ends_what_runs_and_starts_nothing_more(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, never = tmp_path / "started", tmp_path / "never"
    endless = ("python", "-c", f"import time; open({str(started)!r}, 'w').close(); time.sleep(600)")
    planned = [Job("endless", (endless, touch(never))), Job("next", (touch(never),), ("endless",))]

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run_jobs(plan, planned, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not never.exists()
    assert not trade_off.is_finished(plan, planned[0])


def test_a_word_of_a_command_becomes_a_process_of_this_interpreter() -> None:
    assert trade_off.as_process(("dae", "sft")) == [sys.executable, "-m", "dae", "sft"]
    assert trade_off.as_process(("python", "benchmarks/x.py")) == [sys.executable, "benchmarks/x.py"]


def test_examples_are_one_command_of_each_kind_with_the_usual_folders(plan: Plan) -> None:
    commands = trade_off.example_commands(plan, {("world", "dae"): 6e-3})
    assert len(commands) == len(set(commands))
    assert not any(str(folder) in command for folder in (plan.shared, plan.work, ROOT) for command in commands)
    trained = [command for command in commands if "--output runs/trade_off/world-dae-0.7-lr0.006-0" in command]
    assert len(trained) == 1
    assert "seed=0" in trained[0]
    for pair, ways in WAYS.items():
        for way in ways:
            first = Run(pair, way, trade_off_plan.first_setting(pair, way), 0, None)
            assert sum(first.name[:-2] in command for command in commands) or way in ("dae", "ntp")
    assert sum(command.startswith("dae eval") for command in commands) == 2
