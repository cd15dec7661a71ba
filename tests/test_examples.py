"""examples/align_minimal.py gives the losses of `dae align`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import processes
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from worlds import make_world, metrics_of

from kd.data.mixing import Mixture, MixtureSource

EXAMPLE = Path(__file__).parents[1] / "examples" / "align_minimal.py"
STEPS, ROWS_PER_STEP, SEED = 12, 8, 3


def test_losses_of_every_step_are_those_of_dae_align(tmp_path: Path) -> None:
    """On the rows that `dae align` takes in each step, half of them domain rows."""
    world = make_world(tmp_path / "world")
    command = [
        "align", "--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl", "--general-data",
        "general.jsonl", "data.domain.0.share=0.5", "data.general.0.share=0.5", "--output", "student", f"seed={SEED}",
        f"train.max_steps={STEPS}", "train.logging_steps=1", "train.learning_rate=5e-3",
    ]  # fmt: skip
    ended = processes.dae(command, cwd=world, proof=False)
    assert ended.status == 0, ended.err
    expected = [line["loss"] for line in metrics_of(world / "student") if "loss" in line]

    example = runpy.run_path(str(EXAMPLE))
    files = [example["read_rows"](world / name) for name in ("general.jsonl", "shop.jsonl")]
    sources = [MixtureSource("general", len(files[0]), 0.5), MixtureSource("domain", len(files[1]), 0.5)]
    mixture, steps = Mixture(sources, ROWS_PER_STEP, SEED), []
    for number in range(STEPS):
        rows = mixture.rows_of_step(number)
        steps.append({s.route: [files[i][row] for at, row in rows if at == i] for i, s in enumerate(sources)})
    found = example["train"](
        str(world / "base"), str(world / "expert"), steps, str(tmp_path / "own"), learning_rate=5e-3, seed=SEED
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(found) == STEPS and sum(found[-2:]) < 0.8 * sum(found[:2])


def test_it_runs_as_its_docstring_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    files = {"--domain-data": "shop.jsonl", "--general-data": "general.jsonl", "--base": "base", "--expert": "expert"}
    arguments = [word for flag, name in files.items() for word in (flag, str(world / name))]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, "--output", str(tmp_path / "own"), "--steps", "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    assert PeftModel.from_pretrained(base, str(tmp_path / "own")).peft_config["default"].r == 16


def test_shares_are_kept_and_every_row_comes_once_before_one_comes_twice() -> None:
    mixed = runpy.run_path(str(EXAMPLE))["mixed"]
    rows = {"general": [{"prompt": str(i)} for i in range(12)], "domain": [{"prompt": "d"}]}
    steps = mixed(rows, 0.25, 4, 8, seed=0)
    assert [{route: len(of_route) for route, of_route in step.items()} for step in steps] == [
        {"general": 3, "domain": 1}
    ] * 8
    general = [row["prompt"] for step in steps for row in step["general"]]
    assert sorted(general[:12]) == sorted(general[12:]) == sorted(str(i) for i in range(12))


def test_it_is_short_and_imports_nothing_of_ours() -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "transformers", "peft"}
