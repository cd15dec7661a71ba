"""Checkpoints whose JSON files hold nonsense: told as the user's mistake, or harmless; never a fault of ours.

`DAE_FUZZ_EXAMPLES=3000 pytest tests/dae/test_fuzzed_checkpoints.py` looks longer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import make_checkpoint
from stages import build_roles, plan_of
from worlds import GENERAL_WORDS, make_adapter, make_rows

from dae.exit_status import status_of
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.models.roles import LoadSettings, check_head
from kd.stages.sft_recipe import SftRecipe

EXAMPLES = int(os.environ.get("DAE_FUZZ_EXAMPLES", "60"))
REMOVED = "a value that stands for no key at all"
VALUES: list[Any] = [
    REMOVED, None, True, False, -1, 0, 1, 2, 3, 7, 288, 65536, 1.5, -0.5, float("nan"), "", "x", "auto", "sdpa",
    [], [0], ["x"], [None], {}, {"x": 1}, {"rope_type": "x"}, "q_proj", ["lm_head"], [[0, 1]], "<s>", "llama", "gpt2",
]  # fmt: skip
# Keys that files of other releases have, beside those that are there.
MORE = {
    "config.json": ["rope_scaling", "sliding_window", "layer_types", "quantization_config", "auto_map", "head_dim"],
    "adapter_config.json": ["new_in_a_later_release", "runtime_config", "target_parameters", "auto_mapping"],
    "tokenizer_config.json": ["chat_template", "auto_map", "added_tokens_decoder", "extra_special_tokens"],
    "tokenizer.json": ["truncation", "padding"],
}
FILES = [
    ("base", "config.json"),
    ("base", "generation_config.json"),
    ("base", "tokenizer_config.json"),
    ("base", "tokenizer.json"),
    ("expert", "adapter_config.json"),
    ("other", "config.json"),
    ("other", "tokenizer_config.json"),
    ("other", "tokenizer.json"),
]
Site = tuple[str, str, tuple[str | int, ...]]


def sites_in(value: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place of a JSON document; of long lists and mappings, a few."""
    if way:
        yield way
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, part in [*inner[:30], *inner[-2:]]:
        yield from sites_in(part, (*way, key))


def mutated(document: Any, way: tuple[str | int, ...], value: Any) -> Any:
    """The document with another value at one place."""
    copy = json.loads(json.dumps(document))
    node = copy
    for step in way[:-1]:
        node = node[step]
    if value is REMOVED:
        if isinstance(node, list) or way[-1] in node:
            del node[way[-1]]
    else:
        node[way[-1]] = value
    return copy


def make_small_world(folder: Path, family: str = "llama") -> Path:
    """A base, an adapter on it, and a full checkpoint beside it, with few rows."""
    folder.mkdir(parents=True)
    make_adapter(folder / "expert", make_checkpoint(folder / "base", family))
    make_checkpoint(folder / "other", family, seed=3)
    make_rows(folder / "rows.jsonl", 0, 12, GENERAL_WORDS)
    return folder


def sites_of(world: Path) -> list[Site]:
    """All places of all files that may be changed."""
    sites: list[Site] = []
    for owner, name in FILES:
        document = json.loads((world / owner / name).read_text())
        ways = dict.fromkeys([*sites_in(document), *((key,) for key in MORE.get(name, ()))])
        sites += [(owner, name, way) for way in ways]
    return sites


def outcome(world: Path, expert: str, *, start: bool = False) -> tuple[int, str]:
    """Status and message of `dae check` of an align recipe, then of sft; start: of the beginning of the run, too."""
    rows = [{"path": str(world / "rows.jsonl")}]
    flags = {"base": str(world / "base"), "output": str(world / "out"), "train.max_steps": 1}
    try:
        align = load_recipe(
            AlignRecipe, None, {**flags, "expert": str(world / expert), "data.general": rows, "data.domain": rows}, []
        )
        plan_of(align)
        plan_of(load_recipe(SftRecipe, None, {**flags, "data.train": rows}, []))
        if start:
            roles = build_roles(align, LoadSettings(torch.float32))
            for role in roles.all:
                check_head(role, roles.vocabulary_rows)
    except BaseException as error:  # tokenizers' panics are no Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        status, message = status_of(error)
        return status, message or f"{type(error).__name__}: {error}"
    return 0, ""


def try_case(world: Path, site: Site, value: Any, *, start: bool = False) -> tuple[int, str]:
    """The outcome with one value changed; afterwards the file is as it was."""
    owner, name, way = site
    file = world / owner / name
    before = file.read_text()
    try:
        file.write_text(json.dumps(mutated(json.loads(before), way, value)))
        return outcome(world, "other" if owner == "other" else "expert", start=start)
    finally:
        file.write_text(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_world(tmp_path_factory.mktemp("fuzzed") / "world", request.param)


def test_nonsense_in_a_checkpoint_is_never_our_fault(world: Path) -> None:
    sites, seen = sites_of(world), Counter[int]()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(site=st.sampled_from(sites), value=st.sampled_from(VALUES))
    def each(site: Site, value: Any) -> None:
        status, message = try_case(world, site, value)
        seen[status] += 1
        assert status in (0, 2), f"{site} = {value!r}: {message}"
        if status == 2:
            assert str(world) in message

    each()
    assert outcome(world, "expert") == (0, "")
    shutil.rmtree(world / "out", ignore_errors=True)
    assert seen[2], seen
