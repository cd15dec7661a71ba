"""A stage added to the table has its command, its check, its keys and its place in a pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from processes import dae
from worlds import make_world, metrics_of

from dae import cli, stages
from dae.pipeline.recipe import read_pipeline
from dae.stages import StageEntry
from kd.losses.token_loss import TokenLoss
from kd.stages.sft import Sft
from kd.stages.sft_recipe import SftRecipe
from kd.stages.stage import StageRoles
from kd.training.model_card import Description
from kd.training.objective import Objective, Route


class DoubledRecipe(SftRecipe):
    summary: ClassVar[str] = "Next-token loss, twice as heavy."


class Doubled(Sft):
    name = "doubled"
    recipe = DoubledRecipe

    def objective(self, recipe: SftRecipe, roles: StageRoles) -> Objective:
        return Objective((Route("train", None),), TokenLoss(weight=0.0), pooled=True, token_weight=2.0)

    def describe(self, recipe: SftRecipe) -> Description:
        return Description("Trained twice as hard.")


COMMAND = ["doubled", "--base", "base", "--data", "shop.jsonl", "--output", "out", "train.max_steps=2",
           "train.logging_steps=1"]  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "own_stage", sys.modules[__name__])
    monkeypatch.setitem(stages.STAGES, "doubled", StageEntry(DoubledRecipe, "own_stage:Doubled"))
    monkeypatch.setattr("kd.training.publishing.verify_saved", lambda *_: None)
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_has_a_command_that_trains_by_it(world: Path) -> None:
    assert cli.run(COMMAND) == 0
    assert json.loads((world / "out" / "provenance.json").read_text())["stage"] == "doubled"
    assert "Trained twice as hard." in (world / "out" / "README.md").read_text()
    first = dae(["sft", *COMMAND[1:-3], "plain", *COMMAND[-2:]], cwd=world, proof=False)
    assert first.status == 0, first.err
    ours, plain = (next(m["loss"] for m in metrics_of(world / name) if "loss" in m) for name in ("out", "plain"))
    assert ours == pytest.approx(2 * plain)


def test_it_has_a_check_help_and_keys(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", *COMMAND]) == cli.run([*COMMAND, "--check"]) == 0
    assert "steps     2" in capsys.readouterr().out and not (world / "out").exists()
    (world / "r.yaml").write_text("base: base\noutput: out\ndata: {train: shop.jsonl}\n")
    assert cli.run(["check", "r.yaml", "--stage", "doubled"]) == cli.run(["keys", "doubled"]) == 0
    assert "data.ROUTE" in capsys.readouterr().out
    assert cli.run(["doubled", "--help"]) == 0
    assert DoubledRecipe.summary in capsys.readouterr().out


def test_it_has_a_place_in_a_pipeline(world: Path) -> None:
    stage = "{stage: doubled, base: base, data: {train: shop.jsonl}}"
    aligned = '{stage: align, base: base, expert: "@first", data: {general: general.jsonl}}'
    (world / "p.yaml").write_text(f"output: runs\nstages:\n  first: {stage}\n  second: {aligned}\n")
    pipeline = read_pipeline(world / "p.yaml").pipeline()
    assert [(one.kind, sorted(one.upstream)) for one in pipeline.stages] == [("doubled", []), ("align", ["first"])]
