"""AlpacaEval: the length-controlled win rate is the package's, whatever the order of the rows."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dae_eval.judging import alpaca_scores
from dae_eval.judging.alpaca import AlpacaEval, run_alpaca_eval
from dae_eval.judging.alpaca_scores import length_controlled, numbered, read_annotations, win_rate

from kd.errors import UserError

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="the extra dae-align[alpaca] is not installed"
)


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


def in_their_order(texts: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take the instructions of a file for AlpacaEval's own, in their order."""
    order = [row["instruction"] for row in json.loads(texts.read_text())]
    monkeypatch.setattr(alpaca_scores, "PUBLISHED_ORDER", hashlib.sha256(json.dumps(order).encode()).hexdigest())
    return order


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
    in_their_order(texts, monkeypatch)
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
def test_the_length_controlled_rate_does_not_depend_on_the_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gamed, texts = make_gamed(tmp_path / "gamed.csv", 60), make_texts(tmp_path / "texts.json")
    order, rows = in_their_order(texts, monkeypatch), json.loads(texts.read_text())
    expected = length_controlled(read_annotations(texts), gamed)
    assert expected.win_rate is not None
    assert length_controlled(read_annotations(texts), gamed, order) == expected
    random.Random(3).shuffle(rows)
    texts.write_text(json.dumps(rows))
    assert length_controlled(read_annotations(texts), gamed, order) == expected
    instructions = tmp_path / "instructions.json"
    instructions.write_text(json.dumps([{"instruction": text} for text in order]))
    job = AlpacaEval(tmp_path / "out", annotations=str(texts), instructions=str(instructions), gamed_file=gamed)
    result = run_alpaca_eval(job)
    assert result is not None
    assert result.length_controlled == expected


@needs_extra
def test_without_its_first_row_a_file_keeps_its_numbers(tmp_path: Path) -> None:
    gamed, texts = make_gamed(tmp_path / "gamed.csv", 60), make_texts(tmp_path / "texts.json")
    annotations = read_annotations(texts)
    order = [annotation.instruction or "" for annotation in annotations]
    short = length_controlled(annotations[1:], gamed, order)
    assert short.win_rate is not None
    assert length_controlled(annotations[:0:-1], gamed, order) == short
    by_place = [replace(one, instruction=order[place]) for place, one in enumerate(annotations[1:])]
    assert length_controlled(by_place, gamed, order) != short, "all numbers would be one too small"


def test_rows_in_another_order_have_no_length_controlled_rate_without_instructions(tmp_path: Path) -> None:
    texts = read_annotations(make_texts(tmp_path / "texts.json"))
    found = length_controlled(texts, make_gamed(tmp_path / "gamed.csv", 60))
    assert found.win_rate is None and "--instructions" in found.missing


def test_numbers_are_those_of_the_instructions(tmp_path: Path) -> None:
    annotations = read_annotations(make_texts(tmp_path / "texts.json", 4))
    order = [str(number) for number in range(4)]
    assert numbered(annotations, order) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert numbered(annotations[:0:-1], order) == {1: 2, 2: 1, 3: 0}
    for lacking in (order[:3], [*order[:3], "another"]):
        with pytest.raises(UserError, match=r"--instructions: .*annotation 3 "):
            numbered(annotations, lacking)
    with pytest.raises(UserError, match=r"--instructions: .*duplicated"):
        numbered([*annotations, annotations[0]], order)


@needs_extra
def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    texts = read_annotations(make_texts(tmp_path / "texts.json"))
    order = [annotation.instruction or "" for annotation in texts]
    with pytest.raises(UserError, match=r"gamed\.csv: "):
        length_controlled(texts, make_gamed(tmp_path / "gamed.csv", 20), order)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other\.csv"):
        length_controlled(texts, tmp_path / "other.csv", order)


@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is not None, reason="the extra is installed")
def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    texts = read_annotations(make_texts(tmp_path / "texts.json"))
    with pytest.raises(UserError, match=r"pip install -e '\.\[alpaca\]'"):
        length_controlled(texts, make_gamed(tmp_path / "gamed.csv", 60), [one.instruction or "" for one in texts])


def test_without_texts_or_file_there_is_no_number(tmp_path: Path) -> None:
    rows = [{"generator_1": "base", "generator_2": "ours", "preference": preference} for preference in (1, 2)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    bare = read_annotations(tmp_path / "a.json")
    assert length_controlled(bare, None).win_rate is None
    gamed = make_gamed(tmp_path / "gamed.csv", 2)
    assert "output_1, output_2" in length_controlled(bare, gamed).missing
    with pytest.raises(UserError, match=r"--gamed-file .*nowhere\.csv: "):
        length_controlled(bare, tmp_path / "nowhere.csv")
