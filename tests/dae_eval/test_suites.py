"""Suites: every form of writing one, paths, and all mistakes told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from dae_eval.benchmarks import load_tasks
from dae_eval.suites import TASKS, Suite, load_suite

from dae.demo import world
from kd.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = {"chat_template": False, "groups": {"domain": ["a"]}}


def write(folder: Path, suite: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def load(folder: Path, suite: dict[str, Any], *assignments: str) -> Suite:
    return load_suite(write(folder, suite), assignments)


def message(folder: Path, suite: dict[str, Any], *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, suite, *assignments)
    return str(caught.value)


def test_names_and_mappings_lists_and_groups_mean_the_same(tmp_path: Path) -> None:
    brief = {"domain": ["a", {"task": "b", "shots": 2}], "general": "c"}
    short = load(tmp_path, {"chat_template": False, "groups": brief})
    long = {
        "domain": {"kind": "domain", "tasks": [{"task": "a"}, {"task": "b", "shots": 2}]},
        "general": {"kind": "general", "tasks": [{"task": "c"}]},
    }
    assert short == load(tmp_path, {"chat_template": False, "groups": long})
    assert [(group, kind, entry.task, entry.shots) for group, kind, entry in short.entries()] == [
        ("domain", "domain", "a", None),
        ("domain", "domain", "b", 2),
        ("general", "general", "c", None),
    ]


def test_any_number_of_groups_with_names_of_one_s_own(tmp_path: Path) -> None:
    groups = {"shop, new": {"kind": "domain", "tasks": ["a"]}, "law": {"kind": "shown", "tasks": ["b"]}}
    suite = load(tmp_path, {"chat_template": False, "groups": groups})
    assert [(group, kind) for group, kind, _ in suite.entries()] == [("shop, new", "domain"), ("law", "shown")]


def test_paths_are_relative_to_the_file_and_typed_ones_to_the_working_folder(tmp_path: Path) -> None:
    written = {**SHORT, "include": "tasks", "chat_template": "chat.jinja", "held_out": {"general": "rows.jsonl"}}
    suite = load(tmp_path, written)
    assert suite.task_folder == tmp_path / "tasks"
    assert suite.chat_template == str(tmp_path / "chat.jinja")
    assert suite.held_out == {"general": (str(tmp_path / "rows.jsonl"),)}
    typed = load(tmp_path, written, "include=mine", "held_out.general=[a.jsonl, b.jsonl]")
    assert typed.task_folder == Path("mine")
    assert typed.held_out == {"general": ("a.jsonl", "b.jsonl")}
    assert typed.chat_template == suite.chat_template


def test_a_single_key_can_be_set_over_the_file(tmp_path: Path) -> None:
    written = {**SHORT, "metadata": {"world": "here"}}
    suite = load(tmp_path, written, "groups.domain.tasks.0.limit=3", "metadata.world=there")
    assert (suite.groups["domain"].tasks[0].limit, suite.metadata) == (3, {"world": "there"})


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    found = message(
        tmp_path,
        {
            "shiped": "world",
            "batch_size": 0,
            "domain": ["a"],
            "held_out": {"generel": "rows.jsonl", "domain": []},
            "groups": {
                "domain": ["a", {"task": "b", "shot": 0, "limit": 0}],
                "extra": ["c"],
                "general": {"kind": "shown", "tasks": ["a"]},
                "empty": {"kind": "shown", "tasks": []},
            },
        },
    )
    for words in (
        "chat_template: ",
        "shiped = 'world': ",
        "batch_size = 0: ",
        "domain = ('a',): ",
        "held_out.generel: ",
        "held_out.domain = (): ",
        "shot = 0: ",
        "limit = 0: ",
        "groups.extra: ",
        "groups.general.kind = 'shown': ",
        "groups.empty.tasks: ",
        "groups.general.tasks.0.task = 'a': ",
    ):
        assert words in found
    assert all(line.strip().startswith(str(tmp_path)) for line in found.splitlines()[1:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": {}}, "groups: "),
        ({"groups": None}, "groups"),
        ({"groups": {"domain": [3]}}, "domain"),
        ({"chat_template": None}, "chat_template"),
        ({"chat_template": 3}, "chat_template = 3: "),
        ({"shipped": "word"}, "shipped = 'word': "),
        ({"shipped": "world", "include": "tasks"}, "include = 'tasks': "),
        ({"max_length": 1}, "max_length = 1: "),
    ],
)
def test_a_mistake_alone(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in message(tmp_path, {**SHORT, **changes})


def test_the_demo_s_suite_asks_every_skill_and_kind_once() -> None:
    suite = load_suite(RECIPES / "demo" / "eval.yaml")
    assert suite.task_folder == TASKS / "world"
    groups = {
        name: (group.kind, {entry.task.removeprefix("world_") for entry in group.tasks})
        for name, group in suite.groups.items()
    }
    assert groups == {
        "shop, aligned": ("domain", set(world.ALIGNED_KINDS)),
        "shop, not aligned": ("shown", set(world.UNALIGNED_KINDS)),
        "general, aligned": ("general", set(world.ALIGNED_SKILLS)),
        "general, not aligned": ("shown", set(world.UNALIGNED_SKILLS)),
    }
    assert {entry.cluster_by for _, _, entry in suite.entries()} == {"choices"}


def test_the_tasks_sketched_in_the_e_commerce_suite_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = RECIPES / "eval_ecom.yaml"
    suite = load_suite(path)
    assert {kind for _, kind, _ in suite.entries()} == {"domain", "general", "shown"}
    commented = [line[2:] for line in path.read_text().splitlines() if line.startswith("#   ")]
    start = next(place for place, line in enumerate(commented) if line.startswith("  task: "))
    sketches = "\n".join(line[2:] for line in commented[start:]).replace("/data/ecom", str(tmp_path))
    rows = {
        "heldout_category": {"title": "kettle", "choices": ["pots", "cups"], "gold": 0},
        "heldout_questions": {"product": "kettle", "question": "how big?", "evidence": "2 cups", "answer": "two"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    names = [f"ecom_{name}" for name in ("category", "questions")]
    for name, sketch in zip(names, sketches.split("task: ")[1:], strict=True):
        (tmp_path / f"{name}.yaml").write_text(f"task: {sketch}")
    assert {entry.task for entry in suite.groups["domain"].tasks} == set(names)
    tasks = load_tasks(names, tmp_path, {})
    assert [len(task.eval_docs) for task in tasks.values()] == [1, 1]
    for entry in suite.groups["domain"].tasks:
        fields = set(tasks[entry.task].eval_docs[0])
        assert {entry.cluster_by, entry.leak_by} <= fields
