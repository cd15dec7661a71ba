"""`offload_teachers`: the layers of a teacher wait on disk, and the run is the one that it would have been."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import HELD_OUT, logits_of, merged, run
from pico import make_checkpoint
from safetensors.torch import load_file, save_file
from stages import plan_of
from worlds import align_command, metrics_of

import kd.models.roles
from dae import cli
from dae.checking.estimates import memory, moved_layers
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.errors import UserError
from kd.training.wrapping import refuse_unshardable

OFFLOADED = "offload_teachers=disk"
SHORT = "train.max_steps=4"
DISTILL = [
    "distill", "--base", "base", "--data", "shop.jsonl", "attention.weight=1.0", "hidden.weight=1.0", "lora.rank=4",
    "train.learning_rate=1e-2", "train.max_steps=4", "train.logging_steps=2",
]  # fmt: skip


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Every model that is opened with its layers elsewhere."""
    found: list[torch.nn.Module] = []
    whole: Callable[..., Any] = kd.models.roles.open_offloaded

    def open_offloaded(*given: Any, **named: Any) -> Any:
        found.append(whole(*given, **named))
        return found[-1]

    monkeypatch.setattr(kd.models.roles, "open_offloaded", open_offloaded)
    return found


def waits(model: torch.nn.Module) -> bool:
    """Whether the layers are elsewhere and the rest is here."""
    layers = {name: weight.is_meta for name, weight in model.named_parameters() if ".layers." in name}
    others = [weight.is_meta for name, weight in model.named_parameters() if ".layers." not in name]
    return all(layers.values()) and bool(layers) and not any(others)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    measured = ("time", "seconds", "per_second", "_gib")
    return [{k: v for k, v in line.items() if not k.endswith(measured)} for line in metrics_of(folder)]


def assert_same_run(first: Path, second: Path, weights: str = "adapter_model.safetensors") -> None:
    assert steps_of(first) == steps_of(second)
    ours, theirs = load_file(first / weights), load_file(second / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_full_expert_teaches_the_same_and_the_student_starts_on_the_same_line(
    world: Path, opened: list[torch.nn.Module]
) -> None:
    merged("expert", "whole")
    settings = (SHORT, *HELD_OUT, "start=0.3", "expert.domain=whole")
    here = run(*settings, output="here")
    assert not opened
    away = run(*settings, OFFLOADED, output="away")
    assert [waits(model) for model in opened] == [True]
    assert_same_run(here, away)
    assert metrics_of(away)[0]["start"]["energy_kept"] < 1  # the expert's difference was really read
    assert float((logits_of(away) - logits_of(Path("base"))).abs().max()) > 0.1


def test_with_all_weights_training_the_copy_of_the_base_waits_unless_it_carries_adapters(
    world: Path, opened: list[torch.nn.Module]
) -> None:
    merged("expert", "whole")
    settings = (SHORT, "lora=null", "train.learning_rate=1e-3", "expert.domain=whole")
    here, away = run(*settings, output="here"), run(*settings, OFFLOADED, output="away")
    assert [waits(model) for model in opened] == [True, True]  # base and expert
    assert_same_run(here, away, "model.safetensors")
    assert cli.run(align_command("lora=null", OFFLOADED, output="adapters")) == 2
    assert not Path("adapters").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_distillation_reads_maps_and_hidden_states_of_layers_that_come_from_disk(
    world: Path, opened: list[torch.nn.Module], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture's experts are joined on loading: the joined weights lie in a temporary folder, which goes again."""
    copies = world / "temporary"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    make_checkpoint(world / "teacher", family, seed=3)
    command = [*DISTILL, "--teacher", "teacher"]
    assert cli.run([*command, "--output", "here"]) == 0
    assert cli.run([*command, "--output", "away", OFFLOADED]) == 0
    assert [waits(model) for model in opened] == [True]
    assert_same_run(Path("here"), Path("away"))
    (folder,) = copies.glob("dae-offload-*")
    assert any(folder.iterdir()) == (family == "mixtral")
    opened.clear()
    gc.collect()
    assert not folder.exists()


def test_a_cache_is_filled_by_an_offloaded_teacher(world: Path, opened: list[torch.nn.Module]) -> None:
    merged("expert", "whole")
    for place, more in (("here", ()), ("away", (OFFLOADED,))):
        command = align_command(SHORT, "expert.domain=whole", f"cache.path=cache-{place}", *more)
        assert cli.run(["cache", *command]) == 0
    assert [waits(model) for model in opened] == [True, True]  # the reference, then the expert
    here, away = (
        {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*.safetensors")}
        for folder in ("cache-here", "cache-away")
    )
    assert here and here == away


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((OFFLOADED,), "remove it"),  # every teacher is on the base
        (("offload_teachers=cpu", "expert.domain=whole"), "this machine has no GPU"),
        ((OFFLOADED, "quantization=int8", "expert.domain=whole"), "quantised layers cannot be moved"),
        (("offload_teachers=gpu",), "offload_teachers"),
    ],
)
@pytest.mark.parametrize("first", [(), ("check",)], ids=["run", "check"])
def test_what_cannot_be_offloaded_is_refused(
    world: Path, more: tuple[str, ...], words: str, first: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "offload_teachers=cpu" in more:
        pytest.skip("this machine has a GPU")
    merged("expert", "whole")
    assert cli.run([*first, *align_command(SHORT, *more)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error and "offload_teachers" in error
    assert not Path("student").exists()


def test_a_teacher_whose_files_are_quantised_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = merged("expert", "whole") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    assert cli.run(align_command(SHORT, "expert.domain=whole", OFFLOADED)) == 2
    assert "quantised layers cannot be moved" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("plan", ["FSDP2", "ZeRO-3"])
def test_sharded_teachers_are_not_offloaded_too(plan: str) -> None:
    flags = {"base": "b", "expert": "e", "data.domain": ["shop.jsonl"], "data.general": ["general.jsonl"]}
    asked = load_recipe(AlignRecipe, None, flags, [OFFLOADED])
    with pytest.raises(UserError, match=f"offload_teachers: disk: under {plan}"):
        refuse_unshardable(asked, plan)


def test_a_weight_that_is_not_finite_is_found_although_it_waits_on_disk(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = merged("expert", "whole")
    weights = load_file(whole / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, whole / "model.safetensors", {"format": "pt"})
    assert cli.run(align_command(SHORT, "expert.domain=whole", OFFLOADED)) == 2
    assert "model.layers.1.mlp.up_proj.weight contains NaN" in " ".join(capsys.readouterr().err.split())


def test_dae_check_counts_one_layer_and_what_a_pass_moves(world: Path) -> None:
    merged("expert", "whole")
    flags = {"base": "base", "expert": "whole", "data.domain": ["shop.jsonl"], "data.general": ["general.jsonl"]}

    def plan(*more: str) -> Any:
        return plan_of(load_recipe(AlignRecipe, None, flags, more))

    here, away = plan(), plan(OFFLOADED)
    (moved,) = moved_layers(away)
    assert not moved_layers(here)
    layers = {
        name: weight.numel() * weight.element_size()
        for name, weight in load_file("whole/model.safetensors").items()
        if ".layers." in name
    }
    assert moved.bytes == sum(layers.values())
    waiting = sum(size for name, size in layers.items() if ".layers.0." not in name)
    assert sum(item.bytes for item in memory(here)) - sum(item.bytes for item in memory(away)) == waiting
