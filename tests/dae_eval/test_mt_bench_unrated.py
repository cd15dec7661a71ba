"""MT-Bench against a judge that gives no rating, several, or reasoning: what is unrated, told and asked again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_files import QUESTIONS, make_mt_bench
from dae_eval.judging.authors import Author
from dae_eval.judging.fastchat_files import read_answers, read_pair_judgments
from dae_eval.judging.mt_bench import Side, run_mt_bench
from dae_eval.judging.mt_bench_results import result_lines, smallest_margin
from dae_eval.judging.readings import LONGER, TRUNCATED
from judge_server import JudgeServer
from mt_bench_jobs import job_of, run

from kd.errors import UserError
from kd.served.connection import EndpointChoice


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_mt_bench(tmp_path / "bench")


@pytest.mark.parametrize(
    ("step", "problem", "tries"),
    [
        ("empty", "without choices", 3),
        ("null", "without content", 3),
        ("blocked", "stopped by a content filter", 3),
        ("truncated", TRUNCATED, 1),
        ("reasoning", TRUNCATED, 1),
    ],
)
def test_a_reply_that_does_not_come_is_unrated_with_its_reason(
    world: Path, server: JudgeServer, step: str, problem: str, tries: int
) -> None:
    server.behave(always={"A2: ours 3 two": step})
    with pytest.raises(UserError, match=rf"1 of 8 turns are unrated \(1 {problem}.*: 3 turn 2;") as refusal:
        run_mt_bench(job_of(world, server))
    assert len(server.requests()) == 7 + tries, "the others are asked all the same"
    assert (LONGER in str(refusal.value)) == (problem == TRUNCATED)
    server.behave()
    assert run(job_of(world, server)).repeats[0].judgments == 8
    assert [one["body"]["messages"][-1]["content"].endswith("ours 3 two") for one in server.requests()] == [True]


def test_compatible_counts_what_was_rated_and_tells_the_rest(world: Path, server: JudgeServer) -> None:
    server.behave(always={"A2: ours 3 two": "reasoning", "ours 1 one": "empty"})
    result = run(job_of(world, server, strict=False))
    assert [line[:8] for line in result.repeats[0].dropped] == ["2 withou", "1 trunca"]
    assert f"  {LONGER}" in result_lines(result)
    assert (result.repeats[0].judgments, result.repeats[0].notes) == (5, ())
    server.behave(always={"A2: ours 3 two": "truncated"})
    result = run(job_of(world, server, strict=False))
    (note,) = result.repeats[0].notes
    assert note.startswith(f"1 {TRUNCATED}") and note.endswith(": 3 turn 2")
    assert f"  {LONGER}" in result_lines(result)
    assert (result.repeats[0].judgments, result.repeats[0].dropped) == (8, ())


def test_a_reasoning_judge_is_read_after_its_reasoning(world: Path, server: JudgeServer) -> None:
    server.behave(fixed="<think>[[3]]</think>[[8]]")
    assert run(job_of(world, server)).totals == (8,)
    server.behave(fixed="<think>[[A]]? no</think> [[B]]")
    run(job_of(world, server, "pairs", against=Side(None, world / "theirs.jsonl")))
    judgments = read_pair_judgments(world / "pairs" / "judgments-1.jsonl")
    assert {(j.g1_winner, j.g2_winner) for j in judgments} == {("model_2", "model_1")}, "B in all 16 games"


@pytest.mark.parametrize("mode", ["single", "pairwise"])
def test_several_ratings_are_refused_strictly_and_told_otherwise(world: Path, server: JudgeServer, mode: str) -> None:
    against = None if mode == "single" else Side(None, world / "theirs.jsonl")
    server.behave(fixed="e.g. [[5]] ... [[8]]" if mode == "single" else "[[B]], or rather [[A]]")
    with pytest.raises(UserError, match=r"8 of 8 turns are unrated \(8 with several different "):
        run_mt_bench(job_of(world, server, against=against))
    result = run(job_of(world, server, against=against, strict=False))
    (note,) = result.repeats[0].notes
    assert note.startswith(f"{8 if mode == 'single' else 16} with several different ")
    assert any(line.startswith("  note: ") for line in result_lines(result))
    assert result.totals == (5 if mode == "single" else 0.5,)
    first = "[[5]]" if mode == "single" else "[[A]]"
    assert first in (world / "out" / "judgments-1.jsonl").read_text()


def test_the_margin_is_told_before_the_judge_is_asked(
    world: Path, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.behave()
    with caplog.at_level("INFO", logger="dae"):
        assert run_mt_bench(job_of(world, server, only_estimate=True)) is None
    (line,) = [record.getMessage() for record in caplog.records if "calls" in record.getMessage()]
    assert smallest_margin(4, "single") in line


def test_an_author_that_gives_no_answer_is_told_and_asked_again(
    world: Path, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    served = EndpointChoice(server.url, "served", "--model-url", "MODEL_API_KEY", None, 1)
    author = Author("served", served, max_new_tokens=7)
    server.behave(script=["empty"] * 3)
    run(job_of(world, server, side=Side(author)))
    assert read_answers(world / "out" / "answers.jsonl").turns[1][0] == ""
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "served" in warning and "1/1" in warning
    server.behave()
    run(job_of(world, server, side=Side(author)))
    asked = [one["body"] for one in server.requests() if one["body"]["model"] == "served"]
    assert [body["messages"][0]["content"] for body in asked] == [QUESTIONS[0][2][0]] * 2, "both turns of question 1"
    assert read_answers(world / "out" / "answers.jsonl").turns[1][0] != ""
