"""A budget of KL from the reference on general rows."""

from __future__ import annotations

import json
import math
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from align_runs import held_out, run, trained_steps
from processes import Signal
from processes import dae as run_dae
from worlds import FORGETTING, align_command

from dae import cli
from kd.training.budget import RATE
from kd.training.progress import one_line

FACTOR, KL = "general/factor", "general/kl"
QUICK = ("data.general.0.share=0.5", "data.domain.0.share=0.5", "train.learning_rate=3e-3", "train.logging_steps=1")


def outcome(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["summary"]["budget"]


def test_the_factor_rises_where_the_budget_is_passed_and_falls_where_it_is_not(world: Path) -> None:
    tight = run("budget.general=1e-7", "start=0.5", *QUICK, "train.max_steps=8", output="tight")
    loose = run("budget.general=100", *QUICK, "train.max_steps=8", output="loose")
    for folder, sign in ((tight, 1), (loose, -1)):
        factors = [line[FACTOR] for line in trained_steps(folder)]
        assert [b / a > 1 for a, b in pairwise(factors)] == [sign > 0] * 7
        assert all(abs(math.log(b / a)) <= 1.001 * RATE / 8 for a, b in pairwise(factors))
    assert not outcome(tight)["met"] and outcome(loose)["met"]


def test_a_tighter_budget_leaves_the_student_nearer_to_the_reference(world: Path) -> None:
    found = {}
    for nats in (1e-4, 1.0):
        folder = run(f"budget.general={nats}", *QUICK, "train.max_steps=60", output=f"budget-{nats}")
        last = trained_steps(folder)[-6:]
        tokens = sum(line["general/tokens"] for line in last)
        found[nats] = sum(line[KL] * line["general/tokens"] for line in last) / tokens
        assert outcome(folder)["kl"] == pytest.approx(found[nats], rel=1e-5)
    assert found[1e-4] < 0.7 * found[1.0]


def test_next_token_loss_can_have_a_budget_too(world: Path) -> None:
    folder = run("budget.general=1e-7", "lambda=0", *QUICK, "train.max_steps=4")
    lines = trained_steps(folder)
    assert [line["general/loss"] == line["general/ntp"] for line in lines] == [True] * 4
    assert outcome(folder)["kl"] > 0 and lines[-1][FACTOR] > lines[0][FACTOR]


def test_with_an_eval_set_the_budget_is_held_there_and_the_last_student_is_the_result(world: Path) -> None:
    folder = run(*FORGETTING, "budget.general=0.001")
    told, evaluated = outcome(folder), held_out(folder)
    assert told["measured_on"] == "eval set" and told["kl"] == evaluated[-1]["eval_general_kl"]
    assert json.loads((folder / "run.json").read_text())["summary"]["best_step"] is None


def test_a_run_with_a_budget_resumes_to_the_same_bits(world: Path) -> None:
    settings = ("budget.general=0.001", *QUICK, "train.max_steps=6", "train.save_steps=2")
    whole = run(*settings, output="whole")
    stop = Signal("kd.training.trainer:RoutedTrainer.training_step", 4, signal.SIGTERM)
    assert run_dae(align_command(*settings, output="stopped"), world, signals=[stop]).status == 143
    assert run_dae(align_command(*settings, output="stopped"), world).status == 0
    name = "adapter_model.safetensors"
    assert (world / "stopped" / name).read_bytes() == (whole / name).read_bytes()
    factors = [[line[FACTOR] for line in trained_steps(folder)] for folder in (world / "stopped", whole)]
    assert factors[0] == factors[1]
    assert outcome(world / "stopped") == outcome(whole)


def test_progress_shows_the_factor() -> None:
    logs = {"loss": 0.5, "general/kl": 0.02, "shop/kl": 1.0, "general/factor": 2.5}
    assert one_line(logs) == "loss 0.5000  general kl 0.0200  shop kl 1.0000  general factor 2.5"


def test_the_command_says_whether_it_was_met(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(align_command("budget.general=100", "train.max_steps=1")) == 0
    assert "of 100 nats: met, 100% below (training rows of the last tenth of the steps)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["budget.general=0"], "must be above 0"),
        (["budget.general=.nan"], "expected a finite number"),
        (["budget.general=lots"], "expected a number"),
        (["budget.domain=0.1"], "unknown route; expected general"),
        (["budget.general=0.1", "weights=tokens"], "which sets the general route's factor: use routes or factors"),
        (["budget.general=0.1", "train.load_best_model_at_end=true"], "may exceed it"),
        (["budget.general=0.1", "early_stopping_patience=2"], "which adjusts the loss until the last step"),
    ],
)
def test_wrong_budgets(world: Path, capsys: pytest.CaptureFixture[str], settings: list[str], words: str) -> None:
    eval_set = "data.eval.general=heldout_general.jsonl"
    assert cli.run(align_command(*settings, eval_set, output="refused")) == 2
    assert words in capsys.readouterr().err
    assert not Path("refused").exists()


def test_a_budget_is_measured_where_the_last_steps_have_no_row_of_its_route(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row a step, three of ten of them general: the last tenth of the steps has none."""
    rare = ("data.general.0.share=0.3", "data.domain.0.share=0.7", "train.per_device_train_batch_size=1")
    folder = run("budget.general=1e-6", "start=1", *rare, "train.learning_rate=1e-2", "train.max_steps=8")
    told = outcome(folder)
    assert told["measured_on"] == "the last training rows of this route"
    assert not told["met"] and told["kl"] > 0.01
    assert "not met" in capsys.readouterr().out


def test_a_budget_without_a_row_of_its_route_is_neither_met_nor_exceeded(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rare = ("data.general.0.share=0.01", "data.domain.0.share=0.99", "train.per_device_train_batch_size=1")
    folder = run("budget.general=1e-6", *rare, "train.max_steps=2")
    assert outcome(folder)["met"] is None and outcome(folder)["kl"] is None
    assert "budget       general: not measured (no training row of this route)" in capsys.readouterr().out
