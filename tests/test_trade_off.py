"""The trade-off benchmark: its recipes, learning rates, figures and tables; nothing is trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pico import make_checkpoint

from benchmarks import trade_off, trade_off_inputs, trade_off_tables
from benchmarks.trade_off import SEEDS, WAYS, Run, grid_runs, planned_runs
from dae.demo import story, world
from dae.pipeline.recipe import read_pipeline
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALL_RATES = {(pair, name): way.rates[0] for pair, ways in WAYS.items() for name, way in ways.items() if way.rates}


def stages_of(run: Run) -> dict[str, Any]:
    """The recipes of a run's stages, from the line of the shell that is printed for it."""
    words = shlex.split(trade_off.command(run).strip("()"))
    place = words.index("run") + 1
    end = words.index("&&", place) if "&&" in words[place:] else len(words)
    path = ROOT / words[place].removeprefix("../../../")
    return {stage.name: stage.recipe for stage in read_pipeline(path, words[place + 1 : end]).pipeline().stages}


def student(pair: str, way: str, at: float | None = None, seed: int = 1, rate: float | None = 3e-3) -> Any:
    return stages_of(Run(pair, way, at, seed, rate))["student"]


# -- the recipes and their commands ------------------------------------------------------------------------------------


def test_every_printed_command_is_a_valid_recipe() -> None:
    grids = [run for pair, ways in WAYS.items() for way in ways for run in grid_runs(pair, way)[:1]]
    runs = {*grids, *(run for run in planned_runs(ALL_RATES) if run.seed == SEEDS[1] and run.way not in trade_off.ENDS)}
    outputs = {(run.pair, stages_of(run)["student"].output) for run in runs}
    assert len(outputs) == len(runs)
    used = {f"{pair}_{way.recipe}.yaml" for pair, ways in WAYS.items() for way in ways.values()}
    assert {path.name for path in (ROOT / trade_off.RECIPES).iterdir()} == used


def same_but(one: Any, other: Any, **differing: Any) -> None:
    """Two recipes that are equal but for `output` and the keys given with the second one's values."""
    for key, value in differing.items():
        assert getattr(one, key) != value
        assert getattr(other, key) == value
    assert other.model_copy(update={key: getattr(one, key) for key in ("output", *differing)}) == one


@pytest.mark.parametrize("pair", ["world", "real"])
def test_sides_differ_in_what_is_compared_alone(pair: str) -> None:
    for at in WAYS[pair]["dae"].settings:
        dae = student(pair, "dae", at, rate=6e-3)
        same_but(dae, student(pair, "ntp", at, rate=6e-3), lambda_=0.0)
        assert (dae.train["learning_rate"], dae.seed) == (6e-3, 1)
    small, kd, attention = (student(pair, way) for way in ("small_sft", "small_kd", "small_attention"))
    assert all(getattr(kd, key) == getattr(small, key) for key in ("base", "data", "train", "lora", "seed"))
    assert kd.lambda_ == 1.0
    same_but(kd, attention, attention=attention.attention)
    assert attention.attention.weight == 1.0
    assert attention.attention.layers == ("even" if pair == "world" else ((0, 0), (1, 2), (2, 4)))
    domain, mixed = student(pair, "sft"), student(pair, "dae", WAYS[pair]["dae"].settings[0])
    assert rows_and_steps(domain) == rows_and_steps(mixed)
    moe, dense = student(pair, "moe"), student(pair, *(("dense",) if pair == "world" else ("dae", 1.0)))
    whole_expert = {} if pair == "real" else {"expert": moe.expert}  # the same weights, merged in each run's folder
    same_but(dense, moe, base=moe.base, **whole_expert)
    assert moe.base.endswith("moe-lr0.003-1/mixture") and moe.lora is None
    if pair == "world":
        merged = stages_of(Run(pair, "merged", None, 1, 3e-3))
        same_but(dense, merged["student"], base=merged["merged"].output, expert=merged["student"].expert)


def rows_and_steps(recipe: Any) -> tuple[int, int]:
    train = recipe.train
    return train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1), train["max_steps"]


def test_settings_are_shares_on_the_world_and_weights_on_the_real_pair() -> None:
    for at in WAYS["world"]["dae"].settings:
        assert at is not None
        recipe = student("world", "dae", at)
        shares = [recipe.data.routes[route][0].share for route in ("shop", "general")]
        assert (shares, recipe.weights) == (pytest.approx([at, 1 - at]), "routes")
    assert [student("real", "dae", at).weights for at in (1.0, 0.25)] == ["routes", {"domain": 0.25, "general": 1.0}]
    merged = student("real", "dare_ties", 0.3, seed=2, rate=None)
    assert (merged.method, merged.weight, merged.seed) == ("dare_ties", 0.3, 2)


def test_the_students_of_the_demo_are_those_of_the_first_setting() -> None:
    """But for where the demo's start, and the learning rate that goes with it."""
    commands = [words for _, words in story.commands(Path(), ROOT / "recipes" / "demo", 1) if words[1] == "align"]
    for way, words in zip(("dae", "ntp"), commands, strict=True):
        ours = student("world", way, 0.7)
        train = {**ours.train, "learning_rate": 1e-3}
        ours = ours.model_copy(update={"start": "auto", "train": train})
        flags = {"base": ours.base, "reference": ours.reference, "expert.shop": "expert", "output": ours.output}
        flags |= {"data.shop": "world/shop_align.jsonl", "data.general": "world/general_align.jsonl"}
        assert (
            load_recipe(
                AlignRecipe,
                Path(words[3]),
                flags,
                [word for word in words if word.startswith(("data.", "lambda", "seed"))],
            )
            == ours
        )


# -- what is missing, and learning rates -------------------------------------------------------------------------------


def touch(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_commands_wait_for_what_they_start_from_and_for_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = trade_off.missing_commands()
    assert [line.split(" --")[0] for line in first] == [
        "dae demo", "dae demo", "dae demo",
        "python benchmarks/trade_off_inputs.py real runs/trade_off/small",
        "dae run benchmarks/recipes/real_pair.yaml && python benchmarks/real_pair.py",
    ]  # fmt: skip
    for seed in SEEDS:
        touch(Path(f"runs/demo_seeds/seed-{seed}/report/report.json"))
        touch(Path(f"runs/demo_seeds/seed-{seed}/small/config.json"))
    for name in (
        "trade_off/small/config.json",
        "real_pair/scores/base.json",
        "real_pair/scores/questions-full-expert.json",
    ):
        touch(Path("runs", name))
    scores: dict[Run, float] = {}
    monkeypatch.setattr(trade_off, "validation_score", scores.get)
    merges = [run for run in planned_runs({}) if run.way not in trade_off.ENDS]
    grids = [run for pair in WAYS for way in WAYS[pair] for run in grid_runs(pair, way)]
    assert trade_off.missing_commands() == [trade_off.command(run) for run in [*merges, *grids]]
    for run in grid_runs("world", "dae"):
        touch(run.scores / "evaluation.json")
        scores[run] = 0.9 if run.rate else 0.0  # equal: the lowest
    more = [run for run in planned_runs({("world", "dae"): 0.0015}) if run.way == "dae" and not run.is_scored]
    missing = trade_off.missing_commands()
    assert len(more) == 8 and set(map(trade_off.command, more)) <= set(missing)
    assert len(missing) == len(merges) + len(grids) - 3 + 8


def test_a_rate_is_chosen_when_all_have_been_scored_and_the_lower_one_of_equals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = dict(zip(grid_runs("world", "dae"), (0.8, 0.9, 0.9), strict=True))
    found |= dict(zip(grid_runs("real", "small_sft"), (-1.0, -1.2), strict=False))
    monkeypatch.setattr(trade_off, "validation_score", found.get)
    assert trade_off.chosen_rates(trade_off.tuning()) == {("world", "dae"): 3e-3}


# -- figures and documents ---------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    touch(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_every_third_document_of_the_real_pair_is_for_validation(tmp_path: Path) -> None:
    """Nine documents a task of 10 bytes each; document i costs i bits. Document 1 of hetPQA was seen in training."""
    data = tmp_path / "shared" / "data"
    rows = [{"prompt": f"Question: q\nEvidence: e{i}\nAnswer:", "completion": "0123456789"} for i in range(9)]
    write_rows(data / "ecom/heldout_hetpqa.jsonl", rows)
    write_rows(data / "ecom/heldout_epqa.jsonl", rows)
    write_rows(data / "ecom/train.jsonl", [rows[1]])
    write_rows(data / "general/heldout_stories.jsonl", [{"text": "0123456789"} for _ in range(9)])
    documents = [{"id": i, "hash": str(i), "score": float(i)} for i in range(9)]
    tasks: dict[str, Any] = {task: {"documents": documents} for task in ("real_hetpqa", "real_epqa", "real_stories")}
    tasks["real_story_endings"] = {"documents": [{**document, "score": 1.0} for document in documents[:2]]}
    touch(tmp_path / "scores.json", json.dumps({"tasks": tasks}))
    stories, het, e = (0 + 1 + 3 + 4 + 6 + 7) / 60, (0 + 3 + 4 + 6 + 7) / 50, sum(range(9)) / 90
    figures = trade_off.real_figures(tmp_path / "scores.json", is_validation=False, shared=tmp_path / "shared")
    assert figures == pytest.approx(
        {"general": stories, "hetPQA": het, "ePQA": e, "domain": (het + e) / 2, "story endings": 1.0}
    )
    validation = trade_off.real_figures(tmp_path / "scores.json", is_validation=True, shared=tmp_path / "shared")
    assert validation == pytest.approx({"general": (2 + 5 + 8) / 30, "hetPQA": (2 + 5 + 8) / 30})


def test_validation_documents_are_no_test_documents() -> None:
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
    asked = {question.prompt for question in world.shop_rows(world.SHOP_KINDS)}
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


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_committed_tables_follow_from_the_committed_figures(tmp_path: Path) -> None:
    record = json.loads((RESULTS / "trade_off.json").read_text(encoding="utf-8"))
    assert trade_off_tables.markdown(record) == (RESULTS / "trade_off.md").read_text(encoding="utf-8")
    trade_off_tables.write_tables({**record, "results": record["results"][:6]}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"trade_off.{kind}" for kind in ("json", "md", "svg", "png")}


def line(way: str, *seeds: tuple[float, float]) -> dict[str, Any]:
    figures = {str(seed): {"domain": domain, "general": general} for seed, (domain, general) in enumerate(seeds)}
    return {
        "pair": "world",
        "way": way,
        "part": "alignment",
        "title": way,
        "setting": "",
        "at": None,
        "figures": figures,
    }


def test_means_differences_and_front_by_hand() -> None:
    dae = line("dae", (0.9, 0.9), (0.8, 0.92), (1.0, 0.94))
    ntp = line("ntp", (0.85, 0.9), (0.85, 0.9), (0.85, 0.9))
    low = line("linear", (0.5, 0.99))
    assert trade_off_tables.cell("world", trade_off_tables.values_of(dae, "domain")) == "90.0 (80.0 to 100.0)"
    assert trade_off_tables.front([dae, ntp, low], "world") == {0, 2}
    ((title, _, values),) = trade_off_tables.difference_rows([dae, ntp], "dae", "ntp")
    assert title == "dae minus ntp"
    assert values["domain"] == pytest.approx([0.05, -0.05, 0.15])
    assert trade_off_tables.cell("world", values["domain"], "+") == "+5.0 (-5.0 to +15.0)"
