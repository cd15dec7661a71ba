"""MT-Bench runs against a real judge server: what is asked, what is kept, what a report reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import QUESTIONS, make_chat_checkpoint, make_mt_bench, write_lines
from dae_eval.folders import read_evaluation
from dae_eval.judging.authors import Author
from dae_eval.judging.endpoints import NO_SYSTEM
from dae_eval.judging.fastchat_files import (
    NO_RATING,
    Judgment,
    judgment_lines,
    read_answers,
    read_judgments,
    read_pair_judgments,
)
from dae_eval.judging.judges import JudgeChoice
from dae_eval.judging.mt_bench import FinishedJudgments, MtBench, Side, run_mt_bench, score_judgments
from dae_eval.judging.mt_bench_results import result_lines
from dae_eval.judging.mt_bench_scores import PairScores, Scores
from judge_server import JudgeServer, rating_of, verdict_of
from mt_bench_jobs import job_of, run

from kd.errors import UserError
from kd.runs.files import file_sha256
from kd.served.connection import EndpointChoice


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_mt_bench(tmp_path / "bench")


# -- single mode -------------------------------------------------------------------------------------------------------


def test_single_mode_judges_each_turn_by_its_prompt(world: Path, server: JudgeServer) -> None:
    server.behave()
    result = run(job_of(world, server))
    bodies = {one["body"]["messages"][-1]["content"]: one["body"] for one in server.requests()}
    assert len(bodies) == 8
    assert {body["temperature"] for body in bodies.values()} == {0}
    assert {body["max_tokens"] for body in bodies.values()} == {2048}
    math = "Rate it.\nQ: How much are two and two cups?\nRight: four cups\nA: ours 2 one"
    assert bodies[math]["messages"][0] == {"role": "system", "content": "Be a judge."}
    second = "Q1: Why is the kettle blue?\nA1: ours 3 one\nQ2: How big is it?\nA2: ours 3 two"
    assert bodies[second]["messages"][0] == {"role": "system", "content": "Be a judge. Rate the second."}

    (scores,) = result.repeats
    judgments = read_judgments(world / "out" / "judgments-1.jsonl")
    assert [(j.question_id, j.turn) for j in judgments] == [(n, t) for n, *_ in QUESTIONS for t in (1, 2)]
    assert all(j.score == rating_of(j.user_prompt) and j.model == "ours" for j in judgments)
    assert judgments[2].judge == ("some-judge", "single-math-v1")
    assert isinstance(scores, Scores)
    assert scores.average == pytest.approx(sum(j.score for j in judgments) / 8)


def test_the_evaluation_is_what_reports_read(world: Path, server: JudgeServer) -> None:
    server.behave()
    run(job_of(world, server, kind="domain", references_kind="corrected"))
    evaluation = read_evaluation(world / "out")
    task = evaluation.tasks["mt_bench"]
    assert (task.group, task.kind, task.metric) == ("mt-bench", "domain", "rating / 10")
    assert (task.unit, task.total) == ("rating", 8)
    assert [document.id for document in task.documents] == [11, 12, 21, 22, 31, 32, 41, 42]
    fourth = task.documents[3]
    assert (fourth.prompt, fourth.target) == ("How much are two and two cups?\n\nAnd twice that?", "eight cups")
    assert (fourth.answer, fourth.cluster, fourth.category) == ("ours 2 two", "2", "math")
    ratings = {(j.question_id, j.turn): j.score for j in read_judgments(world / "out" / "judgments-1.jsonl")}
    assert [10 * d.score for d in task.documents] == pytest.approx(
        [ratings[d.id // 10, d.id % 10] for d in task.documents]
    )
    assert evaluation.model.fingerprint == file_sha256(world / "ours.jsonl")
    assert task.settings["judge"] == "some-judge"
    assert task.settings["references"] == "corrected"
    assert task.settings["references' file"] == file_sha256(world / "reference.jsonl")
    assert task.settings["judge prompts"] == file_sha256(world / "judge_prompts.jsonl")
    assert (task.settings["repeats"], task.settings["mode"], task.settings["counted"]) == (1, "single", "strict")
    assert server.url not in (world / "out" / "evaluation.json").read_text()


def test_two_models_are_judged_under_equal_settings(world: Path, server: JudgeServer) -> None:
    server.behave()
    run(job_of(world, server))
    run(job_of(world, server, "out2", side=Side(None, world / "theirs.jsonl")))
    ours, theirs = (read_evaluation(world / name).tasks["mt_bench"] for name in ("out", "out2"))
    assert ours.settings == theirs.settings
    assert [(d.id, d.hash, d.prompt) for d in ours.documents] == [(d.id, d.hash, d.prompt) for d in theirs.documents]
    assert ours.mean != theirs.mean


def test_the_same_command_asks_nothing_again(world: Path, server: JudgeServer) -> None:
    server.behave()
    first = run(job_of(world, server))
    before = {path.name: path.read_bytes() for path in (world / "out").iterdir() if path.is_file()}
    assert run(job_of(world, server)) == first
    assert {path.name: path.read_bytes() for path in (world / "out").iterdir() if path.is_file()} == before
    assert len(server.requests()) == 8


def test_repeats_are_reported_with_their_spread_and_can_be_added(world: Path, server: JudgeServer) -> None:
    server.behave(fixed="[[8]]")
    run(job_of(world, server))
    server.behave(fixed="[[6]]")
    result = run(job_of(world, server, repeat=2))
    assert len(server.requests()) == 8, "the first judging is there already"
    assert result.totals == (8, 6)
    written = json.loads((world / "out" / "scores.json").read_text())
    assert written["total"] == 7
    assert written["spread"] == {"lowest": 6, "highest": 8, "standard deviation": pytest.approx(2**0.5)}
    assert "over 2 judgings: mean 7.0000, from 6.0000 to 8.0000" in "\n".join(result_lines(result))
    assert [d.score for d in read_evaluation(world / "out").tasks["mt_bench"].documents] == pytest.approx([0.7] * 8)
    assert max(len(line) for line in result_lines(result)) <= 100


def test_malformed_ratings_stop_strict_mode_and_are_asked_for_again(world: Path, server: JudgeServer) -> None:
    server.behave(malformed="kettle blue")
    with pytest.raises(UserError, match=r"2 of 8 .*: 3 turn 1, 3 turn 2; .*--compatible"):
        run_mt_bench(job_of(world, server))
    result = run(job_of(world, server, strict=False))
    (scores,) = result.repeats
    assert [line.partition(": ")[2] for line in scores.dropped] == ["3 turn 1, 3 turn 2"]
    assert len(server.requests()) == 10, "each run asks again"
    assert len(read_evaluation(world / "out").tasks["mt_bench"].documents) == 6
    assert [j.score for j in read_judgments(world / "out" / "judgments-1.jsonl")].count(NO_RATING) == 2
    server.behave()
    assert run(job_of(world, server)).repeats[0].judgments == 8
    assert len(server.requests()) == 2


def test_other_settings_are_refused_with_what_differs(world: Path, server: JudgeServer) -> None:
    server.behave()
    run(job_of(world, server))
    with pytest.raises(UserError, match='references: "original" -> "corrected"'):
        run_mt_bench(job_of(world, server, references_kind="corrected"))
    with pytest.raises(UserError, match="answers: "):
        run_mt_bench(job_of(world, server, side=Side(None, world / "theirs.jsonl")))


def without_line(name: str, which: int) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        lines = (world / name).read_text().splitlines(keepends=True)
        (world / name).write_text("".join(lines[:which] + lines[which + 1 :]))

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without_line("ours.jsonl", 1), r"ours\.jsonl: .*1 of 4 questions \(2\)"),
        (without_line("reference.jsonl", 0), r"reference\.jsonl: "),
        (without_line("judge_prompts.jsonl", 3), r"judge_prompts\.jsonl: .*single-math-v1-multi-turn"),
    ],
)
def test_files_that_do_not_fit_together(
    world: Path, server: JudgeServer, change: Callable[[Path], None], what: str
) -> None:
    server.behave()
    change(world)
    with pytest.raises(UserError, match=what):
        run_mt_bench(job_of(world, server))
    assert server.requests() == []


def test_references_are_required_where_a_category_needs_them(world: Path, server: JudgeServer) -> None:
    with pytest.raises(UserError, match=r"^--references: .*\(2\)"):
        run_mt_bench(job_of(world, server, references=None))
    kept = [
        row for row in map(json.loads, (world / "question.jsonl").read_text().splitlines()) if row["question_id"] != 2
    ]
    write_lines(world / "question.jsonl", kept)
    server.behave()
    run(job_of(world, server, references=None))
    assert read_evaluation(world / "out").tasks["mt_bench"].settings["references"] is None


def test_reported_wrong_references_are_noted(world: Path, server: JudgeServer) -> None:
    for name in ("question", "reference", "ours"):
        path = world / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"question_id": 2', '"question_id": 104'))
    server.behave()
    run(job_of(world, server))
    assert "reported to be wrong: [104]" in str(read_evaluation(world / "out").conditions["notes"])
    run(job_of(world, server, "out2", references_kind="corrected"))
    assert read_evaluation(world / "out2").conditions["notes"] == []


def test_a_judges_dialect_is_noted_also_after_a_stop(world: Path, server: JudgeServer) -> None:
    server.behave(system=False)
    run(job_of(world, server))
    note = f"some-judge: {NO_SYSTEM}"
    assert read_evaluation(world / "out").conditions["notes"] == [note]
    run(job_of(world, server))
    assert read_evaluation(world / "out").conditions["notes"] == [note]


# -- pairwise mode -----------------------------------------------------------------------------------------------------


def test_pairwise_mode_asks_in_both_orders(world: Path, server: JudgeServer) -> None:
    server.behave()
    result = run(job_of(world, server, against=Side(None, world / "theirs.jsonl")))
    assert len(set(server.prompts())) == 16
    judgments = read_pair_judgments(world / "out" / "judgments-1.jsonl")
    names = {"A": ("model_1", "model_2"), "B": ("model_2", "model_1"), "C": ("tie", "tie")}
    for judgment in judgments:
        assert judgment.g1_winner == names[verdict_of(judgment.g1_user_prompt)][0]
        assert judgment.g2_winner == names[verdict_of(judgment.g2_user_prompt)][1]
    first = judgments[0]
    assert "Assistant A: ours 1 one\nAssistant B: theirs 1 one" in first.g1_user_prompt
    assert "Assistant A: theirs 1 one\nAssistant B: ours 1 one" in first.g2_user_prompt
    assert (first.model_1, first.model_2, judgments[2].judge[1]) == ("ours", "theirs", "pair-math-v1")
    (scores,) = result.repeats
    assert isinstance(scores, PairScores)
    same = [j for j in judgments if j.g1_winner == j.g2_winner != "tie"]
    assert scores.wins + scores.losses == len(same)
    assert scores.wins == sum(j.g1_winner == "model_1" for j in same)
    task = read_evaluation(world / "out").tasks["mt_bench_pairwise"]
    assert task.mean == pytest.approx(scores.win_rate_adjusted)
    assert task.settings["mode"] == "pairwise"


def test_finished_pairwise_judgments_are_scored_without_a_judge(world: Path, server: JudgeServer) -> None:
    server.behave()
    judged = run(job_of(world, server, against=Side(None, world / "theirs.jsonl")))
    job = FinishedJudgments(
        (str(world / "out" / "judgments-1.jsonl"),), str(world / "question.jsonl"), world / "again", "pairwise"
    )
    assert score_judgments(job).repeats == judged.repeats
    assert len(server.requests()) == 16


def test_judgments_of_several_models_need_a_name(world: Path) -> None:
    rows = [
        Judgment(number, model, ("gpt", "single-v1"), "", "", 5, turn, 0.0)
        for model in ("a", "b")
        for number in (1, 2, 3, 4)
        for turn in (1, 2)
    ]
    (world / "judgments.jsonl").write_text(judgment_lines(rows))
    job = FinishedJudgments((str(world / "judgments.jsonl"),), str(world / "question.jsonl"), world / "out")
    with pytest.raises(UserError, match=r"judgments\.jsonl: .*--model-id; .*a, b"):
        score_judgments(job)
    with pytest.raises(UserError, match=r"judgments\.jsonl: no judgments of c; .*a, b"):
        score_judgments(replace(job, model_id="c"))
    assert score_judgments(replace(job, model_id="b", side=Side(None, world / "ours.jsonl"))).totals == (5,)
    document = read_evaluation(world / "out").tasks["mt_bench"].documents[0]
    assert (document.answer, document.score) == ("ours 1 one", 0.5)


# -- answers of a checkpoint -------------------------------------------------------------------------------------------


def test_a_checkpoint_answers_both_turns_and_a_stop_changes_nothing(
    world: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dae_eval.judging.asking import ReplyLog

    checkpoint = make_chat_checkpoint(world / "student")
    author = Author(str(checkpoint), max_new_tokens=8, batch_size=2)
    server.behave()
    run(job_of(world, server, "whole", side=Side(author)))
    whole = read_answers(world / "whole" / "answers.jsonl")
    assert whole.model_id == "student"
    assert {len(turns) for turns in whole.turns.values()} == {2}

    add = ReplyLog.add
    count = 0

    def stopping(log: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        add(log, *arguments)

    monkeypatch.setattr(ReplyLog, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_mt_bench(job_of(world, server, "stopped", side=Side(author)))
    monkeypatch.setattr(ReplyLog, "add", add)
    run(job_of(world, server, "stopped", side=Side(author)))
    assert read_answers(world / "stopped" / "answers.jsonl") == whole
    stopped, undisturbed = (read_evaluation(world / name) for name in ("stopped", "whole"))
    assert stopped.tasks == undisturbed.tasks
    assert stopped.model == undisturbed.model
    with pytest.raises(UserError, match="max new tokens: 8 -> 9"):
        run_mt_bench(job_of(world, server, "whole", side=Side(replace(author, max_new_tokens=9))))


def test_the_second_turn_follows_the_models_own_first(world: Path, server: JudgeServer) -> None:
    server.behave()
    served = EndpointChoice(server.url, "served", "--model-url", "MODEL_API_KEY", None, 1)
    run(job_of(world, server, side=Side(Author("served", served, max_new_tokens=7))))
    asked = [one["body"] for one in server.requests() if one["body"]["model"] == "served"]
    assert len(asked) == 8
    second = next(body for body in asked if body["messages"][-1]["content"] == "Now with nine coins.")
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == f"A fair answer. Rating: [[{rating_of(QUESTIONS[0][2][0])}]]"
    wanted = {"writing": 0.7, "math": 0.0, "stem": 0.1, "extraction": 0.0}
    for _, category, turns in QUESTIONS:
        found = {body["temperature"] for body in asked if body["messages"][-1]["content"] in turns}
        assert found == {wanted[category]}
    assert {body["max_tokens"] for body in asked} == {7}
    assert read_answers(world / "out" / "answers.jsonl").model_id == "served"


def test_a_local_judge_needs_no_endpoint(world: Path) -> None:
    checkpoint = make_chat_checkpoint(world / "judge", max_position_embeddings=512)
    job = MtBench(
        side=Side(None, world / "ours.jsonl"),
        judge=JudgeChoice(None, str(checkpoint), max_tokens=6),
        questions=str(world / "question.jsonl"),
        judge_prompts=str(world / "judge_prompts.jsonl"),
        references=str(world / "reference.jsonl"),
        output=world / "out",
        strict=False,
    )
    with pytest.raises(UserError, match="rating"):
        run_mt_bench(job)
    replies = [json.loads(line) for line in (world / "out" / "replies" / "judgments.jsonl").read_text().splitlines()]
    assert len(replies) == 8
    shutil.rmtree(world / "judge")
    with pytest.raises(UserError, match=f"{world / 'judge'}: "):
        run_mt_bench(job)
