"""`cache`: what teachers said is read from disk, and the run is the one that it would have been."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from align_runs import HELD_OUT, assert_same_student, logits_of, merged, run
from pico import make_checkpoint, make_model
from processes import Signal
from processes import dae as run_dae
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worlds import align_command, make_rows, metrics_of

import dae.checking.plan
import kd.cache.filling
import kd.cache.plans
import kd.models.roles
from dae import cli
from kd.cache.keys import TeacherKey, batch_digests, row_digest
from kd.cache.store import TeacherStore
from kd.data.mixing import MixedRows, collate
from kd.data.token_rows import TokenRows
from kd.errors import UserError
from kd.runs.claimed_folder import LOCK
from kd.runs.lock import hold

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


def test_the_largest_probabilities_are_a_lower_bound_and_all_of_them_the_live_run(world: Path) -> None:
    settings = (CACHE, "cache.kind=topk")
    live, whole = run(output="live"), run(*settings, "cache.top_k=287", output="whole")
    assert losses(whole) == pytest.approx(losses(live), rel=1e-4, abs=1e-5)
    few = run(*settings, "cache.top_k=4", "start=base", output="few")
    at_base = run("start=base", output="at_base")
    kl = [metrics_of(folder)[0]["initial_domain_kl"] for folder in (few, at_base)]
    assert 0 < kl[0] < 0.99 * kl[1]
    part = load_file(stores_of("/expert", top_k=4) / "part-00000.safetensors")
    assert part["ids"].shape[1] == part["log_q"].shape[1] == 4 and len(part["log_tail"]) == len(part["ids"])
    torch.testing.assert_close(part["log_q"].exp().sum(1) + part["log_tail"].exp(), torch.ones(len(part["ids"])))


def test_draws_are_near_the_live_run_and_the_same_in_every_run(world: Path) -> None:
    """Of a vocabulary of 288, 144 draws."""
    settings = (CACHE, "cache.kind=sampled", *HELD_OUT)
    live, first = run(*HELD_OUT, output="live"), run(*settings, "cache.samples=144", output="first")
    assert losses(first) == pytest.approx(losses(live), rel=0.1, abs=0.05)
    shutil.rmtree("cache")
    assert losses(run(*settings, "cache.samples=144", output="second")) == losses(first)
    assert_same_student(Path("second"), first)
    run(*settings, output="few")
    part = load_file(stores_of("/expert", samples=12) / "part-00000.safetensors")
    assert part["ids"].shape == (len(part["entropy"]), 12) and part["ids"].dtype == torch.int32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cache.kind=topk", "temperature=2.0"], "temperature=2.0: `cache.kind: topk` keeps probabilities at"),
        (["cache.kind=topk", "cache.dtype=int8"], "cache.dtype=int8: logarithms of probabilities need more"),
        (["cache.top_k=8"], "cache.top_k=8: is read with `kind: topk` only"),
        (["cache.samples=8"], "cache.samples=8: is read with `kind: sampled` only"),
        (["cache.kind=sampled", "cache.dtype=int8"], "cache.dtype=int8: samples are integers: remove it"),
        (["cache.kind=sampled", "divergence=jsd"], "divergence=jsd: samples are right on average for forward_kl only"),
        (["cache.kind=logits"], "cache.kind=logits: expected hidden, topk or sampled"),
        (
            ["cache.path=student/cache"],
            "cache.path=student/cache: lies in output (student), which one run owns: move it",
        ),
    ],
)
def test_mistakes_in_the_recipe_are_told(
    world: Path, settings: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(align_command(CACHE, *settings)) == 2
    assert words in capsys.readouterr().err
    assert not Path("cache").exists()


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


def stores_of(role: str, top_k: int | None = None, samples: int | None = None) -> Path:
    for file in Path("cache").glob("*/teacher.json"):
        facts = json.loads(file.read_text())
        if facts["teacher"].endswith(role) and (facts["top_k"], facts["samples"]) == (top_k, samples):
            return file.parent
    raise AssertionError(role)


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
    shutil.copy(theirs / "head.safetensors", ours / "head.safetensors")
    assert fill() == 2
    assert f"{ours}/head.safetensors: belongs to another teacher ({theirs.name})" in capsys.readouterr().err
    (ours / "teacher.json").write_text("{}")
    assert fill() == 2
    assert f"{ours}/teacher.json: is not that of this teacher" in capsys.readouterr().err


def edited(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The same file with other values, and the metadata it had."""
    with safe_open(file, framework="pt") as part:
        metadata = part.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("kind", "file", "change", "words"),
    [
        ("hidden", "part-00000", lambda part: part["hidden"][3].mul_(1.01), "is damaged"),
        (
            "hidden",
            "part-00000",
            lambda part: part.update(hidden=part["hidden"][:, :8].clone()),
            "that of other answers",
        ),
        ("hidden", "part-00000", lambda part: part.update(other=part.pop("hidden")), "not hidden answers"),
        ("hidden", "part-00000", lambda part: part.update(digests=part["digests"].flip(0)), "is damaged"),
        ("hidden", "head", lambda head: head["weight"][0].add_(1), "is damaged"),
        ("hidden", "head", lambda head: head.update(weight=head["weight"][:100].clone()), "that of other answers"),
        ("topk", "part-00000", lambda part: part["ids"].fill_(100_000), "is damaged"),
        ("topk", "part-00000", lambda part: part["log_q"].fill_(2.0), "is damaged"),
        ("topk", "part-00000", lambda part: part.pop("log_tail"), "not topk answers"),
        ("sampled", "part-00000", lambda part: part["entropy"].zero_(), "is damaged"),
    ],
)
def test_values_that_are_not_those_that_were_written_are_refused_by_name(
    kind: str, file: str, change: Any, words: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [CACHE, f"cache.kind={kind}", *(["cache.top_k=4"] if kind == "topk" else [])]
    assert cli.run(["cache", *align_command(*settings)]) == 0
    shape = {"topk": (4, None), "sampled": (None, 12)}.get(kind, (None, None))
    damaged = stores_of("/expert", *shape) / f"{file}.safetensors"
    edited(damaged, change)
    assert cli.run(align_command(*settings)) == 2
    error = capsys.readouterr().err
    assert (f"{damaged}: " in error or f"{damaged.parent}/head.safetensors: " in error) and words in error
    assert "remove this folder" in error


def test_tokens_beyond_the_vocabulary_are_refused_even_with_a_right_check(tmp_path: Path) -> None:
    key = TeacherKey("0" * 64, None, "float32", "float32", top_k=2)
    folder = tmp_path / key.digest
    folder.mkdir()
    store = TeacherStore(folder)
    answers = {
        "ids": torch.tensor([[1, 99]], dtype=torch.int32),
        "log_q": torch.zeros(1, 2),
        "log_tail": torch.zeros(1),
    }
    row = np.array([5, 6], np.int32), np.array([False, True])
    store.add([row_digest(*row)], [answers])
    store.write_teacher(None, key, "teacher", 8)
    teacher = TeacherStore(folder).teacher("t", key, "cpu")
    batch = {"input_ids": torch.tensor([row[0].tolist()]), "response_mask": torch.tensor([row[1].tolist()])}
    batch["attention_mask"] = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(UserError, match="token ids above the vocabulary of 8 rows"):
        teacher.logits(batch)


def test_probabilities_over_tokens_that_the_models_lack_are_refused_before_anything_is_answered(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(world / "wide", seed=6, vocab_size=320)
    for command in (["check"], ["cache"], []):
        assert cli.run([*command, *align_command(CACHE, "cache.kind=topk", "expert.domain=wide", "start=base")]) == 2
        assert "the probabilities of expert.domain are over 320 vocabulary rows" in capsys.readouterr().err
    assert not Path("cache").exists()


def test_more_probabilities_than_tokens_take_no_more_room(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = align_command(CACHE, "cache.kind=topk", "cache.top_k=1000000000")
    assert cli.run(["check", *settings]) == 0
    vocabulary = json.loads(Path("base/config.json").read_text())["vocab_size"]
    assert f" {8 * (vocabulary - 1) + 4:,} " in capsys.readouterr().out
    assert cli.run(["cache", *settings]) == 0


def test_a_complete_cache_need_not_be_writable(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill() == 0
    monkeypatch.setattr(dae.checking.plan.os, "access", lambda place, _mode: Path(place).name != "cache")
    assert cli.run(["check", *align_command(CACHE)]) == 0
    make_rows(world / "more.jsonl", seed=9, rows=30)
    assert cli.run(["check", *align_command(CACHE, "data.domain.0.path=more.jsonl")]) == 2
    assert "cache.path: cache: no permission to write" in capsys.readouterr().err


def test_others_may_read_a_cache_and_a_student_as_the_umask_says(world: Path) -> None:
    assert fill() == 0
    student = run(CACHE)
    plain = (student / "run.json").stat().st_mode
    files = [*stores_of("/expert").glob("*.safetensors"), *student.rglob("*.safetensors")]
    assert len(files) >= 3 and {file.stat().st_mode for file in files} == {plain}


def test_what_was_removed_is_answered_again_and_nothing_else(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd.cache.filling, "PART_BYTES", 4096)
    assert fill() == 0
    store = stores_of("/base")
    whole = bytes_of(store)
    assert len(whole) >= 5
    (store / "part-00001.safetensors").unlink()
    (store / "teacher.json").unlink()
    assert fill() == 0
    left = {name: content for name, content in whole.items() if name != "part-00001.safetensors"}
    assert left.items() <= bytes_of(store).items() and len(bytes_of(store)) == len(whole)
    assert run(CACHE).exists()


def test_a_disk_too_small_is_refused_before_anything_is_answered(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(kd.cache.plans.shutil, "disk_usage", lambda _path: usage(1, 1, 1000))
    assert fill() == 4
    assert "the cache needs" in capsys.readouterr().err
    assert cli.run(["check", *align_command(CACHE)]) == 4
    assert not list(Path(".").glob("cache/*/part-*"))


def test_the_path_is_looked_at_before_anything_else(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cache").write_text("mine")
    for command in (["cache"], ["check"], []):
        assert cli.run([*command, *align_command(CACHE)]) == 2
        assert "cache.path: cache: " in capsys.readouterr().err
    assert Path("cache").read_text() == "mine"


def test_a_cache_can_be_moved_between_stop_and_resumption(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (run(CACHE) / "adapter_model.safetensors").stat().st_mtime_ns
    Path("cache").rename("moved")
    assert cli.run(align_command("cache.path=moved")) == 0
    assert Path("student/adapter_model.safetensors").stat().st_mtime_ns == written
    assert cli.run(align_command("cache.path=moved", "cache.dtype=bfloat16")) == 2
    assert "cache.dtype" in capsys.readouterr().err


def test_next_token_loss_asks_only_what_is_measured(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill("lambda=0", "train.max_steps=1000") == 0
    assert "reference: 60 of 60 rows added" in capsys.readouterr().out
    assert fill("lambda=0", "budget.general=0.1", "train.max_steps=1000") == 0
    assert "reference: 60 of 120 rows added" in capsys.readouterr().out


def test_two_roles_of_one_teacher_share_a_store(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_rows(Path("more.jsonl"), 7, 5)
    words = ["--base", "base", "--expert", "a=expert", "--expert", "b=expert", "--domain-data", "a=shop.jsonl"]
    words += ["--domain-data", "b=shop.jsonl", "--general-data", "general.jsonl", CACHE, "train.max_steps=1000"]
    assert cli.run(["cache", "align", *words]) == 0
    out = capsys.readouterr().out
    assert "expert.a: 120 of 120 rows added" in out and "expert.b: all 120 rows were there" in out
    assert len(list(Path("cache").iterdir())) == 2


def test_a_store_that_another_run_fills_is_waited_for(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fill() == 0
    store = stores_of("/expert")
    (store / "part-00000.safetensors").rename("theirs")
    other = ExitStack()
    other.enter_context(hold(store / LOCK, "store"))

    def goes_by(_seconds: float) -> None:
        Path("theirs").rename(store / "part-00000.safetensors")  # the other one is done
        other.close()

    monkeypatch.setattr(kd.cache.filling.time, "sleep", goes_by)
    before = (Path("theirs")).read_bytes()
    with caplog.at_level("INFO", logger="dae"):
        assert fill() == 0
    assert (store / "part-00000.safetensors").read_bytes() == before
    assert len(list(store.glob("part-*"))) == 1


def test_several_processes_do_not_fill(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = namedtuple("several", "num_processes")(2)
    monkeypatch.setattr("kd.stages.caching.processes", lambda: several)
    assert fill() == 2
    err = capsys.readouterr().err
    assert "several processes cannot fill a cache together" in err and "train.gradient_accumulation_steps=2" in err


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


def test_a_recipe_file_can_be_given(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(
        "base: base\nexpert: expert\ndata: {domain: shop.jsonl, general: general.jsonl}\ncache: {path: cache}\n"
    )
    assert cli.run(["cache", "recipe.yaml", "train.max_steps=2"]) == 0
    assert len(list(Path("cache").glob("*/part-00000.safetensors"))) == 2
    Path("sft.yaml").write_text("base: base\ndata: {train: shop.jsonl}\n")
    assert cli.run(["cache", "sft.yaml"]) == 2
    assert "sft.yaml: is a recipe of `dae sft`: expected align or distill" in capsys.readouterr().err


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_is_found_in_any_batch(packing: bool) -> None:
    rows = TokenRows.from_rows([([5, 6, 7, 8], [False, False, True, True]), ([5, 6, 9], [False, True, False])])
    batch = collate([MixedRows([rows], [0])[(0, row)] for row in (1, 0)], 0, packing)
    assert batch_digests(batch) == [row_digest(*rows.arrays(row)) for row in (1, 0)]
    assert row_digest(*rows.arrays(0)) != row_digest(rows.arrays(0)[0], ~rows.arrays(0)[1])


def test_a_row_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a row of this run is not in the cache"):
        TeacherStore(tmp_path).answers([b"0" * 32])


@pytest.mark.parametrize(("kind", "longest", "is_refused"), [("longrope", 40, True), ("longrope", 16, False)])
def test_a_teacher_whose_answers_depend_on_the_batch_is_refused(kind: str, longest: int, is_refused: bool) -> None:
    model = make_model("llama")
    model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 16}
    with pytest.raises(UserError, match="rope_type: longrope") if is_refused else nullcontext():
        kd.cache.filling.refuse_batch_dependent(kd.models.roles.Role("expert", model, None), longest)


def test_killed_while_filling_and_while_training_it_ends_as_if_it_had_not_been(world: Path) -> None:
    whole = run(CACHE, "train.max_steps=6", output="whole")
    kept = bytes_of(Path("cache"))
    shutil.rmtree("cache")
    command = align_command(CACHE, "train.max_steps=6", output="killed")
    in_filling = Signal("kd.cache.store:TeacherStore.add", 2, signal.SIGKILL)
    in_training = Signal("kd.training.trainer:RoutedTrainer.training_step", 4, signal.SIGKILL)
    for one in (in_filling, in_training):
        assert run_dae(command, world, signals=[one]).status == -signal.SIGKILL
    assert run_dae(command, world).status == 0
    assert bytes_of(Path("cache")) == kept
    assert losses(Path("killed")) == losses(whole)
    assert torch.equal(logits_of(Path("killed")), logits_of(whole))
