"""The run folder under kills, other recipes and full disks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import kd.runs.run_folder
from kd.config.loading import resolved_yaml
from kd.config.schema import Frozen
from kd.errors import MachineError, UserError
from kd.runs.files import disk_errors
from kd.runs.provenance import DataInput, base_fingerprint_of, read_provenance
from kd.runs.run_folder import RunFolder, Start

INPUTS = {"base": "b" * 64, "expert.ecom": "e" * 64}
DATA = {"general": [DataInput("general.jsonl", "1" * 64, 0.9)], "ecom": [DataInput("ecom.jsonl", "2" * 64, 0.1)]}


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.runs.run_folder, "environment", lambda: {"libraries": {"torch": "2"}, "python": "3"})


class Recipe(Frozen):
    base: str
    output: str
    train: dict[str, Any]
    later: float = 1.0  # a key that runs of an earlier release do not have


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.model_validate({"base": "some/base", "output": "out", "train": {"learning_rate": 0.1}, **changes})


def claim(run: RunFolder, inputs: Any = INPUTS, data: Any = DATA, stage: str = "align", **recipe: Any) -> Any:
    return run.claim(Start(stage, recipe_of(**recipe), inputs, "some/base", data))


def save_checkpoint(run: RunFolder, step: int, text: str | None = None) -> Path:
    staging = run.checkpoints.staging / f"checkpoint-{step}"
    (staging / "inner").mkdir(parents=True, exist_ok=True)
    (staging / "weights").write_text(text or f"weights after {step}")
    (staging / "inner" / "state").write_text(f"state after {step}")
    return run.checkpoints.seal(staging, step)


def whole_run(folder: Path) -> None:
    """A run of four steps whose result follows from its checkpoints alone."""
    run = RunFolder(folder)
    with claim(run) as state:
        if state == "finished":
            return
        latest = run.checkpoints.latest() if state == "resume" else None
        run.checkpoints.prune(1)
        history = json.loads((latest / "weights").read_text()) if latest else []
        run.cut_metrics(len(history) if latest else -1)
        for step in range(len(history) + 1, 5):
            history.append(step * step)
            run.append_metrics({"step": step, "loss": 1 / step})
            if step % 2 == 0:
                save_checkpoint(run, step, json.dumps(history))
                run.checkpoints.prune(1)

        def write_files(staging: Path) -> None:
            (staging / "adapter_model.safetensors").write_text(json.dumps(history))
            (staging / "adapter_config.json").write_text("{}")
            (staging / "merged").mkdir()
            (staging / "merged" / "model.safetensors").write_text("merged")

        run.publish(write_files)
        run.mark_finished({"steps": 4})


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does `work`; 9 where it stopped itself as a kill would, without clean-up."""
    child = os.fork()
    if child == 0:
        try:
            os.fsync = lambda _: None  # a kill does not lose what was not synced, and syncing takes time
            work()
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CALLS_THAT_TOUCH_THE_DISK = ("fsync", "replace", "rename", "write", "unlink", "mkdir", "rmdir", "ftruncate", "pwrite")


def die_at_call(number: int, work: Callable[[], None]) -> Callable[[], None]:
    """Do `work` in a process that stops dead just before its `number`-th call that touches the disk."""

    def run() -> None:
        left = number

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return call(*args, **kwargs)

            return inner

        for name in CALLS_THAT_TOUCH_THE_DISK:
            setattr(os, name, counted(getattr(os, name)))
        work()

    return run


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_at_any_call_costs_nothing(tmp_path: Path) -> None:
    whole_run(tmp_path / "uninterrupted")
    expected = tree(tmp_path / "uninterrupted")
    assert json.loads(expected["adapter_model.safetensors"]) == [1, 4, 9, 16]
    kills = 0
    while True:
        folder = tmp_path / f"killed-{kills}"
        status = in_child(die_at_call(kills, lambda folder=folder: whole_run(folder)))  # type: ignore[misc]
        assert status in (0, 9)
        if status == 0:
            break
        # A second kill while it resumes, at a place that moves along with the first.
        assert in_child(die_at_call(kills // 2, lambda folder=folder: whole_run(folder))) in (0, 9)  # type: ignore[misc]
        assert in_child(lambda folder=folder: whole_run(folder)) == 0  # type: ignore[misc]
        assert tree(folder) == expected, f"killed before call {kills}"
        kills += 1
    assert kills > 50


def test_a_torn_last_metric_line_is_cut_on_resume(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        run.append_metrics({"step": 1, "loss": 0.5})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    with claim(run) as state:
        assert state == "resume"
        run.append_metrics({"step": 2, "loss": 0.25})
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2]


# -- claiming ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone_and_keeps_its_summary(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    whole_run(run.path)
    before = tree(run.path)
    with claim(RunFolder(run.path)) as state:
        assert state == "finished"
    assert tree(run.path) == before
    assert run.summary() == {"steps": 4}
    assert (run.path / "recipe.yaml").read_text() == resolved_yaml(recipe_of())


def test_provenance_says_what_a_later_stage_needs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run, stage="sft", data={"train": [DataInput("rows.jsonl", "1" * 64)]}):
        pass
    provenance = read_provenance(run.path)
    assert provenance is not None
    assert provenance["data"] == {"train": [{"path": "rows.jsonl", "sha256": "1" * 64, "share": None, "encoded": None}]}
    assert provenance["base"] == {"path": "some/base", "fingerprint": "b" * 64}
    assert base_fingerprint_of(run.path) == "b" * 64
    assert base_fingerprint_of(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train": {"learning_rate": 0.2}}, "train.learning_rate: 0.1 -> 0.2"),
        ({"train": {"learning_rate": 0.1, "max_steps": 3}}, "train.max_steps: (not given) -> 3"),
        ({"later": 0.5}, "later: 1.0 -> 0.5"),
        ({"inputs": INPUTS | {"base": "c" * 64}}, f'content of base: "{"b" * 64}" -> "{"c" * 64}"'),
        (
            {"data": DATA | {"ecom": [DataInput("ecom.jsonl", "3" * 64, 0.1)]}},
            f'content of data.ecom[0]: "{"2" * 64}" -> "{"3" * 64}"',
        ),
        ({"stage": "sft"}, 'stage: "align" -> "sft"'),
        ({"stage": "sft", "later": 0.5}, 'stage: "align" -> "sft"'),  # the rest follows from it
    ],
)
def test_another_recipe_or_input_is_refused_by_its_name_alone(tmp_path: Path, change: Any, line: str) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        save_checkpoint(run, 1)
    before = tree(run.path)
    with pytest.raises(UserError) as caught, claim(run, **change):
        pass
    assert [text.strip() for text in str(caught.value).splitlines()[1:-1]] == [line]
    assert tree(run.path) == before


def as_of_an_earlier_release(run: Path, **more: Any) -> None:
    """Without the key `later`, and without the tokens of the rows."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    del recipe["later"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | more))
    provenance = json.loads((run / "provenance.json").read_text())
    for sources in provenance["data"].values():
        del sources[0]["encoded"]
    (run / "provenance.json").write_text(json.dumps(provenance))


def test_a_run_begun_before_a_key_existed_goes_on_and_the_key_is_compared_by_its_default(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        save_checkpoint(run, 1)
    as_of_an_earlier_release(run.path)
    encoded = {route: [replace(source, encoded="f" * 64) for source in sources] for route, sources in DATA.items()}
    with claim(run, data=encoded) as state:
        assert state == "resume"
    with pytest.raises(UserError, match=r"recorded -> current\):\n  later: 1.0 -> 0.5\n"), claim(run, later=0.5):
        pass


def test_a_recorded_key_that_this_release_does_not_take_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        save_checkpoint(run, 1)
    as_of_an_earlier_release(run.path, laterr=3)
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+: laterr = 3: unknown key; did you mean `later`"), claim(run):
        pass
    shutil.rmtree(run.checkpoints.at(1))
    with claim(run) as state:  # there is nothing to go on with
        assert state == "new"


def test_provenance_of_another_tool_marks_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match=r"did not write \(provenance\.json\)"), claim(RunFolder(tmp_path)):
        pass
    assert tree(tmp_path) == {"provenance.json": b"{}"}


def test_a_mistake_found_before_the_first_step_takes_the_folder_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "made" / "run")
    with pytest.raises(UserError, match="NaN"), claim(run):  # noqa: PT012
        run.append_metrics({"step": 0, "kl": 3.0})
        raise UserError("NaN in the expert")
    assert not (tmp_path / "made").exists()
    with claim(run, later=0.5) as state:
        assert state == "new"


@pytest.mark.parametrize("done", [lambda run: save_checkpoint(run, 1), lambda run: run.append_metrics({"step": 5})])
def test_a_mistake_found_later_loses_nothing(tmp_path: Path, done: Callable[[RunFolder], Any]) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="finite"), claim(run):  # noqa: PT012
        done(run)
        raise UserError("the loss is no longer finite")
    with claim(run) as state:
        assert state == "resume"


def test_a_finished_run_whose_weights_were_altered_is_not_called_finished(tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    weights = tmp_path / "run" / "adapter_model.safetensors"
    (tmp_path / "run" / "adapter_config.json").write_text('{"a": "note"}')
    with claim(RunFolder(tmp_path / "run")) as state:
        assert state == "finished"
    weights.write_text("else")
    with pytest.raises(UserError, match=f"{weights}: has changed"), claim(RunFolder(tmp_path / "run")):
        pass
    weights.unlink()
    with pytest.raises(UserError, match=f"{weights}: is missing"), claim(RunFolder(tmp_path / "run")):
        pass


def test_going_on_with_other_libraries_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        pass
    monkeypatch.setattr(kd.runs.run_folder, "environment", lambda: {"libraries": {"torch": "3"}, "python": "3"})
    with caplog.at_level(logging.WARNING), claim(run):
        pass
    assert "torch: 2 -> 3" in caplog.text


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_a_step_and_are_always_json(tmp_path: Path) -> None:
    import numpy as np

    run = RunFolder(tmp_path / "run")
    with claim(run):
        for step in range(4):
            run.append_metrics({"step": step, "loss": np.float32(0.5), "kl": float("nan"), "norm": float("inf")})
        run.cut_metrics(2)
        strict = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
        lines = [json.loads(line, **strict) for line in run.metrics_path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert lines[0] == {"step": 0, "loss": 0.5, "kl": "nan", "norm": "inf"}
        run.cut_metrics(-1)
        assert run.metrics_path.read_text() == ""
        with pytest.raises(TypeError, match="step"):
            run.append_metrics({"loss": 1.0})


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> Iterator[RunFolder]:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        yield run


def test_publish_records_hashes_replaces_files_and_refuses_pickles(held: RunFolder) -> None:
    def write(name: str, text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_text(text) and None

    with pytest.raises(RuntimeError, match="nothing was published"):
        held.mark_finished({})
    held.publish(write("model.safetensors", "first"))
    assert held.publish(write("model.safetensors", "second")) == ["model.safetensors"]
    with pytest.raises(RuntimeError, match=r"training_args\.bin"):
        held.publish(write("training_args.bin", "pickle"))
    with pytest.raises(RuntimeError, match=r"recipe\.yaml"):
        held.publish(write("recipe.yaml", "mine"))
    assert (held.path / "model.safetensors").read_text() == "second"
    held.mark_finished({"loss": float("nan"), "where": Path("x")})
    record = json.loads((held.path / "run.json").read_text())
    assert record["files"] == {"model.safetensors": hashlib.sha256(b"second").hexdigest()}
    assert record["finished"] is True
    assert record["summary"] == {"loss": "nan", "where": "x"}


def test_weights_arrive_before_configs(held: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (arrived.append(Path(new).name), replace(old, new)))
    names = ["adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"]
    held.publish(lambda folder: [(folder / name).write_text("x") for name in names] and None)
    assert arrived == ["model.safetensors", "tokenizer.json", "adapter_config.json", "config.json"]


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where the tests may mount one."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.call(command, stderr=subprocess.DEVNULL):
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_known_whoever_meets_it(tiny_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"x": torch.zeros(100_000)}
    run = RunFolder(tiny_disk / "run")
    with claim(run):
        whole = save_checkpoint(run, 1)
        with pytest.raises(MachineError, match="the disk is full"):
            run.publish(lambda folder: save_file(tensors, folder / "model.safetensors"))
        shutil.rmtree(run.path / ".publishing")
        with pytest.raises(MachineError, match="the disk is full"), disk_errors(run.path):
            torch.save(tensors, run.path / "optimizer.pt")
        with pytest.raises(MachineError, match="the disk is full"):
            run.append_metrics({"step": 2, "text": "x" * 300_000})
        assert run.checkpoints.latest() == whole
