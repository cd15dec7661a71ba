"""The run folder under kills, foreign hands and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kd.runs.run_folder
from kd.data.fingerprint import data_sha256
from kd.errors import MachineError, UserError
from kd.models.checkpoint import checkpoint
from kd.models.checkpoint_files import check_safetensors, model_fingerprint
from kd.runs.environment import environment, masked
from kd.runs.files import cut_torn_line, disk_errors, write_text_durably
from kd.runs.hashes import file_sha256
from kd.runs.provenance import DataInput, base_fingerprint_of, read_provenance
from kd.runs.run_folder import RunFolder, checkpoint_fault

RECIPE = "base: some/base\noutput: out\nseed: 0\ntrain:\n  learning_rate: 0.1\n"
INPUTS = {"base": "b" * 64, "expert.ecom": "e" * 64}
DATA = {"general": [DataInput("general.jsonl", "1" * 64, 0.9)], "ecom": [DataInput("ecom.jsonl", "2" * 64, 0.1)]}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.runs.run_folder, "environment", lambda: {"libraries": {"torch": "2"}, "python": "3"})


def claim(run: RunFolder, recipe: str = RECIPE, inputs: Any = INPUTS, data: Any = DATA, stage: str = "align") -> Any:
    return run.claim(stage, recipe, inputs, base="some/base", data=data)


def save_checkpoint(run: RunFolder, step: int, text: str | None = None) -> Path:
    staging = run.staging_dir / f"checkpoint-{step}"
    (staging / "inner").mkdir(parents=True, exist_ok=True)
    (staging / "weights").write_text(text or f"weights after {step}")
    (staging / "inner" / "state").write_text(f"state after {step}")
    return run.seal_checkpoint(staging, step)


def whole_run(folder: Path) -> None:
    """A run of four steps whose result follows from its checkpoints alone."""
    run = RunFolder(folder)
    with claim(run) as state:
        if state == "finished":
            return
        latest = run.latest_checkpoint() if state == "resume" else None
        run.prune(1)
        history = json.loads((latest / "weights").read_text()) if latest else []
        run.cut_metrics(len(history) if latest else -1)
        for step in range(len(history) + 1, 5):
            history.append(step * step)
            run.append_metrics({"step": step, "loss": 1 / step})
            if step % 2 == 0:
                save_checkpoint(run, step, json.dumps(history))
                run.prune(1)

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


def test_the_lock_names_its_living_holder_and_ends_with_it_even_if_a_fork_lives_on(tmp_path: Path) -> None:
    script = f"""
        import os, sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        import kd.runs.run_folder
        from kd.runs import RunFolder
        kd.runs.run_folder.environment = lambda: {{}}
        with RunFolder({str(tmp_path / "run")!r}).claim("align", "seed: 0", {{"base": "b"}}, base="x", data={{}}):
            holder = os.getpid()
            if os.fork() == 0:
                print(holder, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        run = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match=rf"held by a live process \(process {pid} on \S+\)"):
            run.claim("align", "seed: 0", {"base": "b"}, base="x", data={}).__enter__()
        process.kill()
        process.wait()
        with run.claim("align", "seed: 0", {"base": "b"}, base="x", data={}) as state:
            assert state == "resume"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


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


LONG = "x" * 70_000


@pytest.mark.parametrize("content", ["", "abc", "abc\n", "abc\ndef", "\n" + 3 * LONG, LONG + "\n" + LONG])
def test_cut_torn_line_keeps_exactly_the_whole_lines(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lines"
    path.write_text(content)
    whole = content[: content.rfind("\n") + 1]
    assert cut_torn_line(path) is (whole != content)
    assert path.read_text() == whole


# -- claiming ----------------------------------------------------------------------------------------------------------


def test_states_follow_one_another_and_finished_keeps_the_summary(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    with claim(run) as state:
        assert state == "new"
    with claim(RunFolder(run.path)) as state:
        assert state == "resume"
    whole_run(run.path)
    before = tree(run.path)
    with claim(RunFolder(run.path)) as state:
        assert state == "finished"
    assert tree(run.path) == before
    assert run.summary() == {"steps": 4}
    assert (run.path / "recipe.yaml").read_text() == RECIPE


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
        ({"recipe": RECIPE.replace("0.1", "0.2")}, "train.learning_rate: 0.1 -> 0.2"),
        ({"recipe": RECIPE + "lambda: 0.5\n"}, "lambda: (not given) -> 0.5"),
        ({"inputs": INPUTS | {"base": "c" * 64}}, f'content of base: "{"b" * 64}" -> "{"c" * 64}"'),
        (
            {"data": DATA | {"ecom": [DataInput("ecom.jsonl", "3" * 64, 0.1)]}},
            f'content of data.ecom[0]: "{"2" * 64}" -> "{"3" * 64}"',
        ),
        ({"stage": "sft"}, 'stage: "align" -> "sft"'),
        ({"stage": "sft", "recipe": RECIPE + "more: 1\n"}, 'stage: "align" -> "sft"'),  # the rest follows from it
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


def test_a_moved_folder_goes_on(tmp_path: Path) -> None:
    with claim(RunFolder(tmp_path / "run")):
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    with claim(RunFolder(tmp_path / "moved"), recipe=RECIPE.replace("output: out", "output: moved")) as state:
        assert state == "resume"


@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml", ".tmp-thesis", "provenance.json"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds files that no run wrote.*{name}"), claim(RunFolder(tmp_path)):
        pass
    assert tree(tmp_path) == {name: b"{}"}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UserError, match=str(tmp_path / "out")), claim(RunFolder(path)):
            pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"{tmp_path}.*cannot be written"), claim(RunFolder(tmp_path / "run")):
        pass


def test_a_mistake_found_before_the_first_step_takes_the_folder_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "made" / "run")
    with pytest.raises(UserError, match="NaN"), claim(run):  # noqa: PT012
        run.append_metrics({"step": 0, "kl": 3.0})
        raise UserError("NaN in the expert")
    assert not (tmp_path / "made").exists()
    with claim(run, recipe=RECIPE + "lambda: 0.5\n") as state:
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


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> Iterator[RunFolder]:
    run = RunFolder(tmp_path / "run")
    with claim(run):
        yield run


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def symlink(path: Path) -> None:
    target = path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(target)


def plant(path: Path) -> None:
    path.with_name("optimizer.pt").write_bytes(b"pickled")


@pytest.mark.parametrize(
    ("harm", "name", "reason"),
    [
        (tear, "weights", "torn or altered"),
        (alter, "inner/state", "torn or altered"),
        (Path.unlink, "weights", "weights is missing"),
        (symlink, "weights", "no plain file"),
        (plant, "weights", "optimizer.pt is not in its manifest"),
        (Path.unlink, "manifest.json", "cannot be read"),
        (tear, "manifest.json", None),
        (lambda path: path.write_text("[]"), "manifest.json", "cannot be read"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_with_a_warning(
    held: RunFolder, harm: Callable[[Path], Any], name: str, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_checkpoint(held, 9), save_checkpoint(held, 10)
    assert held.latest_checkpoint() == newer == held.checkpoint(10)
    harm(newer / name)
    if reason is None:  # only the manifest's final newline is gone: it still says all it said
        assert held.latest_checkpoint() == newer
        return
    with caplog.at_level(logging.WARNING):
        assert held.latest_checkpoint() == older
    assert f"{newer}: passed over: " in caplog.text
    assert reason in caplog.text
    assert save_checkpoint(held, 10) == newer
    assert held.latest_checkpoint() == newer


def test_the_manifest_holds_the_hash_of_each_file(held: RunFolder) -> None:
    checkpoint = save_checkpoint(held, 3)
    assert checkpoint.name == "step-000003"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    expected = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in {"weights": "weights after 3", "inner/state": "state after 3"}.items()
    }
    assert {name: entry["sha256"] for name, entry in files.items()} == expected


def test_steps_are_ordered_as_numbers(held: RunFolder) -> None:
    save_checkpoint(held, 999_999)
    newest = save_checkpoint(held, 1_000_000)
    assert held.latest_checkpoint() == newest


def test_prune_keeps_the_newest_and_the_best(held: RunFolder) -> None:
    for step in range(1, 6):
        save_checkpoint(held, step)
    held.prune(2, best=1)
    assert {entry.name for entry in held.checkpoints_dir.glob("step-*")} == {
        "step-000001",
        "step-000004",
        "step-000005",
    }


def test_prune_does_not_count_a_torn_checkpoint_as_the_newest(held: RunFolder) -> None:
    for step in (1, 2):
        save_checkpoint(held, step)
    tear(held.checkpoint(2) / "weights")
    assert held.latest_checkpoint() == held.checkpoint(1)
    held.prune(1)
    assert [entry.name for entry in held.checkpoints_dir.glob("step-*")] == ["step-000001"]


# -- the end -----------------------------------------------------------------------------------------------------------


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


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text_durably(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=f"{path}: the disk is full"):
        write_text_durably(path, "new")
    assert tree(tmp_path) == {"file": b"old"}


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
        assert run.latest_checkpoint() == whole


def test_a_metric_line_that_did_not_fit_is_taken_back(held: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    held.append_metrics({"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    with pytest.raises(MachineError):
        held.append_metrics({"step": 2})
    assert held.metrics_path.read_text() == '{"step": 1}\n'


# -- fingerprints ------------------------------------------------------------------------------------------------------


def safetensors_bytes(data: bytes) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def make_model_folder(folder: Path, data: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(data))
    return folder


def test_fingerprint_is_what_sha256sum_gives_and_follows_weights_and_config_only(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    fingerprint = model_fingerprint(folder)
    command = "LC_ALL=C sha256sum config.json model.safetensors | sha256sum"
    assert fingerprint == subprocess.check_output(command, shell=True, cwd=folder, text=True).split()[0]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / "merged.safetensors").write_bytes(safetensors_bytes(b"something beside it"))
    assert model_fingerprint(folder.rename(tmp_path / "moved")) == fingerprint
    (tmp_path / "moved" / "config.json").write_text('{"a": 1}')
    assert model_fingerprint(tmp_path / "moved") != fingerprint
    assert model_fingerprint(make_model_folder(tmp_path / "other", b"weighty")) != fingerprint


def test_sharded_checkpoints_and_adapters_have_fingerprints(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    with pytest.raises(UserError, match=r"lists model-00002-of-00002\.safetensors, which is missing"):
        model_fingerprint(folder)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(safetensors_bytes(b"more"))
    before = model_fingerprint(folder)
    second.write_bytes(safetensors_bytes(b"MORE"))
    assert model_fingerprint(folder) != before
    index.write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    with pytest.raises(UserError, match="no safetensors file beside it"):
        model_fingerprint(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(b"lora"))
    adapter = model_fingerprint(folder)
    second.unlink()
    assert model_fingerprint(folder) == adapter


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, r"pickled \(pytorch_model.bin\).*save_pretrained"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, r"pickled \(adapter_model.bin\)"),
        ({"config.json": b"{}"}, r"has config.json but no model.safetensors"),
        ({"config.json": b"{}", "training_args.bin": b"x"}, r"has config.json but no model.safetensors"),
        ({"readme": b"hello"}, "neither checkpoint nor adapter"),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs"}, "git-lfs pull|git lfs pull"),
        ({"config.json": b"{}", "model.safetensors": b""}, "no whole safetensors file"),
        ({"config.json": b"{}", "model.safetensors": safetensors_bytes(b"abc")[:-1]}, "bytes where its header says"),
        ({"config.json": b"{}", "provenance.json": b'{"toolkit": "dae-align"}'}, "this run has not finished"),
    ],
)
def test_what_cannot_be_read_safely_and_whole_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        model_fingerprint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_real_safetensors_files_pass_the_size_check(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    half = torch.zeros(3, dtype=torch.bfloat16)
    for number, tensors in enumerate([{}, {"a": half}, {"a": half, "b": torch.ones(2), "c": torch.zeros(0)}]):
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata={"format": "pt"})
        check_safetensors(tmp_path / f"{number}.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nobody/no-such-model-here", "a/b/c"])
def test_a_model_that_cannot_be_had_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^{name}: there is no such folder"):
        checkpoint(name)


def test_hub_ids_resolve_to_their_cached_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    snapshot = make_model_folder(cached / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checkpoint("some/model").fingerprint == model_fingerprint(snapshot)


def test_data_fingerprints(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    assert data_sha256(rows) == file_sha256(rows) == hashlib.sha256(rows.read_bytes()).hexdigest()
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "data-0.arrow").write_bytes(b"rows")
    before = data_sha256(folder)
    (folder / "cache-1234.arrow").write_bytes(b"left by reading")
    assert data_sha256(folder) == before
    (folder / "data-0.arrow").write_bytes(b"Rows")
    assert data_sha256(folder) != before
    with pytest.raises(UserError, match=r"nowhere.jsonl: there is no such file"):
        data_sha256("runs/nowhere.jsonl")


def test_a_hub_data_set_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(UserError, match=r"nobody/no-such-rows: .*nor can it be had as a hub data set"):
        data_sha256("nobody/no-such-rows")
    found = []
    for commit in ("abc", "abd", "abc"):
        builder = SimpleNamespace(hash=commit)
        monkeypatch.setattr(datasets, "load_dataset_builder", {"some/rows": builder}.__getitem__)
        found.append(data_sha256("some/rows"))
    assert found[0] == found[2] != found[1]


# -- environment -------------------------------------------------------------------------------------------------------


def test_secrets_of_the_command_line_are_masked() -> None:
    command = [
        "dae", "align", "--hub-token", "hf_abcdefghijk", "train.hub_token=abc", "--seed", "7", "--api-key=xyz",
        "https://me:pw@host/x", "--note", "sk-abcdefghijklm", "train.max_new_tokens=5",
        "--compare", "next-token=runs/ntp",
    ]  # fmt: skip
    assert masked(command) == [
        "dae", "align", "--hub-token", "***", "train.hub_token=***", "--seed", "7", "--api-key=***",
        "https://***@host/x", "--note", "***", "train.max_new_tokens=5",
        "--compare", "next-token=runs/ntp",
    ]  # fmt: skip


def test_the_environment_holds_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_seen")
    monkeypatch.setenv("SOME_PLAIN_NAME", "not-for-publishing")
    facts = environment(["dae", "align"])
    text = json.dumps(facts)
    assert "never_to_be_seen" not in text
    assert "not-for-publishing" not in text
    assert facts["libraries"].keys() >= {"torch", "transformers", "peft"}
    assert facts["torch"]["threads"] >= 1
    assert facts["command"] == ["dae", "align"]


def test_importing_runs_imports_no_torch() -> None:
    script = "import sys, kd.runs.run_folder; print({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY, text=True).strip() == "set()"


def test_checkpoint_fault_is_none_for_what_was_sealed(held: RunFolder) -> None:
    assert checkpoint_fault(save_checkpoint(held, 1)) is None
