"""benchmarks/rows.py: its rows are what their names say, its commands are valid recipes, and its table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import rows
from benchmarks.rows import RATES, VARIANTS, Variant, command, scores_of, student_of, with_wrong_labels, write_rows
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe

ROOT = Path(__file__).resolve().parents[1]
ALL = [{"prompt": f"p{i}", "completion": f"c{i % 7}"} for i in range(1000)]
GENERAL = [{"text": f"t{i}"} for i in range(300)]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_rows_are_parts_of_all_with_wrong_labels(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "WORK", tmp_path)
    right = {row["prompt"]: row["completion"] for row in ALL}
    write_rows(variant, ALL, GENERAL)
    training, held_out = (read(variant.folder / name) for name in ("rows.jsonl", "eval.jsonl"))
    assert len(training) == 600 // variant.part and len(held_out) == 400
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    for part in (training, held_out):
        assert sum(right[row["prompt"]] != row["completion"] for row in part) == round(variant.wrong * len(part))
    before = (variant.folder / "rows.jsonl").read_bytes()
    write_rows(variant, ALL, GENERAL)
    assert (variant.folder / "rows.jsonl").read_bytes() == before


def test_no_label_is_wrong_at_share_0() -> None:
    assert with_wrong_labels(ALL, 0.0, np.random.default_rng(0)) == ALL


def test_commands_differ_in_what_is_compared_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = []
    for loss in ("dae", "ntp"):
        words = shlex.split(command(VARIANTS[1], loss, RATES[0]))
        first, end = words.index("--recipe") + 1, words.index("&&")
        recipes.append(load_recipe(AlignRecipe, ROOT / words[first], {"output": "x"}, words[first + 3 : end]))
    assert [recipe.lambda_ for recipe in recipes] == [1.0, 0.0]
    assert recipes[0].model_copy(update={"lambda_": 0.0}) == recipes[1]


def test_each_loss_takes_its_rate_by_its_own_eval_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "WORK", tmp_path)
    monkeypatch.setattr(rows, "completion_bytes", lambda _shared, _task: np.full(4, 2.0))
    variant = VARIANTS[0]
    for loss, eval_losses, right in (("dae", (0.3, 0.2), (0, 1)), ("ntp", (0.4, 0.5), (1, 0))):
        for rate, eval_loss, score in zip(RATES, eval_losses, right, strict=True):
            folder = student_of(variant, loss, rate)
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"summary": {"held_out": {"eval_loss": eval_loss}}}))
            scores = {"real_category": [score] * 4, "real_stories": [2.0] * 4}
            tasks = {task: {"documents": [{"score": value} for value in of]} for task, of in scores.items()}
            scores_of(variant, loss, rate).write_text(json.dumps({"tasks": tasks}))
    text = rows.markdown(rows.results())
    both = "| all rows | 100.0, 1.000 (0.0015; 0.0005 tried) | 100.0, 1.000 (0.0005; 0.0015 tried) |"
    assert f"{both} +0.0 (+0.0 to +0.0) | +0.000 (+0.000 to +0.000) |" in text
