"""Checkpoints that cannot be what their user takes them for: told before anything is trained or written, status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dae_eval.models import locate
from pico import make_checkpoint
from processes import dae
from safetensors.torch import load_file, save_file
from worlds import align_command, make_adapter, make_world

from dae.sampling.generation import open_writer
from kd.errors import UserError
from kd.models.checkpoint import checkpoint

SFT = ["sft", "--base", "base", "--data", "shop.jsonl", "--output", "student", "train.max_steps=2"]
SAMPLE = ["sample", "--model", "expert", "--output", "rows.jsonl", "--rows", "2", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("origin") / "world")


@pytest.fixture
def world(origin: Path, tmp_path: Path) -> Path:
    place = tmp_path / "world"
    shutil.copytree(origin, place)
    return place


def refused(arguments: Sequence[str], world: Path, *told: str) -> None:
    """Run a command that must be refused in one line, with nothing written."""
    before = sorted(world.rglob("*"))
    ended = dae(arguments, world, proof=False)
    assert ended.status == 2, ended
    assert ended.err.count("\n") == 1, ended.err
    for words in told:
        assert words in ended.err
    assert sorted(world.rglob("*")) == before


def take_away(weights: Path, part: str) -> None:
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, weights, metadata={"format": "pt"})


def full_expert(world: Path) -> Path:
    shutil.rmtree(world / "expert")
    return make_checkpoint(world / "expert", seed=3)


def lacking(world: Path) -> None:
    take_away(full_expert(world) / "model.safetensors", "layers.1.mlp.up_proj")


def too_wide(world: Path) -> None:
    config = full_expert(world) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))


def halved(world: Path) -> None:
    take_away(world / "expert" / "adapter_model.safetensors", "layers.1.")


def no_json(world: Path) -> None:
    (world / "expert" / "adapter_config.json").write_text("{")


EXPERTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a full expert without one of its weights": (lacking, "missing: model.layers.1.mlp.up_proj.weight"),
    "a full expert whose config is another's": (too_wide, "of another shape: model.layers.0.mlp.down_proj.weight"),
    "half of an adapter": (halved, "missing: model.layers.1.mlp.down_proj.lora_A.weight"),
    "an adapter config that is no JSON": (no_json, "adapter_config.json: is no JSON"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_that_is_not_whole(name: str, world: Path) -> None:
    damage, told = EXPERTS[name]
    damage(world)
    refused(align_command(), world, "expert", told)
    (world / "r.yaml").write_text(
        "base: base\nexpert: expert\noutput: student\ndata: {general: general.jsonl, domain: shop.jsonl}\n"
    )
    refused(["check", "r.yaml"], world, "expert", told)


def test_a_base_without_its_output_layer(world: Path) -> None:
    take_away(world / "base" / "model.safetensors", "lm_head")
    refused(align_command(), world, "base", "missing: lm_head.weight")
    refused(SFT, world, "base", "missing: lm_head.weight")
    refused([*SAMPLE, "--model", "base"], world, "base", "missing: lm_head.weight")


def test_a_distilling_pair_that_is_not_whole(world: Path) -> None:
    take_away(make_checkpoint(world / "teacher", seed=5) / "model.safetensors", "layers.1.mlp.up_proj")
    command = ["distill", "--base", "base", "--teacher", "teacher", "--data", "shop.jsonl", "--output", "student"]
    refused(command, world, "teacher", "missing: model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_an_adapter_is_no_base(world: Path, with_tokenizer: bool) -> None:
    if with_tokenizer:
        for file in (world / "base").glob("tokenizer*"):
            shutil.copy(file, world / "expert")
    command = [*SFT, "--base", "expert"]
    refused(command, world, "base: expert: is an adapter, and a full checkpoint is wanted here")
    (world / "r.yaml").write_text("base: expert\noutput: student\ndata: {train: shop.jsonl}\ntrain: {max_steps: 2}\n")
    if with_tokenizer:  # else that is told, too
        refused(["check", "r.yaml"], world, "base: expert: is an adapter")


def not_a_number(world: Path) -> None:
    weights = world / "expert" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[max(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


def of_another_width(world: Path) -> None:
    shutil.rmtree(world / "expert")
    make_adapter(world / "expert", make_checkpoint(world / "wide", hidden_size=32))
    config = world / "expert" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))


def on_an_adapter(world: Path) -> None:
    config = world / "expert" / "adapter_config.json"
    shutil.copytree(world / "expert", world / "other")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "other"}))
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, world / "other")


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (not_a_number, "model.layers.1.self_attn.v_proj.lora_B.weight"),
    "other shapes": (of_another_width, "trained on another base"),
    "half of it": (halved, "missing: model.layers.1.mlp.down_proj.lora_A.weight"),
    "a config that is no JSON": (no_json, "expert/adapter_config.json: is no JSON"),
    "a base that is an adapter": (on_an_adapter, "other: is an adapter"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_adapter_that_cannot_write(name: str, world: Path) -> None:
    damage, told = WRITERS[name]
    damage(world)
    refused(SAMPLE, world, told)


def test_whoever_reads_an_adapters_config_says_what_is_wrong_with_it(world: Path) -> None:
    no_json(world)
    path = str(world / "expert")
    for read in (
        lambda path: checkpoint(path).base,
        lambda path: locate("model", path, None),
        lambda path: open_writer(checkpoint(path), False),
    ):
        with pytest.raises(UserError, match=r"expert/adapter_config\.json: is no JSON \(.*save or download"):
            read(path)


MERGES = {
    "weights": ["merge", "weights", "--method", "linear", "--base", "base", "--expert", "expert"],
    "moe": ["merge", "moe", "--base", "base", "--expert", "expert", "--expert", "base", "--gate", "random"],
    "to-lora": ["merge", "to-lora", "--reference", "base", "--expert", "expert", "--rank", "2"],
}


@pytest.mark.parametrize("kind", MERGES)
def test_a_merge_of_what_is_not_whole(kind: str, world: Path) -> None:
    lacking(world)
    refused([*MERGES[kind], "--output", "merged"], world, "expert: ", "missing: model.layers.1.mlp.up_proj.weight")


def pad_behind_the_vocabulary(world: Path) -> str:
    set_key(world / "base" / "config.json", pad_token_id=288)
    return "base: config.json: pad_token_id: 288: the vocabulary has 288 rows"


def generation_settings_of_wrong_types(world: Path) -> str:
    set_key(world / "base" / "generation_config.json", pad_token_id="auto")
    return "base: generation_config.json cannot be read: TypeError"


def merges_that_are_none(world: Path) -> str:
    file = world / "base" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"][0] = 1
    file.write_text(json.dumps(tokenizer))
    return "base: its tokenizer cannot be opened: Exception: data did not match"


def alphas_that_are_none(world: Path) -> str:
    set_key(world / "expert" / "adapter_config.json", alpha_pattern=None)
    return "expert/adapter_config.json: does not fit its base: AttributeError"


def a_key_of_a_later_peft(world: Path) -> str:
    set_key(world / "expert" / "adapter_config.json", use_newest=True)
    return "expert/adapter_config.json: use_newest: True: peft"


def set_key(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        pad_behind_the_vocabulary,
        generation_settings_of_wrong_types,
        merges_that_are_none,
        alphas_that_are_none,
        a_key_of_a_later_peft,
    ],
)
def test_what_the_libraries_stumble_over_is_told_by_file(damage: Callable[[Path], str], world: Path) -> None:
    told = damage(world)
    refused(align_command(), world, told)
    (world / "r.yaml").write_text(
        "base: base\nexpert: expert\noutput: student\ndata: {general: general.jsonl, domain: shop.jsonl}\n"
    )
    ended = dae(["check", "r.yaml"], world, proof=False)
    assert ended.status == 2, ended
    assert told in ended.err
