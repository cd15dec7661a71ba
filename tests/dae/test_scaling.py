"""`dae check --processes N --plan PLAN`: each figure against accelerate's preparation and what ranks send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from align_runs import recipe
from collectives import Collectives, of_step
from pico import make_checkpoint
from processes import FSDP_ON_CPUS, ranks
from stages import plan_of
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from worlds import align_command, make_world

from benchmarks.fsdp_on_cpus import FSDP2
from dae import cli
from dae.checking.estimates import memory, weights
from dae.checking.plan import Plan
from dae.checking.processes import Scaling
from dae.checking.scaling import communication, part_of, scaled_memory
from dae.recipe import AlignRecipe


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_world(tmp_path)
    make_checkpoint(tmp_path / "other", seed=5)
    make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    make_checkpoint(tmp_path / "mixture", family="mixtral")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": "base",
        "expert": "expert",
        "output": "student",
        "start": "base",
        "data": {"general": "general.jsonl", "domain": "shop.jsonl"},
        "lora": {"rank": 4},
        "train": {"max_steps": 3, "per_device_train_batch_size": 2},
    }
    return plan_of(AlignRecipe(**{**values, **changes}))


@pytest.fixture(params=[(0, 2), (0, 8), (7, 8)], ids="rank {0[0]} of {0[1]}".format)
def rank(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """One rank of a fake process group, which sends nothing."""
    number, processes = request.param
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=number, world_size=processes)
    yield number, processes
    torch.distributed.destroy_process_group()


def prepare(model: nn.Module) -> None:
    """As accelerate does with recipes/accelerate/fsdp2.yaml."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    state: Any = SimpleNamespace(fsdp_plugin=plugin)
    fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=False), model)


def elements_kept(weight: Any) -> int:
    """Of the memory that this rank's part of a weight takes, filling included."""
    return int(weight.to_local().untyped_storage().nbytes()) // int(weight.element_size())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 3}, "reference": "other"},
        {"lora": None, "reference": "other"},
        {"base": "tied", "expert": "tied", "lora": None},
        {"base": "mixture", "expert": "mixture", "lora": {"rank": 2, "target_modules": ["q_proj", "o_proj"]}},
    ],
    ids=str,
)
def test_each_rank_keeps_what_is_said(world: Path, rank: tuple[int, int], changes: Mapping[str, Any]) -> None:
    """accelerate's own preparation of meta models: to the byte, filling included."""
    plan, (_, processes) = planned(**changes), rank
    items = weights(plan, lambda weight: part_of(weight, processes))
    for model in {id(role.model): role.model for role in plan.roles.all}.values():
        prepare(model)
    real = weights(plan, elements_kept)
    assert [(item.name, item.bytes) for item in items] == [(item.name, item.bytes) for item in real]


ONE_AT_A_TIME = ["train.max_steps=3", "train.save_steps=3", "train.per_device_train_batch_size=2", "start=base"]
TWICE = "train.gradient_accumulation_steps=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ([TWICE], {}),
        ([TWICE, "train.gradient_checkpointing=true"], {"gradient_checkpointing": True}),
        ([TWICE, "reference=other", "lora.rank=3"], {"reference": "other", "lora": {"rank": 3}}),
        (["lora=null"], {"lora": None}),
        (["lora=null", "train.bf16=true", "lambda=0"], {"lora": None, "bf16": True, "lambda": 0}),
    ],
    ids=str,
)
def test_ranks_send_what_is_said_under_fsdp2(world: Path, more: list[str], changes: dict[str, Any]) -> None:
    """Every all-gather and reduce-scatter of the second step, to the byte."""
    environment = {**FSDP2, FSDP_ON_CPUS: "yes"}
    command = align_command(*ONE_AT_A_TIME, *more)
    ended = ranks(command, world, [[Collectives(f"sent-{rank}")] for rank in range(2)], environment)  # type: ignore[list-item]
    assert [one.status for one in ended] == [0, 0], ended[0].err
    accumulation = 2 if TWICE in more else 1
    sent = of_step(world / "sent-0", 1, accumulation)
    assert sent == of_step(world / "sent-1", 1, accumulation)
    said = said_of(changes, accumulation, Scaling(2, "fsdp2"))
    assert {kind: size / 2 for kind, size in sent.items()} == said


@pytest.mark.slow
def test_ranks_send_what_is_said_under_ddp(world: Path) -> None:
    """All gradients once in a step, whatever the micro-batches."""
    ended = ranks(align_command(*ONE_AT_A_TIME, TWICE), world, [[Collectives("sent")], []])  # type: ignore[list-item]
    assert [one.status for one in ended] == [0, 0], ended[0].err
    said = said_of({}, 2, Scaling(2, "ddp"))
    assert said == {kind: 2 * size / 2 for kind, size in of_step(world / "sent", 1, 2).items()}


def said_of(changes: dict[str, Any], accumulation: int, scaling: Scaling) -> dict[str, float]:
    """Bytes by kind of collective, as `dae check` has them."""
    train = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    of_recipe = dict(changes)
    train |= {key: of_recipe.pop(key) for key in ("gradient_checkpointing", "bf16") if key in changes}
    sums: dict[str, float] = {}
    for item in communication(planned(**of_recipe, train=train, output="planned"), scaling):
        kind = next(kind for kind in ("all-gather", "all-reduce", "reduce-scatter") if kind in item.name)
        sums[kind] = sums.get(kind, 0) + item.bytes
    return sums


def test_parts_add_up(world: Path) -> None:
    """What is split shrinks to an eighth, what is whole stays, and what is gathered comes on top."""
    plan = planned(reference="other", train={"gradient_accumulation_steps": 2})
    alone, ddp, split = memory(plan), scaled_memory(plan, Scaling(8, "ddp")), scaled_memory(plan, Scaling(8, "fsdp2"))
    assert ddp[: len(alone)] == alone
    assert [item.name for item in split[: len(alone)]] == [item.name for item in alone]
    for one, other in zip(alone, split[: len(alone)], strict=True):
        if one.name.startswith(("activations", "logits")):
            assert other.bytes == one.bytes
        else:
            assert one.bytes / 8 <= other.bytes < one.bytes
    assert [item.name for item in split[len(alone) :]] == [
        "gathered for a moment: a layer, its buffer, the next",
        "gathered until after backward: output layer",
        "gathered all the time: others' output layers",
        "gradients, not split before the last micro-batch",
    ]


def test_cached_teachers_send_nothing(world: Path) -> None:
    plan = planned(reference="other", cache={"path": "cache"})
    assert [item.name for item in communication(plan, Scaling(8, "fsdp2"))] == [
        "student: all-gather for forward",
        "student: all-gather for backward",
        "gradients, reduce-scatter",
    ]


def test_the_command_shows_both_tables(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--processes", "8", "--plan", "fsdp2", TWICE]
    recipe("{base: base, expert: expert, output: student, data: {general: general.jsonl, domain: shop.jsonl}}")
    assert cli.run(["check", "recipe.yaml", *asked]) == 0
    said = capsys.readouterr().out
    assert "memory of a process, FSDP2" in said and "each of 8" in said
    assert "reference: all-gather for forward" in said and "gradients, reduce-scatter" in said
    assert "A step of 8 processes has 8 x 2 x 8 = 128 rows" in said
    assert cli.run(["check", *align_command(*asked[:3], "ddp")]) == 0
    assert "gradients, all-reduce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plan", "ddp"], "--plan ddp: needs a number of processes; add --processes N, such as 8"),
        (["--processes", "8"], "--processes 8: add --plan ddp or --plan fsdp2"),
        (["--processes", "8", "--plan", "zero3"], "--plan zero3: expected ddp or fsdp2"),
        (["--processes", "1", "--plan", "ddp"], "--processes 1: expected 2 or more"),
    ],
    ids=str,
)
def test_half_a_question_is_refused(
    world: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["check", *align_command()], [*align_command(), "--check"]):
        assert cli.run([*command, *words]) == 2
        assert told in capsys.readouterr().err
    assert cli.run([*align_command(), *words]) == 2
    assert "works with --check only: dae check align ... --" in capsys.readouterr().err


def test_what_fsdp2_would_refuse_is_refused_by_its_check(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*align_command("quantization=nf4"), "--check", "--processes", "2", "--plan"]
    assert cli.run([*command, "fsdp2"]) == cli.USER
    assert "FSDP2 cannot shard quantised weights" in capsys.readouterr().err
