"""Reads held-out documents of the folder `shared` for lm-eval (`custom_dataset` in the task files beside this one)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets


def load(shared: str, file: str, first_characters: int | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows of `shared/data/file`, in the order of the file, as the split `test`.

    A row that is a text alone becomes a completion of the empty prompt, cut to its first characters if so asked: what
    a context of 512 tokens holds. What else lm-eval hands over (the task's version) changes nothing.
    """
    lines = (Path(shared) / "data" / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if "text" in rows[0]:
        rows = [{"prompt": "", "completion": row["text"][:first_characters]} for row in rows]
    return {"test": datasets.Dataset.from_list(rows)}


def bits(_doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """-log2 p(completion | prompt). Bytes are counted where bits are summed over documents."""
    log_likelihood, _ = results[0]
    return {"bits": -log_likelihood / math.log(2)}
