"""The folder of a ranking.

    OUTPUT/
      .lock                  held (flock) by the running process
      settings.json          recipe and fingerprints; marks a folder of ours
      responses/NAME.jsonl   responses sampled from a candidate that is a checkpoint
      rewards/NAME.json      one number per row, in the order of the prompts
      losses/NAME.json       the student's losses with and without the prompt, and response tokens
      ranking.json           the result, written last

Every file is written whole, so a kill loses at most the candidate in progress.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dae.rank_teachers.recipe import RankRecipe
from kd.runs.claimed_folder import ClaimedFolder
from kd.runs.files import disk_errors, json_text, plain, read_json, write_text_durably
from kd.runs.settings import changed_settings, refuse_changes

SETTINGS, RESULT = "settings.json", "ranking.json"
FOLDERS = ("rewards", "losses", "responses")
KIND = "rank-teachers"


class RankFolder:
    """One ranking's folder. settings: everything that determines rewards and losses."""

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._settings = {"kind": KIND, **plain(settings)}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this process. A UserError before `begin` leaves nothing behind.

        Raises:
            UserError: a live process holds it; it was started with different settings, or has foreign files.
            MachineError: the disk is full.
        """
        with ClaimedFolder(self.path, SETTINGS, inside=FOLDERS).held(self._refuse_other_settings):
            yield

    def _refuse_other_settings(self) -> None:
        if (self.path / SETTINGS).exists():
            recorded = read_json(self.path / SETTINGS)
            refuse_changes(self.path, changed_settings(recorded, self._settings, RankRecipe))

    def begin(self) -> None:
        """Write the settings, before the first result (`keep` calls this)."""
        if not (self.path / SETTINGS).exists():
            write_text_durably(self.path / SETTINGS, json_text(self._settings))

    def responses(self, name: str) -> Path:
        return self.path / "responses" / f"{name}.jsonl"

    def computed(self, what: str, name: str) -> dict[str, Any] | None:
        """A candidate's rewards or losses (`what`), or None."""
        path = self.path / what / f"{name}.json"
        return read_json(path) if path.exists() else None

    def keep(self, what: str, name: str, values: Mapping[str, Any]) -> None:
        self.begin()
        path = self.path / what / f"{name}.json"
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_text_durably(path, json.dumps(plain(values)) + "\n")

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Write the result with the settings; its path."""
        path = self.path / RESULT
        write_text_durably(path, json_text(plain({**result, "settings": self._settings})))
        return path
