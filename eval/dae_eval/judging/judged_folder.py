"""The output folder of MT-Bench and AlpacaEval: held by one process, and resumed only with the same settings.

OUTPUT/
  settings.json      all that the results depend on
  replies/*.jsonl    one line per reply, written as it arrives, so that no request is sent twice
  evaluation.json, documents/, and the files of the benchmark's own formats, when the run has finished
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dae_eval.folders import DOCUMENTS
from kd.runs.claimed_folder import ClaimedFolder
from kd.runs.environment import environment
from kd.runs.files import disk_errors, json_text, read_json, write_text_durably
from kd.runs.settings import changed, refuse_changes

SETTINGS = "settings.json"
REPLIES = "replies"
# The values of settings that earlier releases did not record.
DEFAULTS = {"mode": "single", "judge temperature": 0.0, "judge max tokens": 2048, "order by seed": 0, "seed": 0}


@contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for this process and record the settings.

    Raises:
        UserError: a live process holds it, it was started with different settings, or has files of another command.
    """
    now = json.loads(json.dumps(settings))
    claim = ClaimedFolder(folder, SETTINGS, own=frozenset({REPLIES}), inside=(DOCUMENTS,))
    with claim.held(lambda: _refuse_other_settings(folder, now)):
        if not claim.is_ours():
            write_text_durably(folder / SETTINGS, json_text(now))
        with disk_errors(folder):
            (folder / REPLIES).mkdir(exist_ok=True)
        yield


def _refuse_other_settings(folder: Path, now: Mapping[str, Any]) -> None:
    if (folder / SETTINGS).exists():
        recorded = {**{key: value for key, value in DEFAULTS.items() if key in now}, **read_json(folder / SETTINGS)}
        refuse_changes(folder, changed(_given(recorded), _given(now)))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def software() -> dict[str, Any]:
    """The conditions of an evaluation that describe the software."""
    around = environment()
    return {key: around[key] for key in ("libraries", "python", "commit")}
