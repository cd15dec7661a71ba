"""`dae distill`, and what `dae check` and `dae keys` know of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pico import make_checkpoint
from processes import ROOT
from safetensors.torch import load_file
from stages import plan_of
from worlds import make_rows, metrics_of

import kd.training.publishing
from dae import cli
from dae.checking.estimates import parameters, weights
from kd.models.checkpoint import checkpoint
from kd.stages.distill_recipe import DistillRecipe


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, teacher and rows in the current folder; results are not loaded again (tests/kd/test_distill.py does)."""
    make_checkpoint(tmp_path / "base")
    make_checkpoint(tmp_path / "teacher", vocab_size=320, seed=5, num_hidden_layers=3)
    make_rows(tmp_path / "rows.jsonl", 1, 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)
    return tmp_path


COMMAND = ["distill", "--base", "base", "--teacher", "teacher", "--data", "rows.jsonl", "train.max_steps=2"]


def test_the_command_trains_and_says_how_far_the_student_is(world: Path, capsys: Any) -> None:
    assert cli.run([*COMMAND, "--output", "o", "attention.weight=0.5", "hidden.loss=mse", "lora.rank=4"]) == 0
    assert "o: finished, 2 steps\n  train        KL to its teacher " in capsys.readouterr().out
    recipe = yaml.safe_load((world / "o" / "recipe.yaml").read_text())
    assert recipe["attention"] == {"weight": 0.5, "layers": "even"}
    assert recipe["hidden"] == {"weight": 1.0, "layers": "even", "loss": "mse"}
    assert {"train/attention", "train/hidden"} <= metrics_of(world / "o")[-1].keys()
    assert cli.run([*COMMAND, "--output", "o", "attention.weight=0.5", "hidden.loss=mse", "lora.rank=4"]) == 0
    assert cli.run([*COMMAND, "--output", "o"]) == cli.USER


def test_a_cached_teacher_gives_the_same_losses(world: Path) -> None:
    for output, more in (("live", []), ("first", ["cache.path=c"])):
        assert cli.run([*COMMAND, "--output", output, *more, "train.logging_steps=1"]) == 0
    live, first = (
        [line["train/kl"] for line in metrics_of(world / o)[1:] if "train/kl" in line] for o in ("live", "first")
    )
    assert len(live) == 2 and first == pytest.approx(live, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["skew=0.2"], "skew=0.2: is read with `divergence: skewed_forward_kl` or `skewed_reverse_kl` only: remove it"),
        (["attention.layers=[[0, 7]]"], "attention.layers: [0, 7]: the teacher has no layer 7; its layers are 0 to 2"),
        (["attention.layers=all"], "expected even, or a list of [student's layer, teacher's layer]"),
        (["cross_tokenizer=uld"], "only the next-token loss says which tokens are meant"),
        (
            ["cache.path=c", "attention.weight=1"],
            "attention: needs attention maps of the teacher, which a cache does not",
        ),
        (["cache.path=c", "hidden.weight=1.0"], "hidden: needs hidden states of all layers of the teacher, which"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(world: Path, more: list[str], words: str, capsys: Any) -> None:
    assert cli.run([*COMMAND, "--output", "o", *more]) == cli.USER
    assert words in capsys.readouterr().err
    assert not (world / "o").exists()


def test_check_knows_the_stage_and_counts_the_teacher(world: Path, capsys: Any) -> None:
    recipe = {"base": "base", "teacher": "teacher", "output": "o", "data": {"train": "rows.jsonl"}}
    (world / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run(["check", "r.yaml", "train.max_steps=2"]) == 0
    shown = capsys.readouterr().out
    assert "route train" in shown and "teacher" in shown and " 0 through teachers" not in shown
    plan = plan_of(DistillRecipe(**recipe))
    sizes = {item.name: item.bytes for item in weights(plan)}
    assert sizes["teacher"] == 4 * parameters(checkpoint("teacher").meta_model())
    assert sizes["base: student"] == 4 * parameters(checkpoint("base").meta_model())
    assert plan.roles.vocabulary_rows == 288
    make_checkpoint(world / "wide", hidden_size=24, num_hidden_layers=3)
    wide = plan_of(DistillRecipe(**{**recipe, "teacher": "wide", "hidden": {}}))
    sizes = {item.name: item.bytes for item in weights(wide)}
    assert sizes["projections, their gradients and AdamW"] == 2 * 16 * 24 * 4 * 4
    assert cli.run(["check", "r.yaml", "attention.layers=[[3, 0]]"]) == cli.USER
    assert "the student has no layer 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["attention.weight=0.5", "hidden.loss=mse", "lora=null"], ["lora.rank=4"]])
def test_ranks_do_not_matter(world: Path, settings: list[str]) -> None:
    """Also what trains beside the student is one and the same on all ranks."""
    make_checkpoint(world / "wide", seed=5, hidden_size=24)
    command = [*COMMAND, "--teacher", "wide", "hidden.weight=0.5", "train.learning_rate=1e-2", *settings]
    assert cli.run([*command, "--output", "one"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dae"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    more = ["--output", "two", "train.per_device_train_batch_size=4"]
    done = subprocess.run(
        [*launcher, *command, *more],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for file in (*Path("one").glob("*.safetensors"), Path("one/checkpoints/step-000002/training_only.safetensors")):
        ours, theirs = load_file(file), load_file(Path("two") / file.relative_to("one"))
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-3)


def test_keys_lists_the_losses(capsys: Any) -> None:
    assert cli.run(["keys", "distill"]) == 0
    shown = capsys.readouterr().out
    for key in ("teacher", "skew", "attention.layers", "hidden.loss", "cross_tokenizer", "lambda"):
        assert f"\n{key}  " in shown
    assert "attention.layers  even | list of" in shown
