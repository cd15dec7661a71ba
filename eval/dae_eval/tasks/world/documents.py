"""Held-out documents of the embedded world for lm-eval (`custom_dataset` in the task files of this folder)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(world: str, skill: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The documents in `world/heldout/skill.jsonl`, in the order of the file, as the split `test`.

    The task's other metadata (its version), which lm-eval also passes, are ignored.
    """
    lines = (Path(world) / "heldout" / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
