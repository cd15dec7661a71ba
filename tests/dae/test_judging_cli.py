"""`dae eval mt-bench` and `dae eval alpaca-eval` as commands: exit statuses, kills, keys."""

from __future__ import annotations

import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_files import make_alpaca, make_chat_checkpoint, make_mt_bench
from dae_eval.folders import read_evaluation
from judge_server import JudgeServer
from processes import Ended, Running, Signal, dae

from dae import cli
from kd.models.checkpoint_files import model_fingerprint

KEY = "sk-very-secret-0123456789"
APPEND = "dae_eval.judging.asking:append_lines"


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return make_alpaca(make_mt_bench(tmp_path / "world"))


def mt_bench(server: JudgeServer, *more: str, output: str = "out", answers: str = "ours.jsonl") -> list[str]:
    whose = ["--answers", answers] if answers else []
    return [
        "eval", "mt-bench", *whose, "--questions", "question.jsonl", "--references", "reference.jsonl",
        "--judge-prompts", "judge_prompts.jsonl", "--judge-url", server.url, "--judge-model", "some-judge",
        "--output", output, "--concurrency", "1", *more,
    ]  # fmt: skip


def here(
    arguments: list[str], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ended:
    """Run a command in this process."""
    monkeypatch.chdir(world)
    status = cli.run(arguments)
    printed = capsys.readouterr()
    return Ended(status, printed.out, printed.err)


@pytest.mark.parametrize(("call", "after"), [(1, True), (4, False), (8, True)])
def test_a_killed_judge_run_asks_nothing_twice_and_gives_the_same_numbers(
    world: Path,
    server: JudgeServer,
    call: int,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.behave()
    undisturbed = here(mt_bench(server, output="whole"), world, monkeypatch, capsys)
    every_prompt = Counter(server.prompts())
    assert len(every_prompt) == every_prompt.total() == 8

    killed = dae(mt_bench(server), world, signals=[Signal(APPEND, call, after=after)])
    assert killed.status == -signal.SIGKILL
    assert not (world / "out" / "evaluation.json").exists()
    log = (world / "out" / "replies" / "judgments.jsonl").read_text()
    kept = {json.loads(line)["key"] for line in log.splitlines()}
    assert len(kept) == (call if after else call - 1)

    server.behave()
    finished = here(mt_bench(server), world, monkeypatch, capsys)
    assert finished.status == 0, finished.err
    judgments = [json.loads(line) for line in (world / "out" / "judgments-1.jsonl").read_text().splitlines()]
    already = {row["user_prompt"] for row in judgments if f"1/{row['question_id']}/{row['turn']}" in kept}
    assert set(server.prompts()) == set(every_prompt) - already
    assert undisturbed.out.replace("whole", "out") == finished.out
    assert read_evaluation(world / "out").tasks == read_evaluation(world / "whole").tasks


def test_ctrl_c_keeps_what_was_answered(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave(script=["good"] * 3 + ["hold"])
    running = Running(mt_bench(server), world)
    while len(server.requests()) < 4:
        assert running.process.is_alive()
    while len((world / "out/replies/judgments.jsonl").read_text().splitlines()) < 3:
        assert running.process.is_alive()
    running.send(signal.SIGINT)
    stopped = running.end()
    server.behave()
    assert stopped.status == 130
    assert "replies so far are kept in out." in stopped.err
    assert here(mt_bench(server), world, monkeypatch, capsys).status == 0
    assert len(server.prompts()) == 5


def test_the_key_is_written_nowhere(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave(needs_key=KEY, echo_key=True)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ended = here(mt_bench(server), world, monkeypatch, capsys)
    assert ended.status == 0, ended.err
    assert len(server.prompts()) == 8
    files = [path for path in (world / "out").rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert "***" in (world / "out" / "judgments-1.jsonl").read_text(), "the server's echo was masked"
    server.behave(needs_key="another key")
    refused = here(mt_bench(server, output="refused"), world, monkeypatch, capsys)
    assert refused.status == 2
    assert "OPENAI_API_KEY" in refused.err
    assert KEY not in ended.out + ended.err + refused.out + refused.err
    monkeypatch.delenv("OPENAI_API_KEY")
    no_key = here(mt_bench(server, output="refused"), world, monkeypatch, capsys)
    assert no_key.status == 2
    assert "OPENAI_API_KEY" in no_key.err


def test_no_other_endpoint_gets_the_judges_key(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("MODEL_API_KEY", raising=False)
    command = mt_bench(server, "--model", "served", "--model-url", server.url, answers="")
    ended = here(command, world, monkeypatch, capsys)
    assert ended.status == 0, ended.err
    sent = {one["body"]["model"]: one["headers"].get("authorization") for one in server.requests()}
    assert sent == {"served": None, "some-judge": f"Bearer {KEY}"}


def test_a_judge_that_is_not_there_is_status_4(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = mt_bench(server)
    command[command.index("--judge-url") + 1] = f"http://127.0.0.1:{port}/v1"
    ended = here(command, world, monkeypatch, capsys)
    assert ended.status == 4
    assert str(port) in ended.err
    server.behave(script=["good"] * 2 + ["429"] * 11)
    ended = here(mt_bench(server), world, monkeypatch, capsys)
    assert ended.status == 4
    assert "429" in ended.err and "--requests-per-minute" in ended.err
    assert here(mt_bench(server), world, monkeypatch, capsys).status == 0


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        (["--judge", "somewhere"], "--judge CKPT"),
        (["--mode", "pairwise"], "--against"),
        (["--against", "theirs.jsonl", "--mode", "single"], "--mode pairwise"),
        (["--price-per-million-tokens", "1"], "--price-per-million-tokens 1:"),
        (["--price-per-million-tokens", "1,x"], "--price-per-million-tokens 1,x:"),
        (["--model-id", "x"], "--model-id:"),
        (["--model-url", "http://localhost/v1"], "--model NAME"),
        (["--references-kind", "mine"], "references-kind"),
        (["--repeat", "0"], "repeat"),
        (["--judge-url", "http://me:secret@host/v1"], "--judge-url:"),
        (["--answers", "nowhere.jsonl"], "--answers nowhere.jsonl:"),
    ],
)
def test_wrong_flags_are_reported_before_anything_is_written(
    world: Path,
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    flag: str,
) -> None:
    server.behave()
    ended = here(mt_bench(server, *more), world, monkeypatch, capsys)
    assert ended.status == 2
    assert flag in ended.err
    assert "secret" not in ended.err
    assert not (world / "out").exists()
    assert server.requests() == []


def test_needed_flags_are_named(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, flags in (
        (["eval", "mt-bench"], "--questions, --output"),
        (["eval", "mt-bench", "--questions", "question.jsonl", "--output", "out"], "--model CKPT, --answers FILE"),
        (["eval", "alpaca-eval"], "--output"),
        (["eval", "alpaca-eval", "--output", "out"], "--annotations, --outputs, or --model"),
        (["eval", "alpaca-eval", "--output", "out", "--judge", "x", "--outputs", "ours.json"], "--baseline FILE"),
    ):
        ended = here(command, world, monkeypatch, capsys)
        assert (ended.status, flags in ended.err) == (2, True), ended.err


def test_help_names_the_extra_in_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["eval", "alpaca-eval", "--help"]) == 0
    assert "pip install -e '.[alpaca]'" in capsys.readouterr().out


def test_pairwise_against_an_earlier_output_and_an_estimate(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave()
    assert here(mt_bench(server, output="earlier", answers="theirs.jsonl"), world, monkeypatch, capsys).status == 0
    command = mt_bench(server, "--against", "earlier", "--price-per-million-tokens", "1000,2000")
    server.behave()
    estimate = here([*command, "--estimate"], world, monkeypatch, capsys)
    assert (estimate.status, server.requests()) == (0, [])
    ended = here(command, world, monkeypatch, capsys)
    assert (ended.status, len(server.requests())) == (0, 16)
    assert "ties as half" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_a_checkpoint_from_answers_to_a_report_folder(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.behave()
    checkpoint = make_chat_checkpoint(world / "student")
    command = mt_bench(server, "--model", "student", "--max-new-tokens", "6", answers="")
    assert here(command, world, monkeypatch, capsys).status == 0
    facts = read_evaluation(world / "out").model
    assert (facts.path, facts.fingerprint) == ("student", model_fingerprint(checkpoint))
    answers = [json.loads(line) for line in (world / "out" / "answers.jsonl").read_text().splitlines()]
    assert {row["model_id"] for row in answers} == {"student"}

    alpaca = ["eval", "alpaca-eval", "--model", "student", "--instructions", "instructions.json", "--output", "alpaca",
              "--max-new-tokens", "6"]  # fmt: skip
    assert here(alpaca, world, monkeypatch, capsys).status == 0
    outputs = json.loads((world / "alpaca" / "outputs.json").read_text())
    assert [list(row) for row in outputs] == [["dataset", "instruction", "output", "generator"]] * 6
    assert {row["generator"] for row in outputs} == {"student"}

    alpaca[alpaca.index("alpaca")] = "judged"
    judge = ["--judge-prompts", "judge_prompts.jsonl", "--judge-url", server.url, "--judge-model", "some-judge"]
    judged = [*alpaca, "--baseline", "theirs.json", *judge]
    ended = here(judged, world, monkeypatch, capsys)
    assert ended.status == 0, ended.err
    assert "win rate" in ended.out
    assert read_evaluation(world / "judged").model.fingerprint == facts.fingerprint
