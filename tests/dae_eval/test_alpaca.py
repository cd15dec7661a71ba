"""AlpacaEval: win rates equal to the package's, annotation by judges, and what its files look like."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import make_alpaca, make_mt_bench
from dae_eval.folders import read_evaluation
from dae_eval.judging.alpaca import AlpacaEval, AlpacaResult, Annotating, result_lines, run_alpaca_eval, shown_first
from dae_eval.judging.alpaca_scores import length_controlled, read_annotations, win_rate
from dae_eval.judging.endpoints import EndpointChoice
from dae_eval.judging.judges import JudgeChoice
from judge_server import JudgeServer, verdict_of

from kd.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "alpaca-eval" / "annotations_alpaca-7b.json"
needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="the extra dae-align[alpaca] is not installed"
)


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


def test_unreadable_verdicts_are_missing_preferences(world: Path, server: JudgeServer) -> None:
    server.behave(malformed="number 3")
    rate = run(job_of(world, server)).rate
    assert (rate.preferences, rate.dropped) == (5, 1)
    assert json.loads((world / "out" / "annotations.json").read_text())[3]["preference"] is None


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


# -- length control ----------------------------------------------------------------------------------------------------


def make_gamed(path: Path, instructions: int) -> Path:
    """A file like the package's df_gamed.csv: two gamed baselines' preferences, with made-up numbers."""
    pick = random.Random(1)
    lines = ["model,index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline"]
    for model in ("concise", "verbose"):
        for index in range(instructions):
            difficulty = random.Random(index).gauss(0, 1)
            lines.append(f"{model},{index},{difficulty},{pick.gauss(0, 1)},{pick.random()},False")
    path.write_text("\n".join(lines) + "\n")
    return path


def make_texts(path: Path, rows: int = 60) -> Path:
    pick = random.Random(2)
    annotations = []
    for index in range(rows):
        long = pick.randint(1, 60)
        preference = min(2.0, max(1.0, 1.2 + long / 100 + pick.gauss(0, 0.2)))
        annotations.append(
            {"instruction": str(index), "output_1": "x" * pick.randint(10, 50), "output_2": "y" * long, "dataset": "d",
             "generator_1": "base", "generator_2": "ours", "annotator": "someone",
             "preference": None if index == 7 else preference}
        )  # fmt: skip
    path.write_text(json.dumps(annotations))
    return path


@needs_extra
def test_the_length_controlled_rate_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gamed, texts = make_gamed(tmp_path / "gamed.csv", 60), make_texts(tmp_path / "texts.json")
    (tmp_path / ".env").write_text("FROM_A_DOT_ENV=1\n")
    monkeypatch.setattr("dotenv.main.find_dotenv", lambda *_, **__: str(tmp_path / ".env"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "alpaca_eval"]:
        monkeypatch.delitem(sys.modules, name)
    before = dict(os.environ)
    found = length_controlled(read_annotations(texts), gamed)
    assert dict(os.environ) == before

    # Its own function, which finds the file in a cache of the hub.
    from alpaca_eval import constants
    from alpaca_eval.metrics import get_length_controlled_winrate

    snapshot = tmp_path / "cache" / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "df_gamed.csv").write_bytes(gamed.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "DEFAULT_CACHE_DIR", str(tmp_path / "cache"))
    own = get_length_controlled_winrate(json.loads(texts.read_text()), save_weights_dir=None)
    assert found.win_rate == own["length_controlled_winrate"]
    assert found.standard_error == own["lc_standard_error"]
    rate = win_rate(read_annotations(texts))
    assert rate.win_rate == pytest.approx(own["win_rate"], abs=1e-9)
    assert rate.standard_error == pytest.approx(own["standard_error"], abs=1e-9)
    assert (rate.wins, rate.losses, rate.ties) == (own["n_wins"], own["n_wins_base"], own["n_draws"])
    assert found.win_rate != pytest.approx(rate.win_rate, abs=0.5), "length matters here"


@needs_extra
def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    texts = read_annotations(make_texts(tmp_path / "texts.json"))
    with pytest.raises(UserError, match=r"gamed\.csv: "):
        length_controlled(texts, make_gamed(tmp_path / "gamed.csv", 20))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other\.csv"):
        length_controlled(texts, tmp_path / "other.csv")


@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is not None, reason="the extra is installed")
def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    texts = read_annotations(make_texts(tmp_path / "texts.json"))
    with pytest.raises(UserError, match=r"pip install 'dae-align\[alpaca\]'"):
        length_controlled(texts, make_gamed(tmp_path / "gamed.csv", 60))


def test_without_texts_or_file_there_is_no_number(tmp_path: Path) -> None:
    bare = read_annotations(write_annotations(tmp_path / "a.json", [1, 2]))
    assert length_controlled(bare, None).win_rate is None
    gamed = make_gamed(tmp_path / "gamed.csv", 2)
    assert "output_1, output_2" in length_controlled(bare, gamed).missing
    with pytest.raises(UserError, match=r"--gamed-file .*nowhere\.csv: "):
        length_controlled(bare, tmp_path / "nowhere.csv")
