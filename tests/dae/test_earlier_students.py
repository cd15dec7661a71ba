"""`student_from`: an earlier student's adapter goes on as it is, and the recipe says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pico import make_checkpoint
from processes import dae
from stages import plan_of
from worlds import align_command, make_adapter, make_rows, make_world

from dae.earlier_student import with_lora_of_student
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.config.stage_recipe import LoraRecipe
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.roles import Backbone, LoadSettings, add_student_adapter, load_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual world, and an adapter of rank 4, alpha 8 on two kinds of layers, as an earlier student."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_adapter(folder / "first", folder / "base", size=0.01, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return folder


def recipe_of(world: Path, *assignments: str) -> AlignRecipe:
    flags: dict[str, Any] = {
        "base": str(world / "base"),
        "expert": str(world / "expert"),
        "data.general": str(world / "general.jsonl"),
        "data.domain": str(world / "shop.jsonl"),
        "student_from": str(world / "first"),
        "output": str(world / "student"),
    }
    return load_recipe(AlignRecipe, None, flags, assignments)


def lora_of_student(recipe: AlignRecipe) -> LoraRecipe | None:
    inputs = {"base": checkpoint(recipe.base), "student_from": checkpoint(str(recipe.student_from))}
    return with_lora_of_student(recipe, inputs).lora


def test_the_recipe_says_what_the_adapter_is(world: Path) -> None:
    lora = lora_of_student(recipe_of(world))
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (4, 8.0, 0.1, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("lora.rank=64", "lora.rank: 64: the adapter of student_from ({first}) has 4"),
        ("lora.alpha=1", "lora.alpha: 1.0: the adapter of student_from ({first}) has 8.0"),
        ("lora.dropout=0.5", "lora.dropout: 0.5: the adapter of student_from ({first}) has 0.1"),
        ("lora.target_modules=[q_proj]", "lora.target_modules: q_proj: the adapter of student_from ({first}) has"),
        ("lora.target_modules=all-linear", "lora.target_modules: all-linear: the adapter of student_from ({first})"),
    ],
)
def test_what_it_is_not_is_refused_by_name(world: Path, assignment: str, told: str) -> None:
    for refusing in (lora_of_student, plan_of):
        with pytest.raises(UserError) as caught:
            refusing(recipe_of(world, assignment))
        assert told.format(first=world / "first") in str(caught.value)
        assert "student_from" in str(caught.value)


@pytest.mark.parametrize(
    "assignment", ["lora.rank=4", "lora.target_modules=[v_proj, q_proj]", "lora.target_modules='.*(q|v)_proj'"]
)
def test_saying_what_it_is_is_no_mistake(world: Path, assignment: str) -> None:
    lora_of_student(recipe_of(world, assignment))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("assignments", [(), ("lora.target_modules=all-linear",)])
def test_a_student_on_all_linear_layers_is_said_to_be_on_them(
    family: str, assignments: tuple[str, ...], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    backbone = Backbone(checkpoint(base), load_model(checkpoint(base), LoadSettings(torch.float32)))
    add_student_adapter(backbone, LoraRecipe(rank=3)).save_pretrained(str(tmp_path / "first"))
    make_rows(tmp_path / "general.jsonl", 0)
    make_rows(tmp_path / "shop.jsonl", 1)
    lora = lora_of_student(recipe_of(tmp_path, *assignments))
    assert lora == LoraRecipe(rank=3)


def test_a_run_writes_down_what_it_trained(world: Path) -> None:
    command = align_command("student_from=first", "train.max_steps=1", output="went_on")
    command.remove("lora.rank=4")
    ended = dae(command, world, proof=False)
    assert ended.status == 0, ended.err
    written = yaml.safe_load((world / "went_on" / "recipe.yaml").read_text())
    assert written["lora"] == {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    again = dae(["align", "--recipe", "went_on/recipe.yaml"], world, proof=False)
    assert (again.status, "nothing to do" in again.err) == (0, True), again.err
    refused = dae(align_command("student_from=first", "lora.rank=64", output="other"), world, proof=False)
    assert refused.status == 2
    assert not (world / "other").exists()
