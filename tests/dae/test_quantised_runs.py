"""Runs over quantised backbones: the same as over a checkpoint that holds the dequantised weights."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import EVEN_SHARES, HELD_OUT, cut, start_of
from dequantised import WIDE, layers_of, make_wide_world, quantised, write_dequantised
from pico import make_checkpoint
from processes import ROOT
from safetensors.torch import load_file
from stages import check_checkpoints, plan_of
from worlds import align_command, metrics_of

import kd.training.publishing
from dae import cli
from dae.checking.estimates import weights
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.config.stage_recipe import Quantization
from kd.runs.run_folder import RunFolder
from kd.training.verify import verify_saved

pytest.importorskip("bitsandbytes")

BOTH: tuple[Quantization, ...] = ("nf4", "int8")
ONE_STEP = (
    "train.max_steps=1",
    "train.logging_steps=1",
    "train.optim=sgd",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.max_grad_norm=1e9",
    "train.learning_rate=1.0",
)
FLAGS = {"base": "base", "expert": "expert", "data.domain": ["shop.jsonl"], "data.general": ["general.jsonl"]}
SFT = ["sft", "--data", "shop.jsonl", "lora.rank=4"]
DISTILL = ["distill", "--data", "shop.jsonl", "lora.rank=4"]
# Losses (relative) and weights after a step (of the largest change): of nf4 they are the same to the bit; of int8 the
# dequantised weights differ in the last bit of float32.
RELATIVE = {"nf4": 0.0, "int8": 1e-5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wide world, and base and other as the dequantised weights of themselves: base-nf4, other-int8, ..."""
    folder = make_wide_world(tmp_path_factory.mktemp("world"))
    for name in ("base", "other"):
        for quantization in BOTH:
            write_dequantised(folder / name, folder / f"{name}-{quantization}", quantization)
    return folder


@pytest.fixture(autouse=True)
def _in_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # a fresh process takes seconds


def run(command: Sequence[str], output: str, *more: str) -> Path:
    assert cli.run([*command, "--output", output, *more]) == 0
    return Path(output)


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_run(ours: Path, theirs: Path, relative: float, weights: bool = True) -> None:
    """weights: also the adapters, unless Adam, which divides by the size of gradients, has blown up their last bits."""
    pairs = zip(metrics_of(ours), metrics_of(theirs), strict=True)
    compared = 0
    for one, other in pairs:
        for key in one:
            if key.endswith(("loss", "_kl", "/kl", "/ntp", "grad_norm")):
                assert one[key] == pytest.approx(other[key], rel=relative, abs=relative), key
                compared += 1
    assert compared > 3
    a, b = student(ours), student(theirs)
    assert a.keys() == b.keys()
    if not weights:
        return
    largest = max(float(weight.abs().max()) for name, weight in b.items() if "lora_B" in name)
    assert largest > 1e-4  # it has been trained: B began as 0
    for name, weight in a.items():
        assert float((weight - b[name]).abs().max()) <= 10 * relative * largest, name


@pytest.mark.parametrize("quantization", BOTH)
def test_align_with_an_adapter_expert(quantization: Quantization) -> None:
    command, plain = align_command(*EVEN_SHARES, *HELD_OUT, "start=base"), f"base-{quantization}"
    ours = f"align-{quantization}"
    more = ("train.max_steps=4", "train.save_steps=2")
    run(command, ours, f"quantization={quantization}", *more)
    theirs = run([*command, "--base", plain], f"{ours}-whole", *more)
    assert_same_run(Path(ours), theirs, RELATIVE[quantization], weights=quantization == "nf4")
    assert start_of(Path(ours))["general"] == 0.0  # the reference is the untouched student
    assert json.loads((Path(ours) / "provenance.json").read_text())["base"]["quantization"] == quantization
    assert "quantization" not in json.loads((theirs / "provenance.json").read_text())["base"]


@pytest.mark.parametrize("quantization", BOTH)
def test_the_gradient_of_one_step(quantization: Quantization) -> None:
    """With SGD of rate 1 the change of B is its gradient."""
    command = align_command(*EVEN_SHARES, "start=base", *ONE_STEP)
    ours = run(command, f"step-{quantization}", f"quantization={quantization}")
    theirs = run([*command, "--base", f"base-{quantization}"], f"step-{quantization}-whole")
    assert_same_run(ours, theirs, RELATIVE[quantization])


@pytest.mark.parametrize("quantization", BOTH)
def test_distill_with_a_quantised_teacher(quantization: Quantization) -> None:
    more = (*ONE_STEP, "attention={}", "hidden={}")
    ours = run(
        [*DISTILL, "--base", "base", "--teacher", "other"], f"kd-{quantization}", f"quantization={quantization}", *more
    )
    theirs = run(
        [*DISTILL, "--base", f"base-{quantization}", "--teacher", f"other-{quantization}"],
        f"kd-{quantization}-whole",
        *more,
    )
    assert_same_run(ours, theirs, RELATIVE[quantization])


@pytest.mark.parametrize("quantization", BOTH)
def test_sft(quantization: Quantization) -> None:
    more = (*ONE_STEP, "train.max_steps=3", "train.learning_rate=0.1", "train.gradient_checkpointing=true")
    ours = run([*SFT, "--base", "base"], f"sft-{quantization}", f"quantization={quantization}", *more)
    theirs = run([*SFT, "--base", f"base-{quantization}"], f"sft-{quantization}-whole", *more)
    assert_same_run(ours, theirs, RELATIVE[quantization])


def test_a_start_towards_an_adapter_expert() -> None:
    command = align_command(*EVEN_SHARES, "start.domain=0.4", "train.max_steps=2")
    ours = run(command, "auto", "quantization=nf4")
    theirs = run([*command, "--base", "base-nf4"], "auto-whole")
    assert_same_run(ours, theirs, 0.0)
    starts = [RunFolder(folder).summary()["start"] for folder in (ours, theirs)]
    assert starts[0] == starts[1] and starts[0]["distance"] > 0


def test_a_cache_knows_quantised_teachers(world: Path) -> None:
    command = align_command(*EVEN_SHARES, "start=base", "train.max_steps=2", "cache.path=cache")
    live = run([*command[:-1]], "live", "quantization=nf4")
    cached = run(command, "cached", "quantization=nf4")
    assert_same_run(cached, live, 1e-5)
    stores = {folder.name for folder in (world / "cache").iterdir()}
    run(command, "uncached")  # without quantisation, in the same cache
    assert len({folder.name for folder in (world / "cache").iterdir()} - stores) == len(stores)


def test_a_run_goes_on_as_it_was_quantised(capsys: pytest.CaptureFixture[str]) -> None:
    command = align_command("start=base", "train.max_steps=2", output="held")
    assert cli.run([*command, "quantization=nf4"]) == 0
    capsys.readouterr()
    assert cli.run([*command, "quantization=int8"]) == 2
    assert 'quantization: "nf4" -> "int8"' in capsys.readouterr().err


@pytest.mark.parametrize("quantization", BOTH)
def test_the_card_tells_how_to_load_it(quantization: Quantization) -> None:
    folder = run([*SFT, "--base", "base"], f"card-{quantization}", f"quantization={quantization}", *ONE_STEP)
    card = (folder / "README.md").read_text()
    assert f"quantised ({quantization}, by bitsandbytes)" in card
    assert ("rounds the inputs" in card) == (quantization == "int8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert set(layers_of(names["model"].get_base_model()))


def test_an_adapter_on_another_base_than_it_was_trained_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    run([*SFT, "--base", "base"], "shop-expert", "quantization=nf4", *ONE_STEP)
    told = "was trained on a base that was quantised (nf4), and is used on one that is "
    for more, expected in (
        ((), "not quantised"),
        (("quantization=int8",), "quantised (int8)"),
        (("quantization=nf4",), ""),
    ):
        caplog.clear()
        flags = {**FLAGS, "expert": "shop-expert", "output": "none"}
        recipe = load_recipe(AlignRecipe, None, flags, ["start=base", *more])
        with caplog.at_level(logging.WARNING):
            check_checkpoints(recipe)
        assert (told + expected in caplog.text) == bool(expected)


def test_memory_is_that_of_the_models_in_memory(world: Path, tmp_path: Path) -> None:
    for quantization in BOTH:
        recipe = load_recipe(AlignRecipe, None, FLAGS, [f"quantization={quantization}", f"output={tmp_path / 'o'}"])
        model = quantised(world / "base", quantization)
        held = sum(weight.nbytes for weight in model.parameters())
        for layer in layers_of(model).values():
            state = layer.weight.quant_state if quantization == "nf4" else None
            held += layer.weight.SCB.nbytes if state is None else state.absmax.nbytes + state.code.nbytes
        assert weights(plan_of(recipe))[0].bytes == held


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("lora=null",), "quantization=nf4: quantised weights cannot train: remove it, or `lora: null`"),
        (("merge=true",), "merge=true: the adapter is trained on quantised weights"),
        (("quantization=nf5",), "expected nf4 or int8; did you mean `nf4`?"),
        (("start.domain=0.5", "expert.domain=full"), "start: expert.domain: has weights of its own"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_what_would_be_wrong_is_refused_before_anything_is_written(
    more: tuple[str, ...], words: str, check: bool, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (world / "full").exists():
        make_checkpoint(world / "full", seed=9, **WIDE)
    command = align_command("quantization=nf4", *more, output="refused")
    assert cli.run((["check"] if check else []) + command) == 2
    assert words in capsys.readouterr().err
    assert not Path("refused").exists()


def test_start_auto_stays_at_the_base_for_an_expert_with_whole_weights(caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(Path("whole-expert"), seed=8, **WIDE)
    with caplog.at_level(logging.WARNING):
        folder = run(align_command("quantization=int8", "train.max_steps=1", "expert.domain=whole-expert"), "stays")
    assert (
        "the student starts at the base, because of this: start: expert.domain: has weights of its own" in caplog.text
    )
    assert "start" not in RunFolder(folder).summary()


def test_bitsandbytes_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    for check in ([], ["check"]):
        assert cli.run([*check, *SFT, "--base", "base", "--output", "missing", "quantization=int8"]) == 2
        assert (
            capsys.readouterr()
            .err.rstrip()
            .endswith("quantization: int8: needs the package bitsandbytes: pip install -e '.[quantization]'")
        )
    assert not Path("missing").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "float32"), ("int8", "float32"), ("nf4", "bfloat16")])
def test_a_fresh_process_opens_the_base_as_it_was_quantised(
    quantization: Quantization, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(
        kd.training.publishing, "verify_saved", lambda *given: found.append((given, verify_saved(*given)))
    )
    run(
        [*SFT, "--base", "base"], f"{dtype}-{quantization}", f"quantization={quantization}", f"dtype={dtype}", *ONE_STEP
    )
    ((given, answer),) = found
    assert answer.relative <= {"float32": 1e-5, "bfloat16": 2**-6}[dtype]
    if dtype == "float32":
        folder, ids, expected, settings, base = given
        with pytest.raises(RuntimeError, match="the saved model is not the trained one"):
            verify_saved(folder, ids, expected, replace(settings, quantization=None), base)


@pytest.mark.slow
def test_two_processes(world: Path) -> None:
    more = ("start=base", "quantization=nf4", "train.max_steps=3")
    run(align_command(*cut(8, 1), *more), "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dae"]
    done = subprocess.run(
        [*launcher, *align_command(*cut(4, 1), *more, output="two")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, weight in student(Path("two")).items():
        torch.testing.assert_close(weight, student(Path("one"))[name], rtol=0, atol=1e-5)
