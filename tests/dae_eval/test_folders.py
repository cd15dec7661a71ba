"""Folders of evaluations: read back as they were, never half, never another model's."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dae_eval import folders
from dae_eval.folders import (
    evaluation_folder,
    pack_documents,
    read_documents,
    read_evaluation,
    refuse_other_model,
    write_evaluation,
)
from dae_eval.results import Document, Evaluation, HeldOutLoss, ModelFacts, TaskResult, TrainingRows
from hypothesis import given
from hypothesis import strategies as st

from kd.errors import UserError

DOCUMENTS = (
    Document(0, "aa", 1.0, "one\u2028line\x85 still", "ja \U0001f642", '<b>"no"</b>\n\r', "c0", True, "writing"),
    Document(1, "bb", 0.25, "", "", "", "c0"),
)
TASK = TaskResult("shop/price", "shop, all", "domain", "acc", "1", {"shots": 0}, DOCUMENTS, 0.25, None)
MODEL = ModelFacts("runs/student", "f" * 64, "base", "b" * 64, {"base": "b" * 64, "expert.shop": "e" * 64})
EVALUATION = Evaluation(
    model=MODEL,
    tasks={
        "shop/price": TASK,
        "size": replace(TASK, task="size", kind="general", documents=DOCUMENTS[:1], majority=0.5),
    },
    conditions={"template": {"sha256": None}, "batch_size": 4},
    held_out=(HeldOutLoss("general", "rows.jsonl", "d" * 64, 10, 1.5, {"reference": 0.25}),),
    training_rows=(TrainingRows("train.jsonl", "a" * 64, "gone"),),
    training=({"step": 1, "loss": 2.0},),
)


def test_an_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", EVALUATION)
    assert read_evaluation(tmp_path / "a") == EVALUATION


def test_the_same_evaluation_gives_the_same_bytes_and_is_not_written_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, EVALUATION, {"size": "0" * 64})
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3 and any("size-" + "0" * 32 in str(name) for name in contents[0])
    before = {file: file.stat().st_ino for file in (tmp_path / "a").rglob("*")}
    write_evaluation(tmp_path / "a", EVALUATION, {"size": "0" * 64})
    assert {file: file.stat().st_ino for file in (tmp_path / "a").rglob("*")} == before


texts = st.text(max_size=8)


scores = st.sampled_from([0.0, 0.1, 1.0])
documents_to_write = st.lists(st.builds(Document, st.integers(0, 9), texts, scores, texts, texts, texts, texts))


@given(documents_to_write)
def test_whatever_a_model_writes_survives(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    path = tmp_path_factory.getbasetemp() / "documents.jsonl.gz"
    path.write_bytes(pack_documents(documents))
    assert read_documents(path) == tuple(documents)
    assert [json.loads(line)["answer"] for line in gzip.decompress(path.read_bytes()).split(b"\n") if line] == [
        document.answer for document in documents
    ]


def test_new_documents_never_stand_beside_an_old_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(tmp_path, EVALUATION)
    other = replace(TASK, task="size", documents=(replace(DOCUMENTS[1], seen=True),))
    changed = replace(EVALUATION, tasks={"size": other})

    def killed(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_bytes_durably", killed)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path, changed)
    with pytest.raises(UserError, match="not finished"):
        read_evaluation(tmp_path)
    monkeypatch.undo()
    write_evaluation(tmp_path, changed)
    assert read_evaluation(tmp_path) == changed


def test_what_is_no_finished_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: not an evaluation"):
        read_evaluation(tmp_path / "nowhere")
    write_evaluation(tmp_path, EVALUATION)
    file = next(iter(sorted((tmp_path / "documents").iterdir())))
    whole = file.read_bytes()
    file.write_bytes(pack_documents(DOCUMENTS[1:]))
    with pytest.raises(UserError, match=r"shop-price-.*: has changed"):
        read_evaluation(tmp_path)
    file.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cannot be read"):
        read_documents(file)
    file.unlink()
    with pytest.raises(UserError, match=r"jsonl\.gz: not found"):
        read_evaluation(tmp_path)
    for text, words in (("{}", "not a dae-align evaluation"), ("[", "cannot be read")):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"format": "dae-align evaluation", "version": 1, "model": {}}))
    with pytest.raises(UserError, match=r"evaluation\.json: incomplete"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, 5.0, -0.1, None, "1", True])
def test_scores_off_their_range_are_refused_by_document(tmp_path: Path, score: Any) -> None:
    documents = (DOCUMENTS[0], replace(DOCUMENTS[1], score=score))
    write_evaluation(tmp_path, replace(EVALUATION, tasks={TASK.task: replace(TASK, documents=documents)}))
    with pytest.raises(UserError, match=f"task {TASK.task}, document {DOCUMENTS[1].id}: score: "):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("unit", "foo"), ("kind", "General"), ("share", 0), ("share", 50), ("share", math.nan), ("metric", None),
     ("settings", None), ("chance", "x"), ("unit", "bits per byte")],
)  # fmt: skip
def test_facts_of_a_task_that_are_not_what_was_written_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    write_evaluation(tmp_path, EVALUATION)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    content["tasks"][0][key] = value
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"evaluation.json: task {TASK.task}: "):
        read_evaluation(tmp_path)


def test_a_task_listed_twice_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, EVALUATION)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    content["tasks"] *= 2
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="duplicate task"):
        read_evaluation(tmp_path)


def test_a_loss_may_be_above_one(tmp_path: Path) -> None:
    loss = replace(TASK, unit="bits per byte", kind="shown", documents=(replace(DOCUMENTS[0], score=3.2, weight=40.0),))
    found = replace(EVALUATION, tasks={TASK.task: loss})
    write_evaluation(tmp_path, found)
    assert read_evaluation(tmp_path) == found


def test_another_model_s_folder_is_refused(tmp_path: Path) -> None:
    write_evaluation(tmp_path, EVALUATION)
    evaluation_folder(tmp_path).refuse_foreign_files()
    refuse_other_model(tmp_path, replace(MODEL, path="moved"))
    with pytest.raises(UserError, match=r'model.path: "runs/student" -> "other"'):
        refuse_other_model(tmp_path, replace(MODEL, path="other", fingerprint="1" * 64))
    with pytest.raises(UserError, match=r"current\):\n  model.base_fingerprint: "):
        refuse_other_model(tmp_path, replace(MODEL, base_fingerprint="1" * 64))
