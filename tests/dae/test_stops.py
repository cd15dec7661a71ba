"""Kill it at any moment: the same command goes on to the same end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Running, Signal, dae
from worlds import FORGETTING, align_command, make_world, metrics_of

from kd.runs.checkpoints import checkpoint_fault

# Dropout, so that the state of the random generator matters; held-out rows, so that the best step is remembered.
MORE = ("lora.dropout=0.1", "data.eval.domain=heldout_shop.jsonl", "data.eval.general=heldout_general.jsonl")
COMMAND = align_command(*MORE)
TIMINGS = {"response_tokens_per_second", "peak_memory_gib", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture(scope="module")
def calm(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run ends with."""
    place = tmp_path_factory.mktemp("calm") / "world"
    shutil.copytree(origin, place)
    ended = dae(COMMAND, place, proof=False)
    assert ended.status == 0, ended.err
    return outcome(place / "student")


@pytest.fixture
def world(origin: Path, tmp_path: Path) -> Path:
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    return place


def outcome(run: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on how often it was stopped."""
    without_timings = [{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics_of(run)]
    summary = json.loads((run / "run.json").read_text())["summary"]
    return {
        "weights": (run / "adapter_model.safetensors").read_bytes(),
        "card": [line for line in (run / "README.md").read_text().splitlines() if "memory" not in line],
        "metrics": without_timings,
        "summary": {key: value for key, value in summary.items() if key not in TIMINGS},
        "files": sorted(str(file.relative_to(run)) for file in run.rglob("*")),
    }


def assert_same_end(run: Path, calm: dict[str, Any], history: str = "") -> None:
    found = outcome(run)
    for part, expected in calm.items():
        assert found[part] == expected, f"{part} {history}"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of writing and its content; the lock is touched by whoever looks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def whole_checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints; none of them may be torn, whenever the kill came."""
    checkpoints = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").exists() else []
    assert [checkpoint_fault(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
    return [checkpoint.name for checkpoint in checkpoints]


# -- kill -9 -----------------------------------------------------------------------------------------------------------

# One after the other in the same folder, so that each starts from what the one before left.
MOMENTS = {
    "before anything is written": Signal("kd.runs.run_folder:RunFolder._set_up"),
    "in the middle of the set-up": Signal("kd.runs.run_folder:write_text_durably", 2),
    "while the models are loaded": Signal("dae.alignment:Align.build_roles"),
    "after the first measurement": Signal("kd.stages.run_stage:start_metrics", after=True),
    "in the third step, before any checkpoint": Signal("kd.training.trainer:RoutedTrainer._save_checkpoint"),
    "with half a checkpoint written": Signal("kd.training.trainer:save_student", after=True),
    "with a checkpoint not yet in place": Signal("kd.runs.checkpoints:fsync_tree", 2),
    "in training": Signal("kd.training.trainer:RoutedTrainer.training_step", 4),
    "while an old checkpoint is removed": Signal("shutil:rmtree"),
    "in a held-out measurement": Signal("kd.training.trainer:evaluate_routes", 2),
    "after the last step": Signal("kd.stages.run_stage:summarise"),
    "with half the result written": Signal("kd.training.publishing:write_model_card"),
    "with half the result in place": Signal("os:replace", name="adapter_model.safetensors", after=True),
    "while the result is proved": Signal("kd.training.publishing:verify_saved"),
    "just before it is called finished": Signal("kd.runs.run_folder:RunFolder.mark_finished"),
    "just after it is called finished": Signal("kd.runs.run_folder:RunFolder.mark_finished", after=True),
}


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(world: Path, calm: dict[str, Any]) -> None:
    run = world / "student"
    for moment, kill in MOMENTS.items():
        ended = dae(COMMAND, world, proof=False, signals=[kill])
        assert ended.status == -signal.SIGKILL, f"{moment}: {ended}"
        whole_checkpoints(run)
        if moment != "just after it is called finished":
            assert not (run / "run.json").exists(), moment
        if (run / "adapter_config.json").exists():  # it opens as a model only when all of it is there
            assert (run / "adapter_model.safetensors").read_bytes() == calm["weights"], moment
    ended = dae(COMMAND, world, proof=False)
    assert (ended.status, ended.err) == (0, "student: already finished; nothing to do\n")
    assert_same_end(run, calm)


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_removal_of_an_earlier_one(
    world: Path, calm: dict[str, Any]
) -> None:
    kill = Signal("kd.runs.checkpoints:Checkpoints.prune", 6)
    assert dae(COMMAND, world, proof=False, signals=[kill]).status == -signal.SIGKILL
    assert len(whole_checkpoints(world / "student")) == 4  # one more than stay: the best, and the newest two
    ended = dae(COMMAND, world, proof=False)
    assert ended.status == 0, ended.err
    assert_same_end(world / "student", calm)


@pytest.mark.slow
def test_killed_five_times_at_random(world: Path, calm: dict[str, Any]) -> None:
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    history = [f"seed {seed}"]
    for _ in range(5):
        running = Running(COMMAND, world, proof=False)
        delay = moments.uniform(0.1, 1.5)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # on a fast machine the run may have ended by then
            running.send(signal.SIGKILL)
        status = running.end().status
        history.append(f"{delay:.2f} s: status {status}, then {whole_checkpoints(world / 'student')}")
        assert status in (-signal.SIGKILL, 0), history
    ended = dae(COMMAND, world, proof=False)
    assert ended.status == 0, (history, ended.err)
    assert_same_end(world / "student", calm, str(history))


# -- Ctrl-C and SIGTERM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    world: Path, calm: dict[str, Any], number: int, status: int
) -> None:
    in_step_five = Signal("kd.training.trainer:RoutedTrainer.training_step", 5, number)
    ended = dae(COMMAND, world, proof=False, signals=[in_step_five])
    assert ended.status == status
    message = ended.err.splitlines()[-1]
    assert message.startswith("dae align: stopped after step 5 of 12")
    assert "same command" in message
    assert "Traceback" not in ended.err
    assert "step-000005" in whole_checkpoints(world / "student")
    ended = dae(COMMAND, world, proof=False)
    assert ended.status == 0, ended.err
    found = outcome(world / "student")
    assert found["weights"] == calm["weights"]
    lines, expected = ({line["step"]: line for line in end["metrics"] if "loss" in line} for end in (found, calm))
    measured = [[line for line in end["metrics"] if "loss" not in line] for end in (found, calm)]
    assert measured[0] == measured[1]
    assert lines.keys() == expected.keys() | {5}
    assert all(lines[step] == expected[step] for step in expected if step != 6)  # step 6 is told by itself now


@pytest.mark.parametrize(
    "signals",
    [
        [Signal("kd.stages.run_stage:prepare", 1, signal.SIGINT)],
        [
            Signal("kd.training.trainer:RoutedTrainer.training_step", 5, signal.SIGINT, after=after)
            for after in (False, True)
        ],
        [Signal("kd.stages.run_stage:publish", 1, signal.SIGINT)],
        [Signal("kd.training.publishing:verify_saved", 1, signal.SIGINT)],
    ],
    ids=["in the set-up", "twice in a step", "while publishing", "while proving"],
)
def test_ctrl_c_outside_of_training_stops_at_once(world: Path, calm: dict[str, Any], signals: list[Signal]) -> None:
    ended = dae(COMMAND, world, proof=False, signals=signals)
    assert ended.status == 130
    assert ended.err.splitlines()[-1].startswith("dae align: stopped")
    assert "Traceback" not in ended.err
    whole_checkpoints(world / "student")
    ended = dae(COMMAND, world, proof=False)
    assert ended.status == 0, ended.err
    assert_same_end(world / "student", calm)


@pytest.mark.slow
def test_ctrl_c_and_a_kill_of_the_command_itself(world: Path, calm: dict[str, Any]) -> None:
    """The whole of it once: `python -m dae` as it is typed, with the proof in a fresh process at the end."""
    command = [sys.executable, "-m", "dae", *COMMAND]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=world, env=environment, text=True, stdout=-1, stderr=-1)

    metrics = world / "student" / "metrics.jsonl"
    for number, status, step in ((signal.SIGINT, 130, 2), (signal.SIGKILL, -9, 6)):
        process = start()
        while process.poll() is None and not (metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text()):
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=120)
        assert process.returncode == status, said
        assert "Traceback" not in said[1]
    process = start()
    assert "student: finished, 12 steps" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert outcome(world / "student")["weights"] == calm["weights"]


# -- going on, or not --------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(world: Path) -> Path:
    """A run that was killed after its third checkpoint."""
    dae(COMMAND, world, proof=False, signals=[Signal("kd.training.trainer:RoutedTrainer.training_step", 8)])
    assert whole_checkpoints(world / "student")[-1] == "step-000006"
    return world / "student"


@pytest.mark.parametrize("torn", [1, 3])
def test_torn_checkpoints_are_passed_over_with_a_warning(stopped: Path, calm: dict[str, Any], torn: int) -> None:
    names = whole_checkpoints(stopped)[-torn:]
    for name in names:
        weights = stopped / "checkpoints" / name / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    ended = dae(COMMAND, stopped.parent, proof=False)
    assert ended.status == 0, ended.err
    for name in names:
        assert f"{name}: passed over: adapter_model.safetensors is torn or altered" in ended.err
    assert_same_end(stopped, calm)


def test_other_inputs_are_refused_by_name(stopped: Path) -> None:
    world, before = stopped.parent, snapshot(stopped)

    def refused() -> str:
        ended = dae(COMMAND, world, proof=False)
        assert (ended.status, ended.out) == (2, "")
        assert "student: was started with different settings (recorded -> current)" in ended.err
        assert "Traceback" not in ended.err
        assert snapshot(stopped) == before
        return ended.err

    with (world / "shop.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "content of data.domain[0]: " in refused()
    shutil.copyfile(world / "general.jsonl", world / "heldout_shop.jsonl")
    told = refused()
    assert "content of data.eval.domain[0]: " in told
    assert "content of data.domain[0]: " in told
    assert "seed" not in told


def test_a_try_that_trained_no_step_holds_nobody_to_its_recipe(world: Path) -> None:
    """What came of it is nothing, as when the first step runs out of memory and the advice is to halve its batches."""
    dae(COMMAND, world, proof=False, signals=[Signal("kd.training.trainer:RoutedTrainer.training_step", after=True)])
    assert (world / "student" / "recipe.yaml").exists()
    halved = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"]
    ended = dae([*COMMAND, *halved], world, proof=False)
    assert ended.status == 0, ended.err
    assert "gradient_accumulation_steps: 2" in (world / "student" / "recipe.yaml").read_text()
    assert [line["step"] for line in metrics_of(world / "student") if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_early_stopping_waits_as_long_as_if_nothing_had_happened(world: Path) -> None:
    command = [*COMMAND, "early_stopping_patience=2", "train.learning_rate=0"]  # so that nothing is ever better
    moments = [Signal("kd.training.trainer:RoutedTrainer.training_step", 5), Signal("kd.stages.run_stage:summarise")]
    for kill in moments:
        assert dae(command, world, proof=False, signals=[kill]).status == -signal.SIGKILL
    ended = dae(command, world, proof=False)
    assert ended.status == 0, ended.err
    assert [line["step"] for line in metrics_of(world / "student") if "eval_loss" in line] == [2, 4, 6]
    assert json.loads((world / "student" / "run.json").read_text())["summary"]["steps"] == 6


def test_a_moved_folder_goes_on(stopped: Path, calm: dict[str, Any]) -> None:
    moved = stopped.rename(stopped.parent / "elsewhere")
    ended = dae(align_command(*MORE, output="elsewhere"), stopped.parent, proof=False)
    assert ended.status == 0, ended.err
    assert "step 2/12" not in ended.err
    assert outcome(moved)["weights"] == calm["weights"]


def test_a_moved_folder_still_knows_its_best_checkpoint(world: Path) -> None:
    assert dae(align_command(*FORGETTING, output="calm"), world, proof=False).status == 0
    assert json.loads((world / "calm" / "run.json").read_text())["summary"]["best_step"] == 2
    dae(align_command(*FORGETTING), world, proof=False, signals=[Signal("kd.stages.run_stage:summarise")])
    (world / "student").rename(world / "moved")
    assert dae(align_command(*FORGETTING, output="moved"), world, proof=False).status == 0
    weights = [world / run / "adapter_model.safetensors" for run in ("calm", "moved")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
