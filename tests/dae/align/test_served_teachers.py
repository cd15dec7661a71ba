"""Teachers on a server: asked once about each row, checked position by position, and never believed blindly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from align_runs import HELD_OUT, assert_same_student, merged
from pico import make_checkpoint
from safetensors.torch import load_file
from teacher_server import TeacherServer
from worlds import align_command, metrics_of

import kd.cache.filling
import kd.cache.store
from dae import cli
from kd.cache.store import TeacherStore

BASE = ("start=base", "cache.path=cache")


@pytest.fixture
def server(world: Path) -> Iterator[TeacherServer]:
    with TeacherServer(merged("expert", "whole")) as server:
        yield server


def served(server: TeacherServer, top_k: int = 4, key: str = "expert.domain") -> list[str]:
    return [f"{key}.url={server.url}", f"{key}.model=whole", f"{key}.top_k={top_k}"]


def fill(server: TeacherServer, *more: str) -> int:
    return cli.run(["cache", *align_command(*BASE, *served(server), *more)])


def parts() -> dict[str, bytes]:
    """Of the teacher on the server."""
    found = sorted(Path("cache").rglob("part-*.safetensors"))
    return {str(file): file.read_bytes() for file in found if " at http" in (file.parent / "teacher.json").read_text()}


def losses(folder: Path) -> list[float]:
    lines = metrics_of(folder)
    return [value for line in lines for key, value in line.items() if key.endswith(("loss", "kl", "ntp"))]


def test_a_served_teacher_teaches_as_one_in_memory(
    world: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all probabilities: those that are not sent are one class, here of one token."""
    assert cli.run(align_command("start=base", *HELD_OUT, output="live")) == 0

    def refuse(*_: object) -> str:
        raise AssertionError("no teacher is loaded")

    monkeypatch.setattr("dae.alignment.add_frozen_adapter", refuse)
    assert cli.run(align_command(*BASE, *HELD_OUT, *served(server, 287), output="student")) == 0
    live = losses(Path("live"))
    assert losses(Path("student")) == pytest.approx(live, rel=1e-4, abs=1e-5) and len(live) > 20
    assert_same_student(Path("student"), Path("live"), 2e-3)
    rows = [line for name in ("shop", "heldout_shop") for line in Path(f"{name}.jsonl").read_text().splitlines()]
    asked = [tuple(request["body"]["prompt"]) for request in server.requests]
    assert len(asked) == len(set(asked)) <= len(rows)
    assert {request["path"] for request in server.requests} == {"/v1/completions"}


def test_what_is_stored_is_what_the_model_says(world: Path, server: TeacherServer) -> None:
    assert fill(server) == 0
    local = ["cache.kind=topk", "cache.top_k=4", "cache.path=local", "start=base", "expert=whole"]
    assert cli.run(["cache", *align_command(*local)]) == 0
    theirs, ours = (
        load_file(part)
        for folder, name in (("cache", "whole at"), ("local", "/whole"))
        for part in Path(folder).glob("*/part-00000.safetensors")
        if name in json.loads((part.parent / "teacher.json").read_text())["teacher"]
    )
    assert torch.equal(theirs["digests"], ours["digests"]) and torch.equal(theirs["offsets"], ours["offsets"])
    torch.testing.assert_close(theirs["log_q"], ours["log_q"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs["log_tail"], ours["log_tail"], rtol=1e-4, atol=1e-4)
    assert (theirs["ids"] == ours["ids"]).float().mean() > 0.99  # equal probabilities may change places


def test_failures_and_wrong_answers_are_asked_again(world: Path, server: TeacherServer) -> None:
    assert fill(server) == 0
    whole = parts()
    shutil.rmtree("cache")
    server.behave("429", "500", "cut", "nan", "shifted", "good", "empty", "short", "429", "good", "missing")
    assert fill(server, "expert.domain.concurrency=1") == 0
    assert parts() == whole and len(server.script) == 0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("shifted", "is about other tokens than"),
        ("missing", "has no log probabilities"),
        ("short", "positions for a row of"),
        ("nan", "has values that are no logarithms of probabilities"),
        ("positive", "has values that are no logarithms of probabilities"),
        ("few", "tokens, and top_k is 4"),
        ("foreign", "names tokens that the student lacks"),
        ("heavy", "has probabilities whose sum is above 1"),
        ("empty", "it has no choices"),
        ("plain", "answers without `prompt_logprobs`"),
        ("html", "not a completions endpoint"),
        ("first", "the first position has probabilities"),
        ("prompt", "position 1 is about other tokens"),
        ("cut_off", "has -9999 instead of a probability"),
        ("null", "tokens, and top_k is 4"),
        ("400", "needs a server with --max-model-len of at least"),
        ("401", "access denied (401)"),
        ("404", "model whole not found (404)"),
    ],
)
def test_a_server_that_lies_is_refused_and_nothing_is_kept(
    server: TeacherServer, step: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave(*[step] * 20)
    assert fill(server, "expert.domain.concurrency=1") == 2
    error = capsys.readouterr().err
    assert words in error and server.url in error and "Traceback" not in error
    assert not parts()


def test_a_stopped_fill_goes_on_to_the_same_bytes(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kd.cache.filling, "SERVED_PART_BYTES", 2000)
    monkeypatch.setattr(kd.cache.filling, "SERVED_PART_ROWS", 1)
    assert fill(server) == 0
    whole = parts()
    assert len(whole) > 5
    shutil.rmtree("cache")
    server.behave(*["good"] * 60, *["400"] * 20)
    assert fill(server, "expert.domain.concurrency=1") == 2
    kept = parts()
    assert 0 < len(kept) < len(whole) and all(whole[name] == content for name, content in kept.items())
    server.behave()
    assert fill(server) == 0
    assert parts() == whole
    assert len(server.requests) < 100  # those that are there were not asked again
    server.behave()
    assert fill(server) == 0 and server.requests == []
    assert "expert.domain: all 65 rows were there" in capsys.readouterr().out


@pytest.mark.parametrize("every", [1000, 8], ids=["failed", "killed"])
def test_answers_of_an_unfinished_part_are_kept(
    every: int, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part has all rows. The end is that of a fill that was never stopped, and no row is paid for twice."""
    monkeypatch.setattr(kd.cache.filling, "KEPT_EVERY", every)
    assert fill(server) == 0
    whole, rows = parts(), len(server.requests)
    assert len(whole) == 1
    shutil.rmtree("cache")
    server.behave(*["good"] * 40, *["400"] * 20)
    if every == 1000:
        assert fill(server, "expert.domain.concurrency=1") == 2
    else:
        with monkeypatch.context() as killed:  # nothing is written where it stops

            def die(*_: object) -> None:
                raise SystemExit(9)

            write = kd.cache.store.TeacherStore.write_unfinished
            calls: list[int] = []

            def until_the_fifth(store: TeacherStore, answers: dict[bytes, Any]) -> None:
                calls.append(len(answers))
                die() if len(calls) > 4 else write(store, answers)

            killed.setattr(kd.cache.store.TeacherStore, "write_unfinished", until_the_fifth)
            assert fill(server, "expert.domain.concurrency=1") != 0
    assert not parts()
    (unfinished,) = Path("cache").glob("*/unfinished.safetensors")
    kept = len(load_file(unfinished)["checks"])
    assert kept == (40 if every == 1000 else 32)
    server.behave()
    assert fill(server) == 0
    # One that is kept is asked again, in case that another model is there; of a killed fill, one was under way.
    assert rows - kept + 1 <= len(server.requests) <= rows - kept + 1 + (every < 1000)
    assert parts() == whole and not unfinished.exists()


@pytest.mark.parametrize(
    ("key", "words"), [("sk-one\nsk-two", "has a line break"), ("\u043a\u043b\u044e\u0447", "beyond ASCII")]
)
def test_a_key_that_no_header_can_hold_is_refused_without_repeating_it(
    key: str, words: str, server: TeacherServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", key)
    assert fill(server) == 2
    error = capsys.readouterr().err
    assert "TEACHER_API_KEY: " in error and words in error and "sk-" not in error and key not in error
    assert not server.requests


def test_another_model_is_noticed_before_a_part_is_whole(
    world: Path, server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave(*["good"] * 40, *["400"] * 20)
    assert fill(server, "expert.domain.concurrency=1") == 2
    server.serve(make_checkpoint(world / "other-expert", seed=9))
    server.behave()
    assert fill(server) == 2
    assert "it is another model" in capsys.readouterr().err
    assert not parts() and len(server.requests) == 1


def test_a_damaged_file_of_an_unfinished_part_costs_no_more_than_itself(
    server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave(*["good"] * 40, *["400"] * 20)
    assert fill(server, "expert.domain.concurrency=1") == 2
    (unfinished,) = Path("cache").glob("*/unfinished.safetensors")
    unfinished.write_bytes(b"torn")
    assert fill(server) == 2
    error = capsys.readouterr().err
    assert f"{unfinished}: cannot be read" in error and "remove this file" in error and "folder" not in error


@pytest.mark.parametrize(
    "written",
    [
        ["expert.domain=http://user:s3cret@h/v1"],
        ["expert.domain={url: 'http://user:s3cret@h/v1', model: m}"],
        ["expert={domain: {url: 'http://user:s3cret@h/v1', model: m}}"],
        ["expert.domain.url=http://user:s3/cret@h/v1", "expert.domain.model=m"],
    ],
)
def test_a_login_is_not_repeated_however_it_is_written(
    written: list[str], world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["cache", *align_command(*BASE, *written)]) == 2
    assert "s3" not in capsys.readouterr().err


@pytest.mark.parametrize("address", ["http://user:s3cret@h/v1", "http://h/v1?key=s3cret", "http://h/v1#s3cret"])
def test_a_login_in_an_address_is_not_repeated(
    address: str, world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = align_command(*BASE, f"expert.domain.url={address}", "expert.domain.model=m")
    for command in (["cache"], ["check"], []):
        assert cli.run([*command, *asked]) == 2
        error = capsys.readouterr().err
        assert "expert.domain.url: contains a login or parameters" in error and "s3cret" not in error


def test_two_spellings_of_one_address_have_one_store(world: Path, server: TeacherServer) -> None:
    assert fill(server) == 0
    server.behave()
    shouted = server.url.replace("http://", "HTTP://")
    assert fill(server, f"expert.domain.url={shouted}/") == 0
    assert not server.requests


def test_another_model_under_the_same_name_is_noticed(
    server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(server, "train.max_steps=40") == 0
    with Path("shop.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "KETTLE", "completion": " NINE COINS"}) + "\n")
    server.serve(Path("base"))
    assert fill(server, "train.max_steps=40") == 2
    assert "no longer answers as when" in capsys.readouterr().err
    server.serve(Path("whole"))
    assert fill(server, "train.max_steps=40") == 0
    assert "expert.domain: 1 of " in capsys.readouterr().out


def test_another_tokenizer_is_noticed(server: TeacherServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.texts = {token: f"<{text}>" for token, text in server.texts.items()}
    assert fill(server) == 2
    assert "has another tokenizer" in capsys.readouterr().err and not parts()


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: TeacherServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(server) == 0
    assert not any("authorization" in request["headers"] for request in server.requests)
    shutil.rmtree("cache")
    monkeypatch.setenv("TEACHER_API_KEY", "sk-secret")
    server.behave()
    assert cli.run(align_command(*BASE, *served(server))) == 0
    assert {request["headers"]["authorization"] for request in server.requests} == {"Bearer sk-secret"}
    server.behave("401")
    shutil.rmtree("cache")
    assert fill(server) == 2
    assert "sk-secret" not in "".join(capsys.readouterr())
    files = [file for folder in ("student", "cache") for file in Path(folder).rglob("*") if file.is_file()]
    assert files and not any(b"sk-secret" in file.read_bytes() for file in files)


def test_a_server_that_is_down_is_told_at_once(server: TeacherServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.__exit__()
    assert fill(server) == 4
    assert "cannot be reached" in capsys.readouterr().err
    server.__enter__()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cache=null"], "cache=null: is required with a teacher on a server"),
        (["temperature=2.0"], "temperature=2.0: a server gives probabilities at temperature 1 (expert.domain)"),
        (["start=null", "start.domain=0.5"], "start.domain=0.5: needs the expert's weights"),
        (["expert.domain.top_k=0"], "expert.domain.top_k=0: must be at least 1"),
        (["expert.domain.topk=5"], "expert.domain.topk=5: unknown key; did you mean `top_k`?"),
        (["expert.domain={url: http://host/v1}"], "expert.domain.model: is missing"),
        (["expert={url: http://host/v1, model: m}"], "a model on a server needs a name"),
        (["expert.domain.url=http://me:word@host/v1"], "contains a login or parameters"),
        (["expert.domain.url=http://host/v1#word"], "contains a login or parameters"),
        (["expert=http://host/v1"], "is the address of a server: write expert.domain.url=ADDRESS"),
        (["expert.domain.url=ftp://host"], "expected an address such as"),
        (["expert.domain.url=localhost:8000/v1"], "expected an address such as"),
        (["cache.kind=sampled", "budget.general=0.1"], "cache.kind=sampled: cannot be combined with budget"),
    ],
)
def test_mistakes_in_the_recipe_are_told(
    server: TeacherServer, settings: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = align_command(*BASE, *served(server), *settings)
    for way in (["cache", *command], ["check", *command], command):
        assert cli.run(way) == 2
        assert words in capsys.readouterr().err
    assert server.requests == []


def test_both_teachers_can_be_served_and_check_says_what_is_to_be_asked(
    server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with TeacherServer(Path("base")) as other:
        both = [*BASE[1:], *served(server), *served(other, 6, "reference"), "data.chat_template=plain"]
        assert cli.run(["check", *align_command(*both)]) == 0
        told = capsys.readouterr().out
        assert "expert.domain" in told and "reference" in told and other.requests == server.requests == []
        assert cli.run(["check", *align_command(*both), "--weights"]) == 2
        assert "cannot measure a teacher on a server" in capsys.readouterr().err
        assert cli.run(align_command(*both)) == 0
    first = metrics_of(Path("student"))[0]
    assert first["initial_general_kl"] < 1e-3 and "start" not in first  # the student is still the reference
    assert f"| expert.domain | `whole at {server.url}` |" in Path("student/README.md").read_text()
    faster = [*both, "expert.domain.concurrency=2"]
    assert cli.run(align_command(*faster)) == 0  # finished; the pace is no setting of the run


def test_distill_has_a_served_teacher(world: Path, server: TeacherServer) -> None:
    command = ["distill", "--base", "base", "--data", "shop.jsonl", "--output", "distilled", "cache.path=cache"]
    command += [
        "train.max_steps=6",
        "train.logging_steps=2",
        "train.learning_rate=1e-2",
        *served(server, 20, "teacher"),
    ]
    assert cli.run(["check", *command]) == 0
    assert cli.run(command) == 0
    kl = [line["train/kl"] for line in metrics_of(Path("distilled")) if "train/kl" in line]
    assert kl[-1] < kl[0]


def test_models_of_unlike_vocabularies_have_stores_of_their_own(world: Path, server: TeacherServer) -> None:
    """Another output layer is another tail; the run is the one of a live teacher either way."""
    make_checkpoint(Path("padded"), vocab_size=304)
    first = ["reference=padded", "expert.domain.concurrency=2"]
    assert fill(server) == 0
    assert fill(server, *first) == 0
    stores = [json.loads(file.read_text()) for file in Path("cache").glob("*/teacher.json")]
    assert len([facts for facts in stores if " at http" in facts["teacher"]]) == 1  # 288 are shared by both


def test_an_address_with_a_slash_and_another_pace_are_the_same_run(world: Path, server: TeacherServer) -> None:
    command = align_command(*BASE, *served(server))
    assert cli.run([*command, "train.max_steps=4"]) == 0
    server.behave()
    other = [f"expert.domain.url={server.url}/", "expert.domain.concurrency=1"]
    assert cli.run([*command, "train.max_steps=4", *other]) == 0
    assert server.requests == []


def test_weights_of_an_expert_named_as_a_pace_are_compared(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--expert", "concurrency=expert", "--domain-data", "concurrency=shop.jsonl", "start=base"]
    command = ["align", "--base", "base", *command, "--general-data", "general.jsonl", "--output", "named"]
    command += ["train.max_steps=2", "lora.rank=4"]
    assert cli.run([*command, "weights={general: 1.0, concurrency: 1.0}"]) == 0
    assert cli.run([*command, "weights={general: 1.0, concurrency: 9.0}"]) == 2
    assert "weights.concurrency" in capsys.readouterr().err


def test_a_pipeline_with_a_served_teacher_runs_twice(world: Path, server: TeacherServer) -> None:
    student = {
        "stage": "align", "base": "base", "expert": {"domain": {"url": server.url, "model": "whole", "top_k": 4}},
        "start": "base", "cache": {"path": "cache"}, "data": {"domain": "shop.jsonl", "general": "general.jsonl"},
        "lora": {"rank": 4}, "train": {"max_steps": 2},
    }  # fmt: skip
    Path("path.yaml").write_text(yaml.safe_dump({"output": "path", "stages": {"student": student}}))
    assert cli.run(["run", "path.yaml"]) == 0
    server.behave()
    assert cli.run(["run", "path.yaml"]) == 0
    assert server.requests == []
    student["expert"]["domain"]["url"] = "http://me:word@host/v1"  # type: ignore[index]
    Path("path.yaml").write_text(yaml.safe_dump({"output": "other", "stages": {"student": student}}))
    assert cli.run(["run", "path.yaml"]) == 2
    assert not Path("other").exists()
