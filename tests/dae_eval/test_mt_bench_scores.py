"""MT-Bench: FastChat's files, and scores equal to those that it publishes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from benchmark_files import answer_row, write_lines
from dae_eval.folders import read_evaluation
from dae_eval.judging.fastchat_files import (
    NO_RATING,
    Judgment,
    PairJudgment,
    Question,
    answer_lines,
    judgment_lines,
    local_file,
    read_answers,
    read_judge_prompts,
    read_judgments,
    read_pair_judgments,
    read_questions,
)
from dae_eval.judging.mt_bench import FinishedJudgments, score_judgments
from dae_eval.judging.mt_bench_prompts import Mode
from dae_eval.judging.mt_bench_results import exchanged, pair_judgments_of, result_lines, smallest_margin
from dae_eval.judging.mt_bench_scores import (
    PairScores,
    Scores,
    compatible,
    notes_on,
    pair_scores_of,
    scores_of,
    strict,
)

from kd.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "mt-bench"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/mt-bench not found")


# -- scores ------------------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("strictly", [True, False])
def test_published_judgments_give_the_published_scores(tmp_path: Path, strictly: bool) -> None:
    job = FinishedJudgments(
        files=(str(SHARED / "model_judgment" / "gpt-4_single.jsonl"),),
        questions=str(SHARED / "question.jsonl"),
        output=tmp_path / "out",
        model_id="vicuna-7b-v1.3",
        strict=strictly,
    )
    result = score_judgments(job)
    (scores,) = result.repeats
    assert isinstance(scores, Scores)
    assert f"{scores.turns[1]:.6f} {scores.turns[2]:.6f} {scores.average:.6f}" == "6.731250 5.475000 6.103125"
    assert len(scores.categories) == 8
    task = read_evaluation(tmp_path / "out").tasks["mt_bench"]
    assert len(task.documents) == 160
    assert 10 * task.mean == pytest.approx(6.103125, abs=1e-12)
    assert "6.103125" in "\n".join(result_lines(result))


def single(question_id: int, turn: int, score: float, model: str = "m", judge: str = "gpt") -> Judgment:
    return Judgment(question_id, model, (judge, "single-v1"), "", "", score, turn, 0.0)


MESSY = [
    single(1, 1, 7.5), single(1, 2, 3), single(2, 1, 9), single(2, 1, 4), single(2, 2, NO_RATING), single(3, 1, 10),
    single(3, 2, 1), single(1, 2, NO_RATING), single(3, 2, 6),
]  # fmt: skip
THREE = [Question(number, "writing" if number < 3 else "stem", ("a", "b")) for number in (1, 2, 3)]


def show_result(path: Path) -> tuple[dict[int, float], float]:
    """What FastChat's script says of a file, from its description: drop -1, group, mean; nothing de-duplicated."""
    table = pd.read_json(path, lines=True)
    table = table[table["score"] != -1]
    return table.groupby("turn")["score"].mean().to_dict(), float(table["score"].mean())


def test_compatible_scores_are_fastchats_on_messy_judgments(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    path.write_text(judgment_lines(MESSY))
    kept, dropped = compatible(read_judgments(path))
    scores = scores_of(kept, {1: "writing", 2: "writing", 3: "stem"}, dropped)
    turns, average = show_result(path)
    assert (scores.turns, scores.average) == (pytest.approx(turns), pytest.approx(average))
    assert average != pytest.approx(sum(turns.values()) / 2), "pooled, not the mean of turn means"
    assert [line.partition(": ")[2] for line in dropped] == ["2 turn 2, 1 turn 2"]
    assert scores.categories == {"writing": pytest.approx((7.5 + 3 + 9 + 4) / 4), "stem": pytest.approx(17 / 3)}


def test_strict_scores_need_every_turn_and_list_what_they_leave_out() -> None:
    with pytest.raises(UserError, match=r"here: 1 of 6 .*: 2 turn 2;"):
        strict(MESSY, THREE, "here")
    whole = [*MESSY, single(2, 2, 5), single(99, 1, 5), single(1, 1, 11)]
    kept, dropped = strict(whole, THREE, "here")
    assert [(j.question_id, j.turn, j.score) for j in kept] == [
        (1, 1, 7.5), (1, 2, 3), (2, 1, 4), (2, 2, 5), (3, 1, 10), (3, 2, 6)
    ]  # fmt: skip
    lines = [(line[0], line.partition(": ")[2]) for line in dropped]
    assert lines == [
        ("2", "2 turn 2, 1 turn 2"), ("1", "1 turn 1"), ("2", "2 turn 1, 3 turn 2"), ("1", "99 turn 1")
    ]  # fmt: skip
    assert "off the scale" in dropped[1]
    with pytest.raises(UserError, match="gpt, other"):
        strict([*whole, single(1, 1, 5, judge="other")], THREE, "here")


def test_nothing_rated_is_an_error_not_a_division_by_zero() -> None:
    with pytest.raises(UserError, match="rating"):
        scores_of(*compatible([single(1, 1, NO_RATING)])[:1], {}, ())
    with pytest.raises(UserError, match="verdict"):
        pair_scores_of([], {}, ())


@pytest.mark.parametrize("score", [11, 0])
def test_ratings_off_the_scale_are_told(tmp_path: Path, score: float) -> None:
    judgments = [single(n, turn, 5) for n in (1, 2, 3) for turn in (1, 2)]
    judgments[3] = single(2, 2, score)
    path = tmp_path / "judgments.jsonl"
    path.write_text(judgment_lines(judgments))
    kept, dropped = compatible(judgments)
    scores = scores_of(kept, {}, dropped)
    assert (scores.average, dropped) == (pytest.approx(show_result(path)[1]), ())
    (note,) = scores.notes
    assert note.startswith("1 rated off the scale of 1 to 10") and note.endswith(": 2 turn 2")
    with pytest.raises(UserError, match=r"1 of 6 .*1 rated off the scale.*: 2 turn 2;"):
        strict(judgments, THREE, "here")


def test_several_ratings_in_a_finished_judgment_are_told() -> None:
    texts = ["<think>[[3]]</think> [[8]]", "e.g. [[5]], so [[8]]", "[[8]] ... [[8]]"]
    judgments = [replace(single(number, 1, 8), judgment=text) for number, text in enumerate(texts)]
    (note,) = notes_on(judgments)
    assert note.startswith("1 with several different ratings") and note.endswith(": 1 turn 1")
    (note,) = notes_on([replace(pair(4, "tie", "tie"), g2_judgment="[[A]] or [[B]]")])
    assert note.startswith("1 with several different verdicts") and note.endswith(": 4 turn 1")


@pytest.mark.parametrize("strictly", [True, False])
def test_advice_for_finished_judgments_with_gaps_can_be_followed(tmp_path: Path, strictly: bool) -> None:
    path = tmp_path / "judgments.jsonl"
    path.write_text(judgment_lines([single(1, 1, 8), single(1, 2, NO_RATING), single(2, 1, 6)]))
    rows = [{"question_id": n, "category": "stem", "turns": ["a", "b"]} for n in (1, 2)]
    questions = write_lines(tmp_path / "question.jsonl", rows)
    job = FinishedJudgments((str(path),), str(questions), tmp_path / "out", strict=strictly)
    if strictly:
        with pytest.raises(UserError, match=r"2 of 4 .*1 without a rating, 1 not in the file.*--compatible") as refusal:
            score_judgments(job)
        assert "same command" not in str(refusal.value), "no judge can be asked again"
        return
    result = score_judgments(job)
    assert result.totals == (7,)
    task = read_evaluation(tmp_path / "out").tasks["mt_bench"]
    assert (len(task.documents), task.total, task.unit) == (2, 4, "rating")


def pair(question_id: int, first: str, second: str, turn: int = 1) -> PairJudgment:
    return PairJudgment(question_id, "m", "n", first, second, ("gpt", "pair-v2"), *[""] * 4, turn, 0.0)


def test_a_win_needs_both_orders() -> None:
    pairs = [
        pair(1, "model_1", "model_1"), pair(2, "model_1", "model_2"), pair(3, "model_2", "model_2"),
        pair(4, "tie", "tie"), pair(5, "model_1", "tie"), pair(6, "error", "model_1"), pair(7, "model_1", "model_1"),
    ]  # fmt: skip
    kept, dropped = compatible(pairs)
    scores = pair_scores_of(kept, {1: "stem"}, dropped)
    assert (scores.wins, scores.losses, scores.ties, scores.judgments) == (2, 1, 3, 6)
    assert scores.win_rate == pytest.approx(2 / 6)
    assert scores.loss_rate == pytest.approx(1 / 6)
    assert scores.win_rate_adjusted == pytest.approx(3.5 / 6)
    assert [line.partition(": ")[2] for line in dropped] == ["6 turn 1"]
    with pytest.raises(UserError, match="6 turn 1"):
        strict(pairs, [Question(number, "stem", ("a",)) for number in range(1, 8)], "here")


@pytest.mark.parametrize(("model_id", "ours", "theirs", "counts"), [
    ("m", "m", "n", (2, 1, 1)), ("n", "n", "m", (1, 2, 1)), (None, "m", "n", (2, 1, 1)),
])  # fmt: skip
def test_either_model_of_a_pairwise_file_can_be_scored(
    tmp_path: Path, model_id: str | None, ours: str, theirs: str, counts: tuple[int, int, int]
) -> None:
    winners = [("model_1", "model_1"), ("model_1", "model_1"), ("model_2", "model_2"), ("model_1", "tie")]
    path, turns = tmp_path / "pairs.jsonl", [(1, 1), (1, 2), (2, 1), (2, 2)]
    pairs = [pair(n, *won, turn=turn) for won, (n, turn) in zip(winners, turns, strict=True)]
    path.write_text(judgment_lines(pairs))
    rows = [{"question_id": n, "category": "stem", "turns": ["a", "b"]} for n in (1, 2)]
    questions = write_lines(tmp_path / "question.jsonl", rows)
    result = score_judgments(FinishedJudgments((str(path),), str(questions), tmp_path / "out", "pairwise", model_id))
    (scores,) = result.repeats
    assert isinstance(scores, PairScores)
    assert (scores.wins, scores.losses, scores.ties) == counts
    evaluation = read_evaluation(tmp_path / "out")
    task = evaluation.tasks["mt_bench_pairwise"]
    assert (evaluation.model.path, task.metric) == (ours, f"win rate against {theirs}")
    assert (task.unit, task.total) == ("points", 4)
    with pytest.raises(UserError, match=r"no judgments of x; models in the file: m, n"):
        pair_judgments_of(path, "x")


def test_a_pair_seen_from_the_other_side_has_its_games_exchanged() -> None:
    one = replace(
        pair(1, "model_1", "tie"), g1_judgment="one", g2_judgment="two", g1_user_prompt="p", g2_user_prompt="q"
    )
    other = exchanged(one)
    assert (other.model_1, other.g1_winner, other.g1_judgment, other.g1_user_prompt) == ("n", "tie", "two", "q")
    assert (other.model_2, other.g2_winner, other.g2_judgment, other.g2_user_prompt) == ("m", "model_2", "one", "p")
    assert exchanged(other) == one


@pytest.mark.parametrize(
    ("questions", "mode", "number"),
    # 1.96 x 2 / sqrt(80) = 0.44 ratings, 196 x 0.5 / sqrt(80) = 11 points.
    [(80, "single", "about 0.4 "), (4, "single", "about 2.0 "), (80, "pairwise", "about 11 points")],
)
def test_the_margin_that_so_many_questions_decide(questions: int, mode: Mode, number: str) -> None:
    assert number in smallest_margin(questions, mode)


# -- files -------------------------------------------------------------------------------------------------------------


@needs_shared
def test_fastchats_own_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    assert len(read_questions(SHARED / "question.jsonl")) == 80
    assert {"single-v1", "pair-math-v1-multi-turn"} <= set(read_judge_prompts(SHARED / "judge_prompts.jsonl"))
    file = SHARED / "model_judgment" / "gpt-4_single.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    written = [json.loads(line) for line in judgment_lines(read_judgments(file)).splitlines()]
    assert written == rows
    assert [list(row) for row in written] == [list(row) for row in rows]
    reference = SHARED / "reference_answer" / "gpt-4.jsonl"
    answers = read_answers(reference)
    again = [json.loads(line) for line in answer_lines(answers, dict.fromkeys(answers.turns, 0.0)).splitlines()]
    for row, one in zip(map(json.loads, reference.read_text().splitlines()), again, strict=True):
        assert list(one) == list(row)
        assert {k: one[k] for k in ("question_id", "model_id", "choices")} == {
            k: row[k] for k in ("question_id", "model_id", "choices")
        }


def test_pair_judgments_survive_the_file(tmp_path: Path) -> None:
    pairs = [pair(1, "model_1", "tie"), replace(pair(2, "error", "model_2", 2), g2_judgment="né\u2028\n[[B]]")]
    path = tmp_path / "pairs.jsonl"
    path.write_text(judgment_lines(pairs))
    assert read_pair_judgments(path) == pairs


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"question_id": "1", "category": "x", "turns": ["a"]}, "question_id: "),
        ({"question_id": 1, "category": "x", "turns": ["a", "b", "c"]}, "turns: "),
        ({"question_id": 1, "turns": ["a"]}, "category: "),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, row: Any, key: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": 7, "category": "x", "turns": ["a"]}, row])
    with pytest.raises(UserError, match=f"q.jsonl:2: {key}"):
        read_questions(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    question = {"question_id": 7, "category": "x", "turns": ["a"]}
    with pytest.raises(UserError, match=r"a\.jsonl: question_id: .* 7;"):
        read_questions(write_lines(tmp_path / "a.jsonl", [question, question]))
    for reader in (read_questions, read_judge_prompts, read_answers, read_judgments, read_pair_judgments):
        with pytest.raises(UserError, match=r"empty\.jsonl: "):
            reader(write_lines(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match=r"b\.jsonl: .* a, b;"):
        read_answers(write_lines(tmp_path / "b.jsonl", [answer_row(1, "a", "x"), answer_row(2, "b", "x")]))
    with pytest.raises(UserError, match=r"choices\[0\]\.turns"):
        read_answers(write_lines(tmp_path / "c.jsonl", [answer_row(1, "a")]))
    for source in (str(tmp_path / "nowhere.jsonl"), "hub:owner/name", "hub:no-such-owner/no-such-name/question.jsonl"):
        with pytest.raises(UserError, match=f"^--questions {source}: "):
            local_file(source, "--questions")
