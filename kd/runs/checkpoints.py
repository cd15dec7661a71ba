"""The checkpoints of a run: staged, sealed with a manifest, and read only if they match it.

CHECKPOINTS/
  .staging/          where the trainer writes the next one
  step-000123/       whatever the trainer saved, and manifest.json with the SHA-256 of each file
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from kd.runs.files import disk_errors, files_sha256, fsync_path, fsync_tree, json_text, remove

logger = logging.getLogger("dae")

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """The checkpoints below one folder. metrics_path: the lines that led to them, brought onto the disk before them."""

    def __init__(self, folder: Path, metrics_path: Path) -> None:
        self.folder = folder
        self._metrics_path = metrics_path
        self._passed_over: set[Path] = set()

    @property
    def staging(self) -> Path:
        """Where a checkpoint is written before it is sealed. The next claim removes it with all that it holds."""
        return self.folder / ".staging"

    def at(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def seal(self, staging: Path, step: int) -> Path:
        """Sync `staging`, add its manifest, rename it to checkpoints/step-000123. A whole checkpoint there stays.

        staging: a folder below `staging` that holds all of the checkpoint's files.

        Raises:
            MachineError: the disk is full; earlier checkpoints are whole.
        """
        target = self.at(step)
        with disk_errors(self.folder):
            if target.exists() and checkpoint_fault(target) is None:
                remove(staging)
                return target
            names = [file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file()]
            files = {
                name: {"bytes": (staging / name).stat().st_size, "sha256": sha256}
                for name, sha256 in files_sha256(staging, names).items()
            }
            (staging / MANIFEST).write_text(json_text({"step": step, "files": files}), encoding="utf-8")
            fsync_tree(staging)
            if self._metrics_path.exists():  # what led to this checkpoint must not be lost before it
                fsync_path(self._metrics_path)
                fsync_path(self._metrics_path.parent)
            if target.exists():
                self._drop(target)
            os.rename(staging, target)
            fsync_path(self.folder)
        self._passed_over.discard(target)
        return target

    def latest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint whose files are exactly those of its manifest; a warning names each passed over.

        before: only those of earlier steps.
        """
        for step, checkpoint in sorted(self.sealed().items(), reverse=True):
            if before is not None and step >= before:
                continue
            fault = checkpoint_fault(checkpoint)
            if fault is None:
                return checkpoint
            self._passed_over.add(checkpoint)
            logger.warning("%s: passed over: %s", checkpoint, fault)
        return None

    def prune(self, keep: int, best: int | None = None) -> None:
        """Remove all checkpoints but the newest `keep` and that of step `best`. Those passed over go too."""
        sealed = self.sealed()
        whole = [step for step in sorted(sealed) if sealed[step] not in self._passed_over]
        kept = {*whole[len(whole) - min(keep, len(whole)) :], best}
        for step, checkpoint in sealed.items():
            if step not in kept:
                self._drop(checkpoint)

    def _drop(self, checkpoint: Path) -> None:
        """Remove a checkpoint so that a kill in between leaves no torn one under its name."""
        aside = checkpoint.with_name(f".drop-{checkpoint.name}")
        with disk_errors(checkpoint):
            remove(aside)
            os.rename(checkpoint, aside)
            remove(aside)

    def sealed(self) -> dict[int, Path]:
        """Every checkpoint by its step, whole or not."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name))}


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be read, or None where it is exactly what its manifest says."""
    manifest = checkpoint / MANIFEST
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: entry["sha256"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    present = {}
    for entry in checkpoint.rglob("*"):
        name = entry.relative_to(checkpoint).as_posix()
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            return f"{name} is no plain file"
        if entry.is_file() and name != MANIFEST:
            present[name] = entry
    if missing := sorted(expected.keys() - present.keys()):
        return f"{missing[0]} is missing"
    if unknown := sorted(present.keys() - expected.keys()):
        return f"{unknown[0]} is not in its {MANIFEST}"
    found = files_sha256(checkpoint, present)
    altered = sorted(name for name in expected if found[name] != expected[name])
    return f"{altered[0]} is torn or altered (its SHA-256 is not that of {MANIFEST})" if altered else None
