"""AlpacaEval: win rates equal to the package's, annotation by judges, and what its files look like."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import make_alpaca, make_mt_bench
from dae_eval.folders import read_evaluation
from dae_eval.judging.alpaca import AlpacaEval, AlpacaResult, Annotating, result_lines, run_alpaca_eval, shown_first
from dae_eval.judging.alpaca_scores import read_annotations, win_rate
from dae_eval.judging.judges import JudgeChoice
from dae_eval.judging.readings import LONGER, TRUNCATED
from judge_server import JudgeServer, verdict_of

from kd.errors import UserError
from kd.served.connection import EndpointChoice

SHARED = Path(__file__).parents[2].parent / "shared" / "alpaca-eval" / "annotations_alpaca-7b.json"


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_mt_bench(tmp_path / "world")
    return make_alpaca(tmp_path / "world")


def job_of(world: Path, server: JudgeServer, **how: Any) -> AlpacaEval:
    endpoint = EndpointChoice(server.url, "some-judge", "--judge-url", "OPENAI_API_KEY", None, 2)
    annotating = Annotating(
        JudgeChoice(endpoint), str(world / "judge_prompts.jsonl"), str(world / "theirs.json"), **how
    )
    return AlpacaEval(world / "out", outputs=str(world / "ours.json"), annotating=annotating)


def run(job: AlpacaEval) -> AlpacaResult:
    result = run_alpaca_eval(job)
    assert result is not None
    return result


def write_annotations(path: Path, preferences: list[Any], **more: Any) -> Path:
    rows = [
        {"generator_1": "base", "generator_2": "ours", "preference": p, "dataset": "d", **more} for p in preferences
    ]
    path.write_text(json.dumps(rows))
    return path


# -- win rate ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_file(), reason="../shared/alpaca-eval is not there")
def test_published_annotations_give_the_published_win_rate(tmp_path: Path) -> None:
    result = run(AlpacaEval(tmp_path / "out", annotations=str(SHARED)))
    assert result.rate.win_rate == pytest.approx(2.591450540223603, abs=1e-9)
    assert result.rate.standard_error == pytest.approx(0.4870855382635108, abs=1e-9)
    assert result.rate.preferences == 805
    task = read_evaluation(tmp_path / "out").tasks["alpaca_eval"]
    assert 100 * task.mean == pytest.approx(2.591450540223603, abs=1e-9)
    assert len({document.hash for document in task.documents}) == 805
    text = "\n".join(result_lines(result))
    assert "mean length        not in file (baseline: not in file)" in text
    assert "length-controlled  none: needs the package's df_gamed.csv (--gamed-file)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_missing_preferences_are_dropped_and_counted(tmp_path: Path) -> None:
    preferences = [1, 2.0, None, 1.5, 1.25, math.nan, 0]
    path = write_annotations(tmp_path / "a.json", preferences)
    rate = win_rate(read_annotations(path))
    shares = [0, 1, 0.5, 0.25, 0.5]  # 0 is how older files write a tie
    assert rate.win_rate == pytest.approx(100 * statistics.mean(shares))
    assert rate.standard_error == pytest.approx(100 * statistics.stdev(shares) / math.sqrt(5))
    assert (rate.preferences, rate.wins, rate.losses, rate.ties, rate.dropped) == (5, 1, 2, 2, 2)
    result = run(AlpacaEval(tmp_path / "out", annotations=str(path)))
    assert "left out: 2 without a preference" in "\n".join(result_lines(result))
    assert [d.id for d in read_evaluation(tmp_path / "out").tasks["alpaca_eval"].documents] == [0, 1, 3, 4, 6]


def test_mean_lengths_are_reported_if_all_texts_are_there(tmp_path: Path) -> None:
    path = write_annotations(tmp_path / "a.json", [1, 2], output_1="1234", output_2="12")
    assert (win_rate(read_annotations(path)).mean_length, win_rate(read_annotations(path)).baseline_mean_length) == (
        2,
        4,
    )
    rows = json.loads(path.read_text())
    del rows[0]["output_2"]
    path.write_text(json.dumps(rows))
    assert win_rate(read_annotations(path)).mean_length is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[", "a.json: not valid JSON"),
        ("[]", "a.json: .* list"),
        ('{"a": 1}', "a.json: .* list"),
        ('[{"generator_1": "a", "generator_2": "b", "preference": 3}]', "row 0: preference: 3.0"),
        ('[{"generator_1": "a", "generator_2": "b", "preference": "1"}]', "row 0: preference: "),
        ('[{"generator_1": "a", "preference": 1}]', "row 0: generator_2: "),
        ('[{"generator_1": "a", "generator_2": "b", "preference": null}]', "preference"),
        (
            '[{"generator_1": "a", "generator_2": "b", "preference": 1}, {"generator_1": "a", "generator_2": "c"}]',
            "generator_2: .* .b, c.",
        ),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=what):
        run_alpaca_eval(AlpacaEval(tmp_path / "out", annotations=str(tmp_path / "a.json")))


# -- annotation --------------------------------------------------------------------------------------------------------


def test_the_order_is_drawn_by_the_seed_and_recorded(world: Path, server: JudgeServer) -> None:
    server.behave()
    result = run(job_of(world, server))
    rows = json.loads((world / "out" / "annotations.json").read_text())
    assert {row["shown_first"] for row in rows} == {"ours", "theirs"}, "both orders occur"
    for index, row in enumerate(rows):
        first, second = ("ours", "theirs") if row["shown_first"] == "ours" else ("theirs", "ours")
        texts = {"ours": row["output_2"], "theirs": row["output_1"]}
        prompt = f"Q: Say number {index}.\nAssistant A: {texts[first]}\nAssistant B: {texts[second]}"
        assert prompt in server.prompts()
        winner = {"A": first, "B": second, "C": None}[verdict_of(prompt)]
        assert row["preference"] == {"theirs": 1.0, "ours": 2.0, None: 1.5}[winner]
        assert (row["generator_1"], row["generator_2"]) == ("theirs", "ours")
        assert (row["shown_first"] == "ours") == shown_first(0, index)
    assert result.rate.win_rate == pytest.approx(100 * statistics.mean(row["preference"] - 1 for row in rows))
    assert result.rate.mean_length == statistics.mean(len(row["output_2"]) for row in rows)
    assert [shown_first(1, index) for index in range(20)] != [shown_first(0, index) for index in range(20)]

    task = read_evaluation(world / "out").tasks["alpaca_eval"]
    assert task.settings["annotator"] == ["some-judge, pair-v2"]
    assert (task.settings["judge"], task.settings["order by seed"]) == ("some-judge", 0)
    assert [(d.prompt, d.category) for d in task.documents[:2]] == [
        ("Say number 0.", "set0"),
        ("Say number 1.", "set1"),
    ]
    assert run(job_of(world, server)) == result
    assert len(server.requests()) == 6, "nothing is asked twice"
    with pytest.raises(UserError, match="order by seed: 0 -> 1"):
        run_alpaca_eval(job_of(world, server, seed=1))


def test_unreadable_verdicts_are_missing_preferences_and_asked_again(world: Path, server: JudgeServer) -> None:
    server.behave(malformed="number 3")
    rate = run(job_of(world, server)).rate
    assert (rate.preferences, rate.dropped, rate.unrated) == (5, 1, {"without a verdict": 1})
    assert json.loads((world / "out" / "annotations.json").read_text())[3]["preference"] is None
    server.behave()
    rate = run(job_of(world, server)).rate
    assert (rate.preferences, rate.dropped, rate.unrated) == (6, 0, {})
    assert len(server.requests()) == 1


def test_what_the_judge_did_not_say_is_told_by_reason(world: Path, server: JudgeServer) -> None:
    server.behave(always={"number 1.": "empty", "number 2.": "reasoning", "number 4.": "blocked"})
    result = run(job_of(world, server))
    reasons = {"without choices in the reply": 1, TRUNCATED: 1, "stopped by a content filter": 1}
    assert (result.rate.preferences, result.rate.unrated) == (3, reasons)
    lines = result_lines(result)
    assert f"    1 {TRUNCATED}" in lines and f"  {LONGER}" in lines
    assert max(map(len, lines)) <= 80
    scores = json.loads((world / "out" / "scores.json").read_text())
    assert (scores["dropped"], scores["unrated"]) == (3, reasons)
    server.behave(fixed="<think>[[A]] or [[B]]</think> [[C]]")
    assert run(job_of(world, server)).rate.preferences == 6
    assert len(server.requests()) == 3


def test_contradicting_verdicts_are_no_preference(world: Path, server: JudgeServer) -> None:
    server.behave(fixed="[[A]] at first sight, then [[B]]")
    with pytest.raises(UserError, match="6 with several different verdicts"):
        run_alpaca_eval(job_of(world, server))


def test_a_baseline_for_other_instructions_is_refused(world: Path, server: JudgeServer) -> None:
    rows = json.loads((world / "theirs.json").read_text())
    (world / "theirs.json").write_text(json.dumps(list(reversed(rows))))
    server.behave()
    whole = run(job_of(world, server))
    assert whole.rate.preferences == 6, "joined by instruction, not by place"
    (world / "theirs.json").write_text(json.dumps(rows[:4]))
    with pytest.raises(UserError, match=r"theirs\.json: .* 2 of 6 .* row 4"):
        run_alpaca_eval(replace(job_of(world, server), output=world / "other"))


def test_two_models_outputs_in_one_file_are_refused(world: Path, server: JudgeServer) -> None:
    rows = json.loads((world / "ours.json").read_text())
    rows[0]["generator"] = "another"
    (world / "ours.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"ours\.json: .*another, ours"):
        run_alpaca_eval(job_of(world, server))


# -- pairing -----------------------------------------------------------------------------------------------------------


def annotated(path: Path, *instructions: tuple[str, str]) -> dict[tuple[int, str], float]:
    """Scores of annotations of these (data set, instruction) by the key on which reports join two models."""
    rows = [
        {
            "instruction": text,
            "dataset": dataset,
            "generator_1": "base",
            "generator_2": "ours",
            "preference": 1 + n / 10,
        }
        for n, (dataset, text) in enumerate(instructions)
    ]
    path.write_text(json.dumps(rows))
    out = path.with_suffix("")
    result = run(AlpacaEval(out, annotations=str(path)))
    (duplicates,) = [line for line in result_lines(result) if "duplicate" in line] or [""]
    assert duplicates.split()[:1] == ([str(result.duplicates)] if result.duplicates else [])
    return {(d.id, d.hash): d.score for d in read_evaluation(out).tasks["alpaca_eval"].documents}


def test_two_models_are_joined_by_instruction_and_not_by_place(tmp_path: Path) -> None:
    rows = [(f"set{n % 2}", f"Say {n}.") for n in range(6)]
    whole = annotated(tmp_path / "whole.json", *rows)
    assert len(whole) == 6
    turned = annotated(tmp_path / "turned.json", *reversed(rows))
    assert turned == {key: pytest.approx(0.5 - score) for key, score in whole.items()}
    assert set(annotated(tmp_path / "short.json", *rows[1:])) == set(list(whole)[1:])
    other = annotated(tmp_path / "other.json", ("set9", rows[0][1]))
    assert not set(other) & set(whole), "the same words in another data set"


def test_duplicates_are_told_and_joined_in_their_order(tmp_path: Path) -> None:
    rows = [("d", "again"), ("d", "once"), ("d", "again")]
    first = annotated(tmp_path / "first.json", *rows)
    second = annotated(tmp_path / "second.json", rows[1], rows[0], rows[2])
    assert set(first) == set(second)
    again = [key for key in first if first[key] != pytest.approx(0.1)]
    assert [first[key] for key in again] == pytest.approx([0, 0.2])
    assert [second[key] for key in again] == pytest.approx([0.1, 0.2])
    clusters = {document.cluster for document in read_evaluation(tmp_path / "first").tasks["alpaca_eval"].documents}
    assert len(clusters) == 2, "duplicates are resampled together"


def test_the_nth_duplicate_is_compared_with_the_baselines_nth(world: Path, server: JudgeServer) -> None:
    for name in ("ours", "theirs"):
        rows = json.loads((world / f"{name}.json").read_text())
        more = {**rows[0], "output": f"{name}, the second time"}
        (world / f"{name}.json").write_text(json.dumps([*rows, more] if name == "ours" else [more, *rows]))
    server.behave()
    assert run(job_of(world, server)).duplicates == 1
    rows = json.loads((world / "out" / "annotations.json").read_text())
    assert [rows[n]["output_1"] for n in (0, -1)] == ["theirs, the second time", "theirs says 0!!"]
