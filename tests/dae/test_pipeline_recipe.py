"""The recipe of `dae run`: references, mistakes told at once, commands, and what a terminal shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from dae_eval.suites import load_suite
from pico import make_checkpoint
from pico_tasks import make_suite, make_tasks
from rich.console import Console
from worlds import make_adapter, make_rows

from dae.pipeline.kinds import ReportStage, kinds
from dae.pipeline.recipe import Pipeline, Stage, read_pipeline
from dae.pipeline.stages import command_of, run_pipeline
from dae.pipeline.state import Fingerprints, PipelineFolder
from dae.pipeline.view import View, duration
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe, resolved_yaml
from kd.errors import UserError
from kd.models.checkpoint import checkpoint

SHIPPED = Path(__file__).parents[2] / "recipes"
EXPERT = {"stage": "sft", "base": "base", "data": {"train": "shop.jsonl"}}
ALIGNED = {"stage": "align", "base": "base", "expert": {"shop": "@expert"}, "data": {"general": "general.jsonl"}}
EVAL = {"model": "@expert", "suite": "suite.yaml"}


def read(folder: Path, stages: dict[str, Any], *assignments: str) -> Pipeline:
    path = folder / "path.yaml"
    path.write_text(yaml.safe_dump({"output": "runs", "stages": stages}, sort_keys=False))
    return read_pipeline(path, assignments).pipeline()


def message(folder: Path, stages: dict[str, Any], *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, stages, *assignments)
    return str(caught.value)


# -- references --------------------------------------------------------------------------------------------------------


def test_references_become_places_and_stay_references_in_the_settings(tmp_path: Path) -> None:
    expert, aligned = read(tmp_path, {"expert": {**EXPERT, "merge": True}, "aligned": ALIGNED}).stages
    assert isinstance(aligned.recipe, AlignRecipe)
    assert (aligned.recipe.expert, aligned.recipe.output) == ({"shop": "runs/expert"}, "runs/aligned")
    assert [source.path for source in aligned.recipe.data.routes["shop"]] == ["shop.jsonl"]
    assert (aligned.upstream, expert.upstream) == ({"expert"}, frozenset())
    assert aligned.settings()["expert"] == {"shop": "@expert"}
    assert "output" not in aligned.settings()


def test_parts_of_outputs_and_places_of_one_s_own(tmp_path: Path) -> None:
    stages = {
        "sft": {"base": "base", "data": {"train": "shop.jsonl"}, "merge": True, "output": "mine/expert"},
        "sample": {"model": "@sft"},
        "more": {**EXPERT, "base": "@sft/merged", "data": {"train": ["@sample", "shop.jsonl"], "eval": {"train": "h"}}},
        "eval": {"model": "@more", "suite": "suite.yaml"},
        "report": {"from": {"student": "@eval"}},
        "again": {"stage": "report", "from": {"student": "@report/evaluations/student"}},
    }
    found = {stage.name: stage for stage in read(tmp_path, stages).stages}
    assert [str(found[name].output) for name in ("sft", "sample", "more")] == [
        "mine/expert", "runs/sample.jsonl", "runs/more",
    ]  # fmt: skip
    paths = {one.name: one.path for one in found["more"].inputs}
    assert paths == {
        "base": "mine/expert/merged", "data.train.0.path": "runs/sample.jsonl", "data.train.1.path": "shop.jsonl",
        "data.eval.train.0.path": "h",
    }  # fmt: skip
    assert found["more"].settings()["data"]["train"][0]["path"] == "@sample"
    assert found["report"].settings()["from"] == {"student": "@eval"}
    assert found["again"].upstream == {"report"}


def test_aliases_of_yaml_are_not_one_object(tmp_path: Path) -> None:
    path = tmp_path / "path.yaml"
    path.write_text(
        "output: runs\nstages:\n"
        "  a: {stage: sft, base: b, data: {train: t}, train: &t {max_steps: 4}}\n"
        "  b: {stage: sft, base: b, data: {train: t}, train: *t}\n"
    )
    stages = read_pipeline(path, ["stages.a.train.max_steps=7"]).pipeline().stages
    assert [stage.settings()["train"]["max_steps"] for stage in stages] == [7, 4]


WRONG = [
    ({"base": "@exprt"}, "stages.next.base = '@exprt': unknown stage; did you mean `expert`?"),
    ({"base": "@later"}, "stages.next.base = '@later': is a later stage"),
    ({"base": "@next"}, "stages.next.base = '@next': is this stage itself"),
    ({"base": "@expert"}, "stages.next.base = '@expert': expected a full checkpoint"),
    ({"base": "@expert/merged"}, "add `merge: true` to `expert`"),
    ({"base": "@full/merged"}, "its weights are full: write \"@full\""),
    ({"base": "@full/part"}, "`full` has no part `part`: write \"@full\""),
    ({"base": "@rows"}, "stages.next.base = '@rows': expected a full checkpoint, but `rows` (sample) writes rows"),
    ({"data": {"train": "@full"}}, "path = '@full': expected rows, but `full` (sft) writes a checkpoint"),
    ({"base": "runs/full"}, "stages.next.base = 'runs/full': is the output of an earlier stage: write \"@full\""),
    ({"base": "runs/x/../expert/merged"}, 'write "@expert/merged"'),
    ({"output": "@full"}, "stages.next.output = '@full': "),
    ({"output": "runs/full"}, "stages.next.output = 'runs/full': is also the output of `full`"),
    ({"output": "runs"}, "stages.next.output = 'runs': "),
    ({"data": {"train": "t", "chat_template": "@full"}}, "stages.next.data.chat_template = '@full': "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_references_that_lead_nowhere_or_elsewhere(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    stages = {
        "expert": EXPERT,
        "full": {**EXPERT, "lora": None},
        "rows": {"stage": "sample", "model": "base"},
        "next": {**EXPERT, **change},
        "later": EXPERT,
    }
    told = message(tmp_path, stages)
    assert words in told
    assert "\n" not in told


def test_an_adapter_beside_another_base_is_told_before_anything_runs(tmp_path: Path) -> None:
    stages = {"student": {**EXPERT, "merge": True}, "expert": EXPERT, "aligned": {**ALIGNED, "base": "@student/merged"}}
    assert message(tmp_path, stages).endswith(
        "stages.aligned.expert.shop = '@expert': is an adapter on base, but the base is @student/merged: train it "
        'on that one, or add `merge: true` to `expert` and write "@expert/merged"'
    )
    stages["expert"] = {**EXPERT, "base": "@student/merged"}
    assert len(read(tmp_path, stages).stages) == 3


def test_a_reference_without_quotes_is_explained(tmp_path: Path) -> None:
    (tmp_path / "path.yaml").write_text("output: o\nstages:\n  a: {stage: sft, base: @b}\n")
    with pytest.raises(UserError, match=r'path.yaml:3: .*YAML.*in quotes: "@NAME"'):
        read_pipeline(tmp_path / "path.yaml")


# -- mistakes ----------------------------------------------------------------------------------------------------------

FULL_OF_MISTAKES = """\
output: runs
stage: 3
stages:
  expert:
    stage: sft
    base: nowhere
    data: {trin: shop.jsonl}
    train: {learning_rat: 3}
  rows: {stage: sample, model: base, temperatur: 3}
  merge: {base: base}
  student: {stage: distil, base: base}
  2nd: {stage: sft}
  nameless: {base: base}
  text: base
  mixture: {stage: merge moe, base: base, experts: [base, base]}
  aligned:
    stage: align
    base: base
    expert: {shop: "@expertt"}
    data: {shop: shop.jsonl, general: missing.jsonl}
  scores: {stage: eval, model: base, suite: {file: suite.yaml, set: {batchsize: 3}}}
  report: {student: base, compare: {base: base}, suite: none.yaml}
"""
MISTAKES = """\
dae.yaml:2: stage = 3: unknown key; did you mean `stages`?
dae.yaml:8: stages.expert.train.learning_rat = 3:
dae.yaml:7: stages.expert.data.train:
dae.yaml:7: stages.expert.data.trin:
dae.yaml:6: stages.expert.base: nowhere:
dae.yaml:9: stages.rows.temperatur = 3:
dae.yaml:10: stages.merge.stage = 'merge':
dae.yaml:11: stages.student.stage = 'distil':
dae.yaml:12: stages.2nd:
dae.yaml:13: stages.nameless.stage:
dae.yaml:14: stages.text = 'base':
dae.yaml:15: stages.mixture.experts.0.prompts:
dae.yaml:15: stages.mixture.experts.1.prompts:
dae.yaml:19: stages.aligned.expert.shop = '@expertt':
dae.yaml:20: stages.aligned.data.general.0.path: missing.jsonl
dae.yaml:21: stages.scores.suite.file: batchsize=3:
dae.yaml:22: stages.report.base:
dae.yaml:22: stages.report.expert:
dae.yaml:22: stages.report.compare.base:
""".splitlines()


def test_all_mistakes_of_all_stages_are_told_at_once_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base")
    make_rows(tmp_path / "shop.jsonl", 1, 5)
    make_suite(tmp_path / "suite.yaml", make_tasks(tmp_path / "tasks"))
    (tmp_path / "dae.yaml").write_text(FULL_OF_MISTAKES)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        run_pipeline(Path("dae.yaml"))
    title, *lines = str(caught.value).splitlines()
    assert title == f"{len(MISTAKES)} problems in the recipe:"
    for line, words in zip(lines, MISTAKES, strict=True):
        assert line.strip().startswith(words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {}\n", "output: "),
        ("output: o\nstages: {}\n", "stages = {}: "),
        ("output: o\nstages: [sft, align]\n", "expected a mapping"),
        ("output: o\nsft: {base: b}\n", "`stages.sft`"),
        ("output: o\nstages: {recipes: {stage: sft}}\n", "stages.recipes: "),
        ("output: o\nstages: {report: {from: {base: x}, suite: s}}\n", "stages.report.suite: "),
    ],
)
def test_outer_mistakes(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "path.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_pipeline(tmp_path / "path.yaml").pipeline()
    assert words in str(caught.value)


# -- commands ----------------------------------------------------------------------------------------------------------


def folder_of(pipeline: Pipeline) -> PipelineFolder:
    return PipelineFolder(pipeline, Fingerprints({}))


@pytest.mark.parametrize("path", [SHIPPED / "paper_path.yaml", SHIPPED / "demo" / "path.yaml"], ids=lambda p: p.name)
def test_shipped_pipelines_are_in_order_and_their_stages_recipes_read_back_the_same(path: Path, tmp_path: Path) -> None:
    pipeline = read_pipeline(path).pipeline()
    for stage in pipeline.stages:
        if kinds()[stage.kind].command[0] in ("eval", "report"):
            continue
        copy = tmp_path / f"{stage.name}.yaml"
        copy.write_text(resolved_yaml(stage.recipe))
        assert load_recipe(type(stage.recipe), copy, {}) == stage.recipe
        words = " ".join(command_of(folder_of(pipeline), stage))
        assert words == f"{stage.kind} --recipe {pipeline.output}/recipes/{stage.name}.yaml"


def test_evaluations_are_commands_with_flags_whose_suite_is_the_one_meant(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite.yaml", make_tasks(tmp_path / "tasks"))
    change = {"batch_size": 2, "groups": {"domain": {"tasks": {"0": {"limit": 3}}}}, "metadata": {"a": "007", "b": [1]}}
    stages = {
        "expert": EXPERT,
        "scores": {"stage": "eval", **EVAL, "base": "base", "suite": {"file": str(suite), "set": change}},
        "report": {
            "base": "base", "expert": "@expert", "student": "base", "compare": {"other": "@expert"},
            "suite": str(suite), "margin": 0.1, "min_gap": 0.5,
        },
        "short": {"stage": "report", "from": {"student": "@scores"}, "retention_only": True},
    }  # fmt: skip
    pipeline = read(tmp_path, stages)
    commands = [command_of(folder_of(pipeline), stage) for stage in pipeline.stages]
    head = ["eval", "tasks", "--model", "runs/expert", "--base", "base", "--suite", str(suite)]
    assert commands[1][:8] == head and commands[1][-2:] == ["--output", "runs/scores"]
    loaded = load_suite(suite, commands[1][8:-2])
    assert (loaded.batch_size, loaded.groups["domain"].tasks[0].limit) == (2, 3)
    assert loaded.metadata == {"a": "007", "b": (1,)}
    assert commands[2] == [
        "report", "--base", "base", "--expert", "runs/expert", "--student", "base", "--compare", "other=runs/expert",
        "--margin", "0.1", "--min-gap", "0.5", "--suite", str(suite), "--output", "runs/report",
    ]  # fmt: skip
    assert commands[3] == ["report", "--from", "student=runs/scores", "--retention-only", "--output", "runs/short"]


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        ({"stage": "eval", "model": "lora", "suite": "suite.yaml"}, ["base of model"]),
        ({"stage": "eval", "model": "lora", "base": "base", "suite": "suite.yaml"}, []),
        ({"stage": "eval", "model": "base", "suite": "suite.yaml"}, []),
        ({"stage": "sample", "model": "lora"}, ["base of model"]),
        ({"stage": "report", "retention_only": True, "reference": "base", "student": "lora", "suite": "s"}, []),
        (
            {"stage": "report", "base": "lora", "expert": "lora", "student": "base", "suite": "suite.yaml"},
            ["base of base", "base of expert"],
        ),
        ({**ALIGNED, "expert": {"shop": "lora"}, "data": {"general": "r.jsonl", "shop": "r.jsonl"}}, []),
        ({"stage": "sample", "model": "lost"}, []),  # the stage will say that the base is not there
    ],
)
def test_bases_that_only_an_adapter_names_are_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_checkpoint(tmp_path / "base")
    for name in ("lora", "lost"):
        make_adapter(tmp_path / name, base)
    config = tmp_path / "lost" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "nowhere")))
    (one,) = (pipeline := read(tmp_path, {"one": stage})).stages
    checkpoints = [given for given in one.inputs if given.wanted.endswith("checkpoint")]
    found = folder_of(pipeline).inputs(one, checkpoints)
    assert [name for name in found if name.startswith("base of")] == named
    assert {found[name] for name in named} <= {checkpoint(base).fingerprint}


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_every_stage_and_the_running_one_s_steps() -> None:
    asked = {"student": "s", "suite": "f", "base": "b", "expert": "e"}
    names = ("one", "two", "three")
    stages = [Stage(name, "report", ReportStage(**asked, output=f"runs/{name}"), ()) for name in names]
    view, screen = View(stages), io.StringIO()
    view.console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    view.already(stages[0])
    view.begin(stages[1], ["dae", "align", "--recipe", "a b.yaml"])
    said = screen.getvalue()
    assert "two (report) $ dae align --recipe 'a b.yaml'" in said
    view.line("err", "step 30/120  loss 1.5  shop kl 0.2")
    assert screen.getvalue() == said  # it moves the table
    view.line("err", "warning: something to keep")
    assert screen.getvalue().endswith("warning: something to keep\n")
    page = Console(file=(drawn := io.StringIO()), width=80)
    page.print(view.table())
    lines = drawn.getvalue().splitlines()
    assert [line.split()[-1] for line in (lines[0], lines[2])] == ["done", "waiting"]
    assert "30/120" in lines[1] and lines[1].rstrip().endswith("loss 1.5  shop kl 0.2")
    view.end(stages[1], "failed", "exit status 2")
    assert "two (report): failed, 0 s: exit status 2" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
