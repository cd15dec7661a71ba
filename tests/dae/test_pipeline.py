"""`dae run` from outside: what is done is done, what is killed goes on, what has changed is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pico import make_checkpoint
from pico_tasks import make_suite, make_tasks
from processes import Ended, Running, Signal, dae
from stage_forks import Forks
from worlds import GENERAL_WORDS, make_adapter, make_rows

TRAIN = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
SUITE = {"groups": {"domain": ["shop_choose"], "general": ["general_choose"]}}
EXPERT = {"stage": "sft", "base": "base", "data": {"train": "shop.jsonl"}, "lora": {"rank": 4}, "train": TRAIN}
ALIGNED = {
    "base": "base",
    "expert": {"shop": "@expert"},
    "data": {"general": "general.jsonl"},
    "lora": {"rank": 4},
    "train": TRAIN,
}
REPORT = {"base": "base", "expert": "@expert", "student": "@aligned", "suite": "suite.yaml"}
WRITTEN = {"stage": "sample", "model": "base", "prompts": "shop.jsonl", "rows": 4, "max_new_tokens": 4}
TIMINGS = {"response_tokens_per_second", "peak_memory_gib", "peak_memory_bytes"}
STEP = "kd.training.trainer:RoutedTrainer.training_step"


def write_path(folder: Path, stages: Mapping[str, Any], name: str = "path.yaml", output: str = "runs") -> None:
    (folder / name).write_text(yaml.safe_dump({"output": output, "stages": stages}, sort_keys=False))


def run(folder: Path, *more: str, signals: Any = (), forks: Forks | None = None, **settings: Any) -> Ended:
    """`dae run path.yaml`, its stages forked."""
    armed = [forks or Forks(), *signals]
    return dae(["run", "path.yaml", *more], folder, signals=armed, proof=False, **settings)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of writing and its content; locks are touched by whoever looks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def outcome(runs: Path) -> dict[str, Any]:
    """All of a finished pipeline that must not depend on how often it was stopped."""
    found: dict[str, Any] = {}
    for name in ("expert", "aligned"):
        lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        found[name] = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
        found[f"{name} weights"] = (runs / name / "adapter_model.safetensors").read_bytes()
    report = json.loads((runs / "report" / "report.json").read_text())
    found["report"] = {key: report[key] for key in ("word", "student", "tasks", "flips")}
    # An adapter's config names its base by its absolute place, so fingerprints are of this folder.
    files = [str(file.relative_to(runs)) for file in runs.rglob("*") if not file.name.startswith(".tmp-")]
    found["files"] = sorted(re.sub("-[0-9a-f]{32}", "", name) for name in files)
    state = json.loads((runs / "pipeline.json").read_text())["stages"]
    found["state"] = {
        name: (record["settings"], record["verdict"], *record["inputs"]) for name, record in state.items()
    }
    return found


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "world"
    folder.mkdir()
    make_checkpoint(folder / "base")
    make_rows(folder / "shop.jsonl", 1, 40)
    make_rows(folder / "general.jsonl", 0, 40, GENERAL_WORDS)
    make_suite(folder / "suite.yaml", make_tasks(folder / "tasks"), include="tasks", **SUITE)
    for name in ("shop", "general"):  # the tasks' rows, wherever the world is copied to
        for task in (folder / "tasks").glob(f"{name}_*.yaml"):
            task.write_text(task.read_text().replace(str(folder / "tasks"), "tasks"))
    stages = {"expert": EXPERT, "aligned": {"stage": "align", **ALIGNED}, "report": REPORT, "written": WRITTEN}
    write_path(folder, stages)
    return folder


@pytest.fixture(scope="module")
def finished(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The whole path, undisturbed, and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "world"
    shutil.copytree(origin, folder)
    return folder, run(folder)


@pytest.fixture
def world(origin: Path, tmp_path: Path) -> Path:
    """Nothing has run yet."""
    folder = tmp_path / "world"
    shutil.copytree(origin, folder)
    return folder


@pytest.fixture
def ran(finished: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of the finished path, times of writing included."""
    folder = tmp_path / "world"
    shutil.copytree(finished[0], folder)
    return folder


# -- to the end --------------------------------------------------------------------------------------------------------


def test_the_path_ends_with_a_table_and_the_report_s_verdict(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    assert ended.status == 1, ended.err  # four steps on random words are no gain
    assert "INCONCLUSIVE" in ended.out
    table = [line.split() for line in ended.out.splitlines()[-4:]]
    assert table == [
        ["expert", "sft", "done", "runs/expert"],
        ["aligned", "align", "done", "runs/aligned"],
        ["report", "report", "done:", "INCONCLUSIVE", "runs/report"],
        ["written", "sample", "done", "runs/written.jsonl"],  # a verdict stops nothing
    ]
    commands = [line.partition("$ ")[2] for line in ended.err.splitlines() if "$ dae" in line]
    assert commands == [
        "dae sft --recipe runs/recipes/expert.yaml",
        "dae align --recipe runs/recipes/aligned.yaml",
        "dae report --base base --expert runs/expert --student runs/aligned --suite suite.yaml --output runs/report",
        "dae sample --recipe runs/recipes/written.yaml",
    ]
    assert "step 4/4  loss" in ended.err and "Traceback" not in ended.err
    written = json.loads((folder / "runs" / "expert" / "environment.json").read_text())["command"]
    assert written == commands[0].split()


def test_the_printed_commands_are_the_same_runs(finished: tuple[Path, Ended], world: Path) -> None:
    folder, _ = finished
    again = dae(["sft", "--recipe", "runs/recipes/expert.yaml"], folder, proof=False)
    assert (again.status, again.err) == (0, "runs/expert: already finished; nothing to do\n")
    train = [f"train.{key}={value}" for key, value in TRAIN.items()]
    by_hand = dae(
        ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "mine", "lora.rank=4", *train], world, proof=False
    )
    assert by_hand.status == 0, by_hand.err
    weights = [(place / "adapter_model.safetensors").read_bytes() for place in (world / "mine", folder / "runs/expert")]
    assert weights[0] == weights[1]


def test_rows_of_the_expert_are_those_that_its_stage_was_given(finished: tuple[Path, Ended]) -> None:
    provenance = json.loads((finished[0] / "runs" / "aligned" / "provenance.json").read_text())
    assert [source["path"] for source in provenance["data"]["shop"]] == ["shop.jsonl"]


def test_given_again_it_redoes_nothing_and_says_the_same(ran: Path) -> None:
    before = snapshot(ran / "runs")
    again = run(ran)
    assert again.status == 1
    assert again.err.splitlines() == [
        f"{name}: already done" for name in ("expert (sft)", "aligned (align)", "report (report)", "written (sample)")
    ]
    assert again.out.splitlines()[-2].split() == ["report", "report", "done:", "INCONCLUSIVE", "runs/report"]
    assert snapshot(ran / "runs") == before


def test_a_report_that_passes_is_no_failure(world: Path) -> None:
    same = {"retention_only": True, "reference": "base", "student": "base", "suite": "suite.yaml"}
    write_path(world, {"report": same})
    ended = run(world)
    assert ended.status == 0, ended.err
    assert "done: PASS" in ended.out


# -- what has changed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_changed_setting_is_refused_and_redone_on_demand(ran: Path) -> None:
    change = ("stages.aligned.train.max_steps=3", "stages.aligned.lora.rank=2")
    (ran / "runs" / "aligned.replaced-1").mkdir()
    before = snapshot(ran / "runs")
    refused = run(ran, *change)
    assert refused.status == 2
    assert refused.err.splitlines() == [
        "dae run: runs: was started with different settings (recorded -> current):",
        "  aligned: lora.rank: 4 -> 2",
        "  aligned: train.max_steps: 4 -> 3",
        "Add --redo to move aligned, report aside and run again, or undo the change.",
    ]
    assert snapshot(ran / "runs") == before
    killed = run(ran, *change, "--redo", signals=[Signal("os:rename", after=True)])
    assert killed.status == -signal.SIGKILL  # the report has been moved, what it was made from has not
    assert run(ran, *change).err == refused.err
    redone = run(ran, *change, "--redo")
    assert redone.status == 1, redone.err
    assert redone.err.splitlines()[:2] == [
        "runs/aligned: moved to runs/aligned.replaced-2",
        "expert (sft): already done",
    ]
    after = snapshot(ran / "runs")
    for name, entry in before.items():  # nothing is lost, and what is upstream has not been touched
        moved = name.replace("aligned/", "aligned.replaced-2/").replace("report/", "report.replaced-1/")
        if name not in ("pipeline.json", "recipes/aligned.yaml"):
            assert after[moved] == entry, name
    assert len((ran / "runs" / "aligned" / "metrics.jsonl").read_text().splitlines()) == 4  # step 0, and three steps
    assert run(ran, *change).err.count("already done") == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: make_rows(w / "shop.jsonl", 7, 40), "expert: content of data.train.0.path:"),
        (lambda w: make_checkpoint(w / "base", seed=3), "expert: content of base:"),
        (lambda w: flip(w / "runs/expert/adapter_model.safetensors"), "expert: its output in runs/expert has changed"),
        (lambda w: (w / "runs/aligned/run.json").unlink(), "aligned: its output is incomplete:"),
        (lambda w: make_tasks(w / "tasks", new={"output_type": "generate_until"}), "report: content of suite.file:"),
        (lambda w: (w / "runs/report/report.json").unlink(), "report: its output is incomplete: runs/report"),
        (lambda w: flip(w / "runs/written.jsonl"), "written: its output in runs/written.jsonl has changed"),
    ],
)  # fmt: skip
def test_changed_inputs_and_results_are_told(ran: Path, change: Any, words: str) -> None:
    change(ran)
    before = snapshot(ran / "runs")
    refused = run(ran)
    assert refused.status == 2
    assert f"\n  {words}" in refused.err
    assert snapshot(ran / "runs") == before


def test_the_base_that_an_adapter_names_is_an_input(world: Path) -> None:
    make_adapter(world / "lora", world / "base")
    write_path(world, {"written": {**WRITTEN, "model": "lora"}})
    assert run(world).status == 0
    make_checkpoint(world / "base", seed=3)
    refused = run(world)
    assert refused.status == 2
    assert "\n  written: content of base of model: " in refused.err


def flip(path: Path) -> None:
    """One bit of a file, the last."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_an_output_that_was_taken_away_is_made_again_and_what_follows_stays(world: Path) -> None:
    write_path(world, {"expert": EXPERT, "aligned": {"stage": "align", **ALIGNED}})
    assert run(world).status == 0
    before = snapshot(world / "runs")
    shutil.rmtree(world / "runs" / "expert")
    again = run(world)
    assert again.status == 0, again.err
    assert "expert (sft): done, " in again.err  # the same weights
    assert again.err.splitlines()[-1] == "aligned (align): already done"
    after = snapshot(world / "runs")
    for name, entry in before.items():
        if name.startswith("aligned/"):
            assert after[name] == entry, name


def test_a_moved_pipeline_is_still_done(ran: Path) -> None:
    (ran / "runs").rename(ran / "elsewhere")
    again = run(ran, "output=elsewhere")
    assert again.err.count("already done") == 4, again.err


# -- stops -------------------------------------------------------------------------------------------------------------

FOLDER = "dae.pipeline.state:PipelineFolder"
# One after the other in the same folder. A status below 0: the pipeline itself was killed.
KILLS: dict[str, dict[str, Any]] = {
    "before anything is begun": {"signals": [Signal(f"{FOLDER}.begin")]},
    "in the middle of the first note": {"signals": [Signal("os:replace", name="pipeline.json")]},
    "with the stage begun and not started": {"signals": [Signal("dae.pipeline.stages:write_recipe")]},
    "while the expert trains": {"forks": Forks(to_pipeline={"sft": Signal(STEP, 3)})},
    "the expert alone": {"forks": Forks(to_stage={"sft": Signal(STEP, 2)})},
    "while the expert is called finished": {
        "forks": Forks(to_pipeline={"sft": Signal("kd.runs.run_folder:RunFolder.mark_finished", after=True)})
    },
    "with the expert finished and not noted": {"signals": [Signal(f"{FOLDER}.finish")]},
    "between two stages": {"signals": [Signal(f"{FOLDER}.finish", after=True)]},
    "while the student trains": {"forks": Forks(to_pipeline={"align": Signal(STEP, 4)})},
    "the student alone": {"forks": Forks(to_stage={"align": Signal(STEP, 1)})},
    "while the models are asked": {
        "forks": Forks(to_pipeline={"report": Signal("dae_eval.evaluation:run_task", 2)})
    },
    "with some rows written": {"forks": Forks(to_pipeline={"sample": Signal("dae.sampling.sample:SampleFile.finish")})},
    "with all done and not noted": {"signals": [Signal(f"{FOLDER}.finish")]},
}  # fmt: skip


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(world: Path, finished: tuple[Path, Ended]) -> None:
    for moment, settings in KILLS.items():
        ended = run(world, **settings)
        alone = moment.endswith("alone")
        assert ended.status == (137 if alone else -signal.SIGKILL), f"{moment}: {ended}"
        if alone:
            assert "failed" in ended.err and "killed by signal 9" in ended.err
    ended = run(world)
    assert ended.status == 1, ended.err
    assert outcome(world / "runs") == outcome(finished[0] / "runs")
    assert run(world).err.count("already done") == 4


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_pipeline_reaches_the_stage_which_leaves_a_checkpoint(
    world: Path, number: int, status: int
) -> None:
    write_path(world, {"expert": EXPERT})
    ended = run(world, forks=Forks(to_pipeline={"sft": Signal(STEP, 3, number)}))
    assert ended.status == status, ended
    assert "dae sft: stopped after step " in ended.err
    assert ended.err.splitlines()[-1].startswith("dae run: stopped at stage expert")
    assert list((world / "runs/expert/checkpoints").glob("step-*"))
    assert not (world / "runs/expert/run.json").exists()
    again = run(world)
    assert (again.status, "step 1/4" in again.err) == (0, False), again.err  # it went on


def test_a_failing_stage_ends_the_pipeline_with_its_status_and_words(world: Path) -> None:
    (world / "shop.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"wrong": 1}\n')
    ended = run(world)
    assert ended.status == 2
    assert "dae sft: shop.jsonl:2: " in ended.err
    assert "expert (sft): failed" in ended.err and "$ dae align" not in ended.err
    assert not (world / "runs" / "expert").exists()
    words = [line.split()[:3] for line in ended.out.splitlines()[-4:-1]]
    assert words == [["expert", "sft", "failed"], ["aligned", "align", "waiting"], ["report", "report", "waiting"]]
    make_rows(world / "shop.jsonl", 1, 40)  # a mistake put right needs no --redo
    write_path(world, {"expert": EXPERT})
    assert run(world).status == 0


def test_launchers_are_refused(world: Path) -> None:
    launched = run(world, environment={"RANK": "0", "WORLD_SIZE": "1"})
    assert launched.status == 2 and "torchrun or accelerate" in launched.err


@pytest.mark.slow
def test_real_processes(world: Path) -> None:
    """As nothing is forked here: the stage ends when its pipeline is killed, and the next run goes on."""
    endless = [f"stages.expert.train.{key}" for key in ("max_steps=100000", "save_steps=5", "logging_steps=5")]
    write_path(world, {"expert": EXPERT})
    running = Running(["run", "path.yaml", *endless], world, proof=False)
    checkpoints = world / "runs/expert/checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert running.process.is_alive(), running.end()
        time.sleep(0.05)
    stage = int((world / "runs/expert/.lock").read_text().split()[1])
    running.send(signal.SIGKILL)
    assert running.end().status == -signal.SIGKILL
    for _ in range(200):
        if not os.path.exists(f"/proc/{stage}"):
            break
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)
    again = run(world, *endless, forks=Forks(to_pipeline={"sft": Signal(STEP, 2, signal.SIGTERM)}))
    assert again.status == 143, again
    assert "step 5/" not in again.err  # it went on
