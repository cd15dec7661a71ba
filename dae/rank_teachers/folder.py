"""The folder of a ranking: what it follows from, what has been computed, and the result.

    OUTPUT/
      .lock                  held (flock) by the living process
      settings.json          recipe and fingerprints; its presence marks a folder of ours
      responses/NAME.jsonl   what a candidate that is a checkpoint wrote
      rewards/NAME.json      one number for each row, in the order of the prompts
      losses/NAME.json       the student's, after the prompt and without it, and the response tokens
      ranking.json           the result, written last

Every file is whole or absent, so a kill costs the candidate that was under way and no other.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.runs.files import TEMPORARY_PREFIX, disk_errors, json_text, plain, read_json, write_text_durably
from kd.runs.lock import hold
from kd.runs.provenance import changed_settings

logger = logging.getLogger("dae")

SETTINGS, RESULT, LOCK = "settings.json", "ranking.json", ".lock"
KIND = "rank-teachers"


class RankFolder:
    """One ranking's folder.

    settings: all that rewards and losses follow from; what only the arithmetic reads is not among it.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._settings = {"kind": KIND, **plain(settings)}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this process.

        Where a UserError comes before `begin`, nothing is left behind.

        Raises:
            UserError: a live process holds it; it was begun with other settings, or holds somebody else's files.
            MachineError: the disk is full.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: this is a file; --output names a folder")
        self._refuse_foreign_files()
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with hold(self.path / LOCK, str(self.path)):
                try:
                    self._refuse_other_settings()
                    yield
                finally:
                    (self.path / LOCK).unlink(missing_ok=True)
        finally:
            for folder in missing:  # only what is empty goes
                with suppress(OSError):
                    folder.rmdir()

    def begin(self) -> None:
        """Write down what all results follow from; before the first of them (`keep` does)."""
        if not (self.path / SETTINGS).exists():
            write_text_durably(self.path / SETTINGS, json_text(self._settings))

    def _refuse_foreign_files(self) -> None:
        if not self.path.is_dir() or (self.path / SETTINGS).exists():
            return
        with disk_errors(self.path):
            names = sorted(os.listdir(self.path))
        foreign = [name for name in names if name not in (LOCK, TEMPORARY_PREFIX + SETTINGS)]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(f"{self.path}: holds files that no ranking wrote ({shown}); give --output a new folder")

    def _refuse_other_settings(self) -> None:
        if not (self.path / SETTINGS).exists():
            return
        shown = changed_settings(read_json(self.path / SETTINGS), self._settings)
        if shown:
            raise UserError(
                f"{self.path}: was begun with other settings (there -> now):\n{shown}\n"
                "Give the same command to go on with it (betas and shift may change), choose another --output, or "
                "remove it."
            )

    def responses(self, name: str) -> Path:
        """Where the responses go that a candidate writes."""
        return self.path / "responses" / f"{name}.jsonl"

    def computed(self, what: str, name: str) -> dict[str, Any] | None:
        """What was computed for a candidate (`what`: rewards or losses), or None."""
        path = self.path / what / f"{name}.json"
        return read_json(path) if path.exists() else None

    def keep(self, what: str, name: str, values: Mapping[str, Any]) -> None:
        """Write down what was computed for a candidate."""
        self.begin()
        path = self.path / what / f"{name}.json"
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_text_durably(path, json.dumps(plain(values)) + "\n")

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Write the result beside what it follows from; its path."""
        path = self.path / RESULT
        write_text_durably(path, json_text(plain({**result, "settings": self._settings})))
        return path
