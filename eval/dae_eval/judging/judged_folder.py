"""The output folder of MT-Bench and AlpacaEval: held by one process, and gone on with only under the same settings.

OUTPUT/
  settings.json      all that the results depend on, as they were begun
  replies/*.jsonl    one line for each reply, as it came: what a stop leaves, and what is never asked for twice
  evaluation.json, documents/, and the files of the benchmark's own formats: when all is there
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dae_eval.folders import EVALUATION
from kd.errors import UserError
from kd.runs.files import disk_errors, json_text, read_json, write_text_durably
from kd.runs.lock import hold

SETTINGS = "settings.json"
REPLIES = "replies"


@contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for this process; begin it with these settings, or see that it was begun with the same.

    Raises:
        UserError: a live process holds it, it was begun with other settings, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; name a folder")
    if (folder / EVALUATION).exists() and not (folder / SETTINGS).exists():
        raise UserError(f"--output {folder}: holds another evaluation; choose a folder of its own")
    with disk_errors(folder):
        (folder / REPLIES).mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with hold(lock, str(folder)):
        try:
            _begin(folder, settings)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / SETTINGS
    now = json.loads(json.dumps(settings))
    if not path.exists():
        write_text_durably(path, json_text(now))
        return
    before = read_json(path)
    lines = [
        f"  {key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if lines:
        shown = "\n".join(lines)
        raise UserError(
            f"{folder}: was begun with other settings (there -> now):\n{shown}\n"
            "Give the same command to go on with it, or choose another --output."
        )
