"""Kinds of files that once ended in a traceback (found by benchmarks/fuzz.py): each is one message with the file."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dae_eval.contamination import training_rows
from dae_eval.folders import read_documents, read_evaluation, write_evaluation
from dae_eval.judging.asking import ReplyLog
from dae_eval.rendering.card import read_card
from evaluations import models
from safetensors.torch import save_file

from dae.cli import run
from dae.recorded_rows import recorded_sources
from kd.cache.keys import FORMAT, TeacherKey
from kd.cache.parts import check_of
from kd.cache.store import TeacherStore
from kd.config.loading import load_recipe
from kd.data.fingerprint import data_sha256
from kd.data.record_forms import record_of
from kd.data.records import declares_files
from kd.errors import UserError
from kd.models.checkpoint_files import check_safetensors
from kd.runs.provenance import read_provenance
from kd.runs.run_folder import RunFolder
from kd.stages.sft_recipe import SftRecipe

HEX = "0" * 64
KEY = TeacherKey(HEX, None, "float32", "float32")
PROVENANCE = {
    "toolkit": "dae-align",
    "stage": "sft",
    "base": {"path": "b", "fingerprint": HEX},
    "inputs": {"base": HEX},
    "data": {"train": [{"path": "rows.jsonl", "sha256": HEX}]},
}


def refused(act: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        act()


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["!!int x", "!!float x", "!!bool x", "!!timestamp x", "1" * 5000])
def test_a_value_that_does_not_fit_its_tag(value: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"seed: {value}\n")
    refused(lambda: load_recipe(SftRecipe, tmp_path / "r.yaml", {}), "r.yaml: is not valid YAML: a value does not fit")
    refused(lambda: load_recipe(SftRecipe, None, {}, [f"seed={value}"]), "cannot be read as a YAML value")


def test_a_path_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--base", "a" * 300, "--data", "b", "--output", "c"]) == 2
    assert "internal error" not in capsys.readouterr().err


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [7, {"a": 1}, True, '"x"', "3"])
def test_a_history_that_is_no_list(history: Any) -> None:
    row = {"instruction": "a", "output": "b", "history": history}
    refused(lambda: record_of(row, "rows.jsonl:1", None), r"^rows.jsonl:1: history: expected a list")


def test_a_card_of_many_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "\n" * 300_000 + "---\n")
    assert not declares_files(tmp_path / "README.md")


def test_aliases_in_the_metadata_of_a_card(tmp_path: Path) -> None:
    levels = [f"{a}: &{a} [{', '.join([f'*{b}'] * 10)}]\n" for b, a in itertools.pairwise("abcdefghijklmnop")]
    (tmp_path / "README.md").write_text("---\na: &a 1\n" + "".join(levels) + "---\n")
    refused(lambda: read_card(tmp_path / "README.md"), "README.md: the metadata .* aliases unfold")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["4", None, 4.0, [], float("nan")])
def test_a_header_whose_offsets_are_no_integers(end: Any, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, end]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(lambda: check_safetensors(tmp_path / "a.safetensors"), "truncated or invalid safetensors file")


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"inputs": None}, "inputs"), ({"data": {"train": [{"path": "x"}]}}, "data.train.0.sha256"),
        ({"data": {"train": 1}}, "data.train"), ({"processes": "2"}, "processes"), ({"base": "b"}, "base"),
    ],
)  # fmt: skip
def test_provenance_of_other_types(changed: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({**PROVENANCE, **changed}))
    for read in (read_provenance, lambda folder: training_rows([str(folder)])):
        refused(lambda read=read: read(tmp_path), f"provenance.json: {key}: ")


@pytest.mark.parametrize("recipe", [b"\xff", b"a: [", b"- 1\n", b"!!python/name:os.system x"])
def test_a_recorded_recipe_that_is_none(recipe: bytes, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    source = {"path": str(rows), "sha256": data_sha256(str(rows))}
    (tmp_path / "provenance.json").write_text(json.dumps({**PROVENANCE, "data": {"train": [source]}}))
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    refused(lambda: recorded_sources(str(tmp_path), "train"), "recipe.yaml")
    refused(lambda: training_rows([str(tmp_path)]), "recipe.yaml")


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"loss": 1}', b'{"step": "1"}', b"\xff"])
def test_metrics_that_are_none(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    refused(RunFolder(tmp_path).metrics, r"metrics.jsonl:2: is no line of metrics")
    refused(lambda: RunFolder(tmp_path).cut_metrics(1), r"metrics.jsonl:2: is no line of metrics")


@pytest.mark.parametrize("finished", [{}, {"summary": {}, "files": {"a": 1}}, {"summary": 1, "files": {}}])
def test_a_finished_run_without_its_facts(finished: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(finished))
    refused(RunFolder(tmp_path).summary, "run.json: has no summary or hashes")


# -- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"offsets": torch.tensor([0, 1, 9])}, {"offsets": torch.tensor([0, 3])}, {"offsets": torch.tensor([0, 5, 3])},
        {"digests": torch.zeros(2, 31, dtype=torch.uint8)}, {"digests": torch.zeros(2, 32)},
        {"hidden": torch.zeros(2, 4)}, {"checks": torch.zeros(3, dtype=torch.int64)}, {"checks": torch.zeros(2)},
    ],
)  # fmt: skip
def test_a_part_whose_tensors_do_not_belong_together(changed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = tmp_path / KEY.digest
    folder.mkdir()
    whole = {"hidden": torch.zeros(3, 4), "digests": torch.zeros(2, 32, dtype=torch.uint8)}
    whole["offsets"], whole["checks"] = torch.tensor([0, 1, 3]), torch.tensor([0, 0])
    for tensors, is_whole in ((whole, True), ({**whole, **changed}, False)):
        save_file(tensors, folder / "part-00000.safetensors", {"teacher": KEY.digest})
        if is_whole:
            TeacherStore(folder)
        else:
            refused(lambda: TeacherStore(folder), "do not belong together")


@pytest.mark.parametrize(
    "changed", [{"scale": "1"}, {"scale": None}, {"scale": {}}, {"vocabulary_rows": []}, {"softcap": "x"}]
)
def test_facts_of_a_teacher_of_other_types(changed: dict[str, Any], tmp_path: Path) -> None:
    facts = {"format": FORMAT, **vars(KEY), "vocabulary_rows": 8, "scale": 1.0, "softcap": None}
    head = {"weight": torch.zeros(8, 4)}
    save_file(
        {**head, "check": torch.tensor(check_of(head))}, tmp_path / "head.safetensors", {"teacher": tmp_path.name}
    )
    (tmp_path / "teacher.json").write_text(json.dumps(facts))
    assert TeacherStore(tmp_path).teacher("t", KEY, "cpu").vocabulary_rows == 8
    (tmp_path / "teacher.json").write_text(json.dumps({**facts, **changed}))
    refused(lambda: TeacherStore(tmp_path).teacher("t", KEY, "cpu"), "is not that of this teacher")


# -- judges and evaluations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [b"\xff\n", b"[]\n", b'{"key": "a"}\n', b"[" * 9999 + b"\n"])
def test_a_log_of_replies_that_is_none(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_bytes(line)
    refused(lambda: ReplyLog(tmp_path / "replies.jsonl"), r"replies.jsonl:1: not a logged reply")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:15] + b"\xff\xff\xff" + b[18:], lambda b: b"x" + b])
def test_documents_whose_packing_is_damaged(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "d.gz").write_bytes(damage(gzip.compress(b'{"id": 1}\n' * 50)))
    refused(lambda: read_documents(tmp_path / "d.gz"), "d.gz: cannot be read")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"path": 1, "fingerprint": "a"}}, {"conditions": []}, {"held_out": [{"route": "a"}]},
        {"training": [1]}, {"training_rows": 1}, {"tasks": 1},
    ],
)  # fmt: skip
def test_an_evaluation_of_other_types(changed: dict[str, Any], tmp_path: Path) -> None:
    write_evaluation(tmp_path, models()["student"])
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    refused(lambda: read_evaluation(tmp_path), "evaluation.json: ")
