"""`dae eval tasks` and `dae report` from outside, as processes: statuses, stops, mistakes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from dae_eval.folders import read_evaluation
from pico import make_checkpoint
from pico_tasks import make_suite, make_tasks
from processes import Signal, dae
from worlds import make_adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "world"
    make_adapter(folder / "expert", make_checkpoint(folder / "base"))
    make_suite(folder / "suite.yaml", make_tasks(folder / "tasks"))
    return folder


def ask(output: str, *more: str, model: str = "expert") -> list[str]:
    return ["eval", "tasks", "--model", model, "--suite", "suite.yaml", "--output", output, *more]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A finished evaluation of the expert; what it said is looked at once here."""
    ended = dae(ask("whole"), world)
    assert (ended.status, "Traceback" in ended.err) == (0, False), ended.err
    for words in ("shop_choose", "12", "score", "25.0", "All answers are in whole"):
        assert words in ended.out
    assert "model  shop_choose  12 documents" in ended.err
    return world / "whole"


def scores(folder: Path) -> dict[str, tuple[float, ...]]:
    found = read_evaluation(folder)
    return {task: tuple(document.score for document in result.documents) for task, result in found.tasks.items()}


KILLS = {
    "while the first task is asked": Signal("dae_eval.evaluation:run_task", 1, after=True),
    "before the third task": Signal("dae_eval.evaluation:run_task", 3),
    "between a task's notes and its answers": Signal("dae_eval.evaluation:write_bytes_durably", 2),
    "before the answers get their name": Signal("os:replace", 4),
    "when all is asked": Signal("dae_eval.evaluation:write_evaluation"),
    "in the middle of the last file": Signal("dae_eval.folders:write_text_durably", after=True),
}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_at_any_point_and_given_again(world: Path, whole: Path, kill: str) -> None:
    output = "killed-" + str(list(KILLS).index(kill))
    killed = dae(ask(output), world, signals=[KILLS[kill]])
    assert killed.status == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (world / output / "documents").glob("[!.]*.gz")}
    again = dae(ask(output), world)
    assert again.status == 0, again.err
    assert len(again.err.splitlines()) == 5 - len(finished)  # one line for each task that was asked
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert scores(world / output) == scores(whole)
    names = [sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in (whole, world / output)]
    assert names[1] == names[0]


def test_ctrl_c_keeps_finished_tasks(world: Path) -> None:
    stop = Signal("dae_eval.evaluation:run_task", 2, signal.SIGINT)
    ended = dae(ask("stopped"), world, signals=[stop])
    assert ended.status == 130
    assert "finished tasks are kept in stopped" in ended.err
    assert len(list((world / "stopped" / "documents").glob("[!.]*.gz"))) == 1


def test_the_same_weights_pass_and_nothing_is_asked_twice(world: Path) -> None:
    command = ["report", "--reference", "base", "--student", "base", "--suite", "suite.yaml", "--output", "same"]
    (world / "card").mkdir()
    elsewhere = ["--card", "card/README.md", "--junit", "verdict.xml"]
    ended = dae([*command, *elsewhere, "--retention-only"], world)
    assert ended.status == 0, ended.err
    assert "PASS" in ended.out and "same/report.html" in ended.out
    assert "hf upload YOUR-NAME/card card" in ended.out
    assert "Evaluation: PASS" in (world / "card" / "README.md").read_text()
    assert 'failures="0"' in (world / "verdict.xml").read_text()
    assert len(ended.err.splitlines()) == 5
    assert [path.name for path in (world / "same" / "evaluations").iterdir()] == ["reference"]
    again = dae([*command, "--retention-only"], world)
    assert (again.status, again.err) == (0, "")


def test_a_report_of_models_and_one_of_their_evaluations_say_the_same(world: Path) -> None:
    models = ["--base", "base", "--expert", "expert", "--student", "expert"]
    ended = dae(["report", *models, "--compare", "idle=base", "--suite", "suite.yaml", "--output", "models"], world)
    assert ended.status == 1, ended.err  # nobody gains anything on random documents
    found = [f"--from={role}=models/evaluations/{name}" for role, name in (("base", "base"), ("expert", "expert"))]
    found += ["--from", "student=models/evaluations/expert"]  # the base stands in for the reference, as with models
    found += ["--from", "idle=models/evaluations/base"]
    other = dae(["report", *found, "--output", "folders"], world)
    assert other.status == 1, other.err
    reports = [json.loads((world / name / "report.json").read_text()) for name in ("models", "folders")]
    for key in ("word", "student", "others", "tasks", "flips"):
        assert reports[0][key] == reports[1][key]


MISTAKES = [
    (["eval", "tasks"], "--model, --suite, --output: "),
    (["eval", "task"], "'task'"),
    (["report", "--output", "r"], "--student, --base, --expert, --suite: "),
    (["report", "--retention-only", "--student", "base"], "--output: "),
    (["report", "--from", "whole", "--base", "base", "--suite", "s.yaml", "--output", "r", "batch_size=3"],
     "--base, --suite, batch_size=3: "),
    (["report", "--from", "nowhere", "--output", "r"], "nowhere: "),
    (["report", "--base", "base", "--expert", "expert", "--student", "base", "--suite", "suite.yaml", "--output", "r",
      "--compare", "base=base"], "--compare base=base: "),
    (["report", "--from", "a", "--output", "r", "--margin", "0"], "--margin 0: "),
    (["report", "--from", "a", "--output", "r", "--max-task-loss", "-1"], "--max-task-loss -1: "),
    (["report", "--from", "a", "--output", "r", "--min-gap", "50"], "--min-gap 50: "),
    (["report", "--from", "a", "--output", "r", "--card", "nowhere/README.md"], "--card nowhere/README.md: "),
    (["report", "--from", "a", "--output", "r", "--junit", "nowhere/x.xml"], "--junit nowhere/x.xml: "),
    (ask("r", "batchsize=3"), "batchsize=3: "),
    (ask("r", model="nowhere"), "nowhere: "),
    (ask("r", "groups.domain.tasks.0.metric=bleu"), "metric: 'bleu'"),
    (ask("r", "groups.domain.tasks.0.cluster_by=page"), "cluster_by: page: "),
    (ask("tasks"), "tasks: "),
    (["eval", "tasks", "--model", "base", "--suite", "none.yaml", "--output", "r"], "none.yaml: "),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_mistakes_are_one_message_and_leave_nothing(world: Path, command: list[str], words: str) -> None:
    before = sorted(path.name for path in world.iterdir())
    ended = dae(command, world)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err and "Traceback" not in ended.err
    assert sorted(path.name for path in world.iterdir()) == before


def test_without_a_network_nothing_is_asked_of_it(world: Path, whole: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    ended = dae(ask("offline"), world, environment=environment)
    assert ended.status == 0, ended.err
    assert scores(world / "offline") == scores(whole)
