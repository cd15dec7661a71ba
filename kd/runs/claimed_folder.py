"""A folder that one command writes: held by one live process, and without files of anything else.

    with ClaimedFolder(path, mark="settings.json").held(refuse_other_settings):
        ...   # what an earlier process left half-done when it was killed has been removed

Every command that writes an output goes through here. What the output was started with is compared in
kd/runs/settings.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kd.errors import UserError
from kd.runs.files import TEMPORARY_PREFIX, disk_errors, fsync_path, remove
from kd.runs.lock import hold

Found = TypeVar("Found")

LOCK = ".lock"
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what safetensors writes before it gives a file its name
_LEFTOVER = re.compile(rf"\.(tmp|drop)-.*|\.staging|\.publishing|{_OF_SAFETENSORS.pattern}")


@dataclass(frozen=True)
class ClaimedFolder:
    """The output folder of a command, existing or not yet made.

    mark: the file that identifies it. Without it only the files in `own` are accepted; None: there is no such file.
    own: names that the command may write before the mark.
    inside: subfolders that are swept, too.
    """

    path: Path
    mark: str | None
    own: frozenset[str] = frozenset()
    inside: tuple[str, ...] = ()

    @contextmanager
    def held(self, check: Callable[[], Found]) -> Iterator[Found]:
        """Hold the folder for this process while the context lasts; what a kill left half-done is removed.

        The folder and its parents are made, and removed again where nothing has come into them.

        check: looks at what the folder was started with, before anything is touched; its answer is yielded.

        Raises:
            UserError: a live process holds the folder, it is a file or has files of something else, it may not be
                written, or `check` refuses it.
            MachineError: the disk is full.
        """
        self.refuse_foreign_files()
        with held_below(self.path, self.path / LOCK, str(self.path)):
            self.refuse_foreign_files()
            with disk_errors(self.path):
                found = check()
                self.sweep()
            yield found

    def look(self, check: Callable[[], Found]) -> Found:
        """The answer of `check`, with nothing made or removed. Raises UserError where `held` would."""
        self.refuse_foreign_files()
        if not (self.path / LOCK).exists():
            return check()
        with hold(self.path / LOCK, str(self.path)):
            return check()

    def is_ours(self) -> bool:
        return self.mark is not None and (self.path / self.mark).is_file()

    def refuse_foreign_files(self) -> None:
        """Raise UserError where the path is a file or lies in one, or the folder has files of something else."""
        refuse_file(self.path)
        if not self.path.is_dir() or self.is_ours():
            return
        with disk_errors(self.path):
            names = sorted(os.listdir(self.path))
        own = {LOCK, *self.own, *(f"{TEMPORARY_PREFIX}{name}" for name in (self.mark, *self.own))}
        foreign = [name for name in names if name not in own and not _OF_SAFETENSORS.fullmatch(name)]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(
                f"{self.path}: holds files that this command did not write ({shown}); choose an empty or a new folder"
            )

    def sweep(self) -> None:
        """Remove what a kill left half-done."""
        for folder in (self.path, *(self.path / name for name in self.inside)):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(entry.name):
                    remove(entry)


def refuse_file(folder: Path, key: str | None = None) -> None:
    """Raise UserError where a file stands in the place of a folder or of one above it. key: if not the output."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        if key is not None:
            raise UserError(f"{key}: {nearest}: is a file; expected a folder")
        raise UserError(f"{nearest}: this is a file, and the output needs a folder there; choose another output")


@contextmanager
def held_below(folder: Path, lock_file: Path, held: str) -> Iterator[None]:
    """Make a folder and hold a lock in it; the folders that were made go again where nothing has come into them.

    Their names are brought onto the disk: what is synced in a folder is lost with the folder's own name.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for place in made:
            with suppress(PermissionError):  # a folder above that may be written and not be read
                fsync_path(place.parent)
    try:
        with hold(lock_file, held):
            yield
    finally:
        for place in made:  # only what is empty goes
            with suppress(OSError):
                place.rmdir()
