"""`cache`: what teachers said is read from disk, and the run is the one that it would have been."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, logits_of, merged, run
from safetensors.torch import load_file, save_file
from worlds import align_command, make_rows, metrics_of

import kd.cache.filling
import kd.models.roles
from dae import cli
from kd.cache.store import TeacherStore, batch_digests, row_digest
from kd.data.mixing import MixedRows, collate
from kd.data.token_rows import TokenRows
from kd.errors import UserError

CACHE = "cache.path=cache"
NO_MORE_THAN = 1e-6  # padding alone moves a hidden state by 7e-7


def losses(folder: Path) -> list[float]:
    """Every loss and divergence of a run, in order."""
    return [
        value
        for line in metrics_of(folder)
        for key, value in line.items()
        if isinstance(value, float) and key.split("_")[-1].split("/")[-1] in ("loss", "kl", "ntp")
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(*more: str) -> int:
    return cli.run(["cache", *align_command(CACHE, *more)])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((*HELD_OUT, "train.gradient_accumulation_steps=2"), id="eval_set"),
        pytest.param(
            ("start=base", "data.packing=true", "lambda=0.5", "divergence=jsd", "temperature=2.0"), id="packed"
        ),
    ],
)
def test_a_cached_run_has_the_losses_of_a_live_one(world: Path, settings: Sequence[str]) -> None:
    live, first = run(*settings, output="live"), run(*settings, CACHE, output="first")
    second = run(*settings, CACHE, output="second")
    assert len(losses(live)) == len(losses(first)) > 20
    assert losses(first) == pytest.approx(losses(live), rel=0, abs=NO_MORE_THAN)
    assert losses(second) == losses(first)
    assert torch.equal(logits_of(second), logits_of(first))
    assert_same_student(first, live)


def test_where_all_weights_train_no_teacher_is_loaded(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = str(merged("expert", "whole"))
    settings = ("lora=null", "start=base", "train.learning_rate=1e-3")

    def whole(*more: str, output: str) -> Path:
        words = align_command(*settings, *more, output=output)
        assert cli.run([expert if word == "expert" else word for word in words if word != "lora.rank=4"]) == 0
        return Path(output)

    live = whole(output="live")
    first = whole(CACHE, output="first")
    loaded: list[str] = []
    original = kd.models.roles.load_model

    def counted(source: Any, *more: Any) -> Any:
        loaded.append(source.path)
        return original(source, *more)

    monkeypatch.setattr(kd.models.roles, "load_model", counted)
    monkeypatch.setattr("dae.alignment.load_model", counted)
    second = whole(CACHE, output="second")
    assert loaded == ["base"]  # the student
    assert losses(first) == losses(second)
    assert losses(first)[:9] == pytest.approx(losses(live)[:9], rel=0, abs=NO_MORE_THAN)  # the first steps
    # Later: embeddings of tokens that only general rows have. At first the student is the reference, so their gradient
    # is 0 live and rounding here, and Adam's steps are as large for either.
    assert losses(first) == pytest.approx(losses(live), rel=0, abs=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("int8", 2e-2)])
def test_smaller_dtypes_are_near(world: Path, dtype: str, tolerance: float) -> None:
    live, cached = run(output="live"), run(CACHE, f"cache.dtype={dtype}", output="cached")
    assert losses(cached) == pytest.approx(losses(live), rel=tolerance, abs=1e-3)
    assert losses(cached) != losses(live)
    part = load_file(next(Path("cache").glob("*/part-00000.safetensors")))
    assert str(part["hidden"].dtype) == f"torch.{dtype}"


def test_a_killed_fill_goes_on_to_the_same_bytes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.cache.filling, "PART_BYTES", 4096)
    assert fill() == 0
    whole = bytes_of(Path("cache"))
    shutil.rmtree("cache")
    original, calls = TeacherStore.add, [0]

    def killed_in_the_third_part(store: TeacherStore, *given: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            (store.folder / ".tmp-part-00002.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        original(store, *given)

    monkeypatch.setattr(TeacherStore, "add", killed_in_the_third_part)
    assert fill() == 130
    assert 0 < len(bytes_of(Path("cache"))) < len(whole)
    monkeypatch.setattr(TeacherStore, "add", original)
    assert fill() == 0
    assert bytes_of(Path("cache")) == whole
    assert len(whole) > 6


def test_only_new_rows_are_answered(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill("train.max_steps=1000") == 0
    before = bytes_of(Path("cache"))
    make_rows(Path("more.jsonl"), 7, 5)
    with Path("shop.jsonl").open("a") as file:
        file.write(Path("more.jsonl").read_text())
    capsys.readouterr()
    assert fill("train.max_steps=1000", "seed=3", "data.domain.0.share=0.9", "data.general.0.share=0.1") == 0
    out = capsys.readouterr().out
    assert "expert.domain: 5 of 125 rows added" in out
    assert "reference: all 120 rows were there" in out
    after = bytes_of(Path("cache"))
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_another_teacher_has_a_store_of_its_own(world: Path) -> None:
    assert fill() == 0
    stores = set(Path("cache").iterdir())
    weights = load_file("expert/adapter_model.safetensors")
    save_file({name: 0.5 * value for name, value in weights.items()}, "expert/adapter_model.safetensors")
    assert fill() == 0
    assert len(set(Path("cache").iterdir()) - stores) == 1


def stores_of(role: str) -> Path:
    return next(
        p.parent for p in Path("cache").glob("*/teacher.json") if json.loads(p.read_text())["teacher"].endswith(role)
    )


def test_foreign_and_damaged_parts_are_refused_by_name(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill() == 0
    ours, theirs = stores_of("/base"), stores_of("/expert")
    shutil.copy(theirs / "part-00000.safetensors", ours / "part-00000.safetensors")
    assert cli.run(align_command(CACHE)) == 2
    assert f"{ours}/part-00000.safetensors: belongs to another teacher ({theirs.name})" in capsys.readouterr().err
    (ours / "part-00000.safetensors").write_bytes(b"torn")
    assert fill() == 2
    assert f"{ours}/part-00000.safetensors: cannot be read" in capsys.readouterr().err
    shutil.rmtree(ours)
    assert fill() == 0


def test_a_disk_too_small_is_refused_before_anything_is_answered(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(kd.cache.filling.shutil, "disk_usage", lambda _path: usage(1, 1, 1000))
    assert fill() == 4
    assert "the cache needs" in capsys.readouterr().err
    assert cli.run(["check", *align_command(CACHE)]) == 4
    assert not list(Path(".").glob("cache/*/part-*"))


def test_several_processes_do_not_fill(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = namedtuple("several", "num_processes")(2)
    monkeypatch.setattr("kd.stages.caching.processes", lambda: several)
    assert fill() == 2
    assert "several processes cannot fill a cache together" in capsys.readouterr().err


def test_check_says_what_is_left_to_answer(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = str(merged("expert", "whole"))
    words = [expert if word == "expert" else word for word in align_command(CACHE, "start=base")]

    def shown() -> str:
        capsys.readouterr()
        assert cli.run(["check", *words]) == 0
        return capsys.readouterr().out

    before = shown()
    assert cli.run(["cache", *words]) == 0
    after = shown()
    assert [line.split()[1:3] for line in before.splitlines() if line.startswith("expert.domain ")] == [["65", "65"]]
    assert [line.split()[1:3] for line in after.splitlines() if line.startswith("expert.domain ")] == [["65", "0"]]
    held = after.split("memory on")[1].split("disk, at most")[0]
    assert "base: student, reference" in held and "expert.domain" not in held


def test_without_a_path_the_command_says_so(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["cache", *align_command()]) == 2
    assert "cache: is required: add `cache: {path: DIR}`" in capsys.readouterr().err


def test_a_recipe_file_can_be_given(world: Path) -> None:
    Path("recipe.yaml").write_text(
        "base: base\nexpert: expert\ndata: {domain: shop.jsonl, general: general.jsonl}\ncache: {path: cache}\n"
    )
    assert cli.run(["cache", "recipe.yaml", "train.max_steps=2"]) == 0
    assert len(list(Path("cache").glob("*/part-00000.safetensors"))) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_is_found_in_any_batch(packing: bool) -> None:
    rows = TokenRows.from_rows([([5, 6, 7, 8], [False, False, True, True]), ([5, 6, 9], [False, True, False])])
    batch = collate([MixedRows([rows], [0])[(0, row)] for row in (1, 0)], 0, packing)
    assert batch_digests(batch) == [row_digest(*rows.arrays(row)) for row in (1, 0)]
    assert row_digest(*rows.arrays(0)) != row_digest(rows.arrays(0)[0], ~rows.arrays(0)[1])


def test_a_row_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a row of this run is not in the cache"):
        TeacherStore(tmp_path).hidden_states([b"0" * 32])
