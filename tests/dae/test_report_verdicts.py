"""`dae report` on models whose differences are known: none at all, and one skill destroyed."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path

import pytest
import torch
from dae_eval.folders import read_evaluation
from pico import make_checkpoint, make_tokenizer
from pico_tasks import make_suite, make_tasks
from processes import dae
from transformers import AutoModelForCausalLM

DOCUMENTS = 80
TASKS = {"shop": string.ascii_uppercase, "general": string.ascii_lowercase}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that answers everything right (what it chooses is what is right), a copy, and a copy that is damaged."""
    folder = tmp_path_factory.mktemp("verdicts") / "world"
    make_checkpoint(folder / "base")
    tasks = make_tasks(folder / "tasks")
    for name, letters in TASKS.items():
        make_documents(tasks / f"{name}.jsonl", letters)
    groups = {"domain": ["shop_choose"], "general": ["general_choose"]}
    make_suite(folder / "suite.yaml", tasks, groups=groups)
    make_suite(folder / "general.yaml", tasks, groups={"general": ["shop_choose", "general_choose"]})
    asked = dae(["eval", "tasks", "--model", "base", "--suite", "suite.yaml", "--output", "first"], folder)
    assert asked.status == 0, asked.err
    for name in TASKS:
        answers = [document.answer for document in read_evaluation(folder / "first").tasks[f"{name}_choose"].documents]
        take_as_right(tasks / f"{name}.jsonl", answers)
    shutil.copytree(folder / "base", folder / "copy")
    damage(folder / "base", folder / "damaged")
    return folder


def make_documents(path: Path, letters: str) -> None:
    """Four words of four letters to choose from, so that no choice is better for being short."""
    pick = random.Random(path.name)
    rows = [
        {
            "question": f"Question {number}:",
            "choices": ["".join(pick.choices(letters, k=4)) for _ in range(4)],
            "gold": 0,
        }
        for number in range(DOCUMENTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def take_as_right(path: Path, answers: list[str]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        row["gold"] = [choice.strip() for choice in row["choices"]].index(answer.strip())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def damage(base: Path, folder: Path) -> None:
    """Capital letters, of which only shop words are made, change places; no other token's probability changes."""
    shutil.copytree(base, folder)
    model, vocabulary = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer().get_vocab()
    capitals = [number for token, number in vocabulary.items() if any("A" <= letter <= "Z" for letter in token)]
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[capitals] = weight[capitals][torch.randperm(len(capitals), generator=torch.manual_seed(3))]
    model.save_pretrained(folder)


def report_of(world: Path, name: str) -> dict:
    return json.loads((world / name / "report.json").read_text())


def test_identical_models_differ_in_nothing(world: Path) -> None:
    models = ["--base", "base", "--expert", "base", "--student", "copy", "--suite", "suite.yaml"]
    ended = dae(["report", *models, "--output", "same"], world)
    assert (ended.status, "gap closed undefined" in ended.out) == (1, True), ended.err
    report = report_of(world, "same")
    assert (report["student"]["retention"]["word"], report["student"]["gap"]["closed"]) == ("PASS", None)
    assert report["word"] == "INCONCLUSIVE"  # an undefined gap cannot pass
    for task in report["tasks"]:
        assert task["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert set(task["scores"].values()) == {1.0}
    assert report["flips"] == []


def test_a_damaged_copy_fails_with_the_damaged_task_first(world: Path) -> None:
    models = ["--reference", "base", "--student", "damaged", "--suite", "general.yaml", "--retention-only"]
    ended = dae(["report", *models, "--output", "worse"], world)
    assert ended.status == 1, ended.err
    report = report_of(world, "worse")
    assert report["word"] == report["student"]["retention"]["word"] == "FAIL"
    first, second = report["tasks"]
    assert (first["task"], second["task"]) == ("shop_choose", "general_choose")
    assert first["difference"]["high"] < -0.1 and first["p_holm"] < 0.001
    assert second["difference"]["value"] == 0
    assert report["flips"][0]["task"] == "shop_choose"
    assert report["flips"][0]["scores"] == {"reference": 1.0, "student": 0.0}
