"""Tasks of a dozen documents each, and suites over them: choosing, continuing and writing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml
from worlds import GENERAL_WORDS, SHOP_WORDS

READER = '''
import json
from pathlib import Path

import datasets


def load(rows, **_):
    """The rows of `rows`, as the splits test and shots."""
    lines = Path(rows).read_text().splitlines()
    documents = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return {"test": documents, "shots": documents}


def surprise(_document, results):
    """-log p, no score."""
    return {"nats": -results[0][0]}


def average(values):
    return sum(values) / len(values)


def best(values):
    return max(values)
'''
COMMON = {"custom_dataset": "!function", "test_split": "test", "fewshot_split": "shots", "metadata": {"version": 3}}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "go_on": {
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


def make_documents(path: Path, words: list[str], seed: int, rows: int = 12) -> Path:
    """Questions with four choices, an answer, and a source that three in a row share."""
    pick = random.Random(seed)
    lines = []
    for row in range(rows):
        choices = [" ".join(pick.sample(words, pick.randint(1, 3))) for _ in range(4)]
        gold = pick.randrange(4)
        question = "What comes after " + " ".join(pick.sample(words, 3)) + "?"
        document = {"question": question, "choices": choices, "gold": gold, "answer": choices[gold]}
        lines.append(json.dumps({**document, "source": f"page {row // 3}"}) + "\n")
    path.write_text("".join(lines))
    return path


def make_tasks(folder: Path, **more: dict[str, Any]) -> Path:
    """A folder with the tasks shop_choose, shop_say, ..., general_go_on over rows of its own; more: NAME=YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reader.py").write_text(READER)
    for seed, (name, words) in enumerate((("shop", SHOP_WORDS), ("general", GENERAL_WORDS))):
        rows = make_documents(folder / f"{name}.jsonl", words, seed)
        for kind, task in TASKS.items():
            write_task(folder, f"{name}_{kind}", rows, task)
    for name, task in more.items():
        write_task(folder, name, folder / "shop.jsonl", task)
    return folder


def write_task(folder: Path, name: str, rows: Path, task: dict[str, Any]) -> None:
    """One task YAML; a value "!function" stands for the reader, "!function surprise" for that function of it.

    A task with `group` is a group, and has no documents.
    """
    own = {"task": name, "dataset_kwargs": {"rows": str(rows)}, **COMMON}
    text = yaml.safe_dump({**({} if "group" in task else own), **task}, sort_keys=False)
    text = re.sub(r"'!function ?(\w*)'", lambda found: f"!function reader.{found[1] or 'load'}", text)
    (folder / f"{name}.yaml").write_text(text)


def metrics(*listed: tuple[str, str, bool]) -> list[dict[str, Any]]:
    """A task's metric_list of (metric, aggregation, higher is better)."""
    keys = ("metric", "aggregation", "higher_is_better")
    return [dict(zip(keys, one, strict=True)) for one in listed]


def make_suite(path: Path, tasks: Path, **changes: Any) -> Path:
    """A suite over the tasks of `make_tasks`: two of the domain, two general ones, one only shown."""
    suite = {
        "include": str(tasks),
        "chat_template": False,
        "batch_size": 4,
        "groups": {
            "domain": ["shop_choose", "shop_say"],
            "general": ["general_choose", "general_go_on"],
            "beside": {"kind": "shown", "tasks": ["general_say"]},
        },
        **changes,
    }
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path
