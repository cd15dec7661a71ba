"""Held-out loss and KL for the models of an evaluation, measured by dae_eval.drift.

Each measurement is saved at once under a key of the model, the rows and the teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dae_eval.drift import HeldOutRows, measure_held_out, read_held_out
from dae_eval.folders import HELD_OUT, KEY_DIGITS, digest
from dae_eval.models import Memory, Model
from dae_eval.results import HeldOutLoss
from dae_eval.suites import Suite
from kd.config.data_recipe import DataRecipe
from kd.runs.files import disk_errors, json_text, plain, read_json, write_text_durably

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHERS = ("reference", "expert")


def rows_of(suite: Suite, tokenizer: PreTrainedTokenizerBase, context: int) -> tuple[HeldOutRows, ...]:
    """The suite's eval set, encoded as in training, with at most `context` tokens per row. Raises UserError."""
    if not suite.held_out:
        return ()
    template = suite.chat_template if isinstance(suite.chat_template, str) else None
    return read_held_out(suite.held_out, tokenizer, DataRecipe(max_length=context, chat_template=template))


def teachers_of(model: Model, models: Mapping[str, Model]) -> dict[str, Model]:
    """Those of reference and expert that stand on the model's own backbone: only one backbone is ever in memory."""
    own = model.backbone.fingerprint
    return {role: models[role] for role in TEACHERS if role in models and models[role].backbone.fingerprint == own}


def measured(
    model: Model,
    rows: tuple[HeldOutRows, ...],
    teachers: Mapping[str, Model],
    facts: Mapping[str, Any],
    folder: Path,
    memory: Memory,
) -> tuple[HeldOutLoss, ...]:
    """Loss and KL of a model on the eval set, read from `folder` if they were measured before.

    facts: all that the figures depend on besides rows and teachers (model, tokenizer, dtype, versions, ...).
    """
    about = {
        **facts,
        "rows": [[held.route, held.sha256] for held in rows],
        "teachers": {role: list(teacher.identity) for role, teacher in teachers.items()},
    }
    path = folder / HELD_OUT / f"{digest(about)[:KEY_DIGITS]}.json"
    if not path.is_file():
        roles = memory.roles({"model": model, **teachers})
        own = roles.pop("model")
        found = [asdict(line) for line in measure_held_out(own, rows, roles)]
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_text_durably(path, json_text(plain({"held_out": found, "key": about})))
    paths = {held.sha256: held.path for held in rows}
    lines = read_json(path)["held_out"]
    return tuple(HeldOutLoss(**{**line, "path": paths[line["sha256"]]}) for line in lines)
