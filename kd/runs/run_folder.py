"""The run folder: what one stage writes, so that kill -9 at any moment costs nothing but time.

    OUTPUT/
      .lock              held (flock) by the living process
      provenance.json    stage, base, data and inputs with their fingerprints: the mark of a run folder of ours
      environment.json   versions, devices, command line
      recipe.yaml        the resolved recipe
      metrics.jsonl      one line of JSON per logged step
      trackers/          event files of a tracker that keeps files here (train.report_to)
      checkpoints/step-000123/   whatever the trainer saved, and manifest.json with the SHA-256 of each file
      ...                published files: adapter or weights, tokenizer, model card
      run.json           summary and SHA-256 of the published files; written last, so its presence means finished

Every file is written beside its place, synced and renamed into it. What a kill leaves is called `.staging`,
`.publishing`, `.drop-*` or `.tmp-*`; the next claim removes it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from kd.errors import UserError
from kd.runs.environment import changes, environment
from kd.runs.files import (
    TEMPORARY_PREFIX,
    append_lines,
    cut_torn_line,
    disk_errors,
    fsync_path,
    fsync_tree,
    json_text,
    plain,
    read_json,
    remove,
    write_text_durably,
)
from kd.runs.hashes import file_sha256, files_sha256
from kd.runs.lock import hold
from kd.runs.provenance import (
    FINISHED,
    PROVENANCE,
    TOOLKIT,
    DataInput,
    differences,
    read_provenance,
)

logger = logging.getLogger("dae")

State = Literal["new", "resume", "finished"]

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"
LOCK = ".lock"
MANIFEST = "manifest.json"
_PUBLISHING = ".publishing"
_OWN_NAMES = {PROVENANCE, ENVIRONMENT, RECIPE, METRICS, CHECKPOINTS, TRACKERS, LOCK, FINISHED}
_LEFTOVER = re.compile(r"\.(tmp|drop)-.*|\.staging|\.publishing")
_STEP = re.compile(r"step-(\d{6,})")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def _provenance(
    stage: str, inputs: Mapping[str, str], base: str, data: Mapping[str, Sequence[DataInput]], processes: int
) -> dict[str, Any]:
    return {
        "toolkit": TOOLKIT,
        "stage": stage,
        "processes": processes,
        "base": {"path": base, "fingerprint": inputs["base"]},
        "inputs": dict(inputs),
        "data": {route: [asdict(source) for source in sources] for route, sources in data.items()},
    }


class RunFolder:
    """One run's folder. Only the main process of a run claims it and writes into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._published: dict[str, str] = {}
        self._passed_over: set[Path] = set()

    @property
    def checkpoints_dir(self) -> Path:
        """Where sealed checkpoints lie."""
        return self.path / CHECKPOINTS

    @property
    def staging_dir(self) -> Path:
        """Where a checkpoint is written before it is sealed. The next claim removes it with all that it holds."""
        return self.checkpoints_dir / ".staging"

    @property
    def metrics_path(self) -> Path:
        """The file of metrics, one line of JSON per logged step."""
        return self.path / METRICS

    @property
    def trackers_dir(self) -> Path:
        """Where a tracker may keep files of its own."""
        return self.path / TRACKERS

    # -- claiming ------------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(
        self,
        stage: str,
        resolved_recipe: str,
        inputs: Mapping[str, str],
        *,
        base: str,
        data: Mapping[str, Sequence[DataInput]],
        processes: int = 1,
    ) -> Iterator[State]:
        """Hold the folder for this process while the context lasts, and say where its run stands.

        Args:
            stage: `sft`, `align`, ...
            resolved_recipe: the resolved recipe as YAML. Its key `output` may change (the folder may be moved).
            inputs: fingerprint of each model by role; `base` must be among them.
            base: path or hub id of the base, as typed.
            data: the sources of each route, in the order of the recipe.
            processes: how many train together.

        Yields:
            "new": the folder has just been set up; "resume": the same run was started before and did not finish;
            "finished": the same run is done, its weights are as it left them (see `summary`), nothing was touched.

        Raises:
            UserError: a live process holds the folder; another recipe, input or stage was started here and has trained
                a step; there are files here that no run of ours wrote; the folder may not be written. A UserError
                raised inside a "new" run that has trained no step yet takes the set-up back, so that the corrected
                command can use the folder.
            MachineError: the disk is full.
        """
        provenance = _provenance(stage, inputs, base, data, processes)
        self._refuse_foreign_files()
        with disk_errors(self.path):
            made = self._make_folders()
        try:
            with hold(self.path / LOCK, str(self.path)):
                self._refuse_foreign_files()
                with disk_errors(self.path):
                    state = self._state(provenance, resolved_recipe)
                    if state != "finished":
                        self._sweep()
                        self._set_up(state, provenance, resolved_recipe)
                try:
                    yield state
                except UserError:
                    if state == "new" and not self._has_results():
                        self._withdraw()
                    raise
        except UserError:
            for folder in made:  # only what is empty goes
                with suppress(OSError):
                    folder.rmdir()
            raise

    def look(
        self,
        stage: str,
        resolved_recipe: str,
        inputs: Mapping[str, str],
        *,
        base: str,
        data: Mapping[str, Sequence[DataInput]],
        processes: int = 1,
    ) -> State:
        """What `claim` would find, with nothing touched. Raises UserError where `claim` would refuse."""
        self._refuse_foreign_files()
        if not self.path.exists():
            return "new"
        provenance = _provenance(stage, inputs, base, data, processes)
        if not (self.path / LOCK).exists():
            return self._state(provenance, resolved_recipe)
        with hold(self.path / LOCK, str(self.path)):
            return self._state(provenance, resolved_recipe)

    def _make_folders(self) -> list[Path]:
        """Make the folder and its parents; those that were made, deepest first."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        return missing

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: this is a file; --output names a folder")
        if not self.path.is_dir() or read_provenance(self.path) is not None:
            return
        with disk_errors(self.path):
            names = sorted(os.listdir(self.path))
        foreign = [name for name in names if name not in (LOCK, TEMPORARY_PREFIX + PROVENANCE)]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(
                f"{self.path}: holds files that no run wrote ({shown}); give --output an empty or a new folder"
            )

    def _state(self, provenance: Mapping[str, Any], resolved_recipe: str) -> State:
        before = read_provenance(self.path)
        if before is None:
            return "new"
        recipe_path = self.path / RECIPE
        if not recipe_path.is_file():  # the recipe is the last file of the set-up
            if self._sealed():
                raise UserError(
                    f"{recipe_path}: is missing, so its run cannot go on; restore it or choose another --output"
                )
            return "new"
        differing = differences(before, provenance, recipe_path.read_text(encoding="utf-8"), resolved_recipe)
        if differing and not self._has_results():  # a first try that trained no step leaves nothing to go on with
            return "new"
        if differing:
            lines = "\n".join(f"  {line}" for line in differing)
            raise UserError(
                f"{self.path}: holds a run that was started otherwise (there -> now):\n{lines}\n"
                "Give the same command to go on with it, or choose another --output."
            )
        if not (self.path / FINISHED).is_file():
            return "resume"
        self._check_published()
        return "finished"

    def _check_published(self) -> None:
        for name, sha256 in self._finished()["files"].items():
            file = self.path / name
            if name.endswith(".safetensors") and (not file.is_file() or file_sha256(file) != sha256):
                fate = "has changed" if file.is_file() else "is missing"
                raise UserError(
                    f"{file}: {fate} since this run finished; restore it, or remove {self.path} and run again"
                )

    def _sweep(self) -> None:
        """Remove what a kill left half-done."""
        for folder in (self.path, self.checkpoints_dir):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if _LEFTOVER.fullmatch(entry.name):
                    remove(entry)

    def _set_up(self, state: State, provenance: Mapping[str, Any], resolved_recipe: str) -> None:
        now = environment()
        if state == "resume":
            before = read_json(self.path / ENVIRONMENT)
            for line in changes(before, now):
                logger.warning("%s: going on in another environment, so the last bits may differ: %s", self.path, line)
            cut_torn_line(self.metrics_path)
            return
        # Provenance is the mark of a run folder, hence first; the recipe says that the set-up is whole, hence last.
        write_text_durably(self.path / PROVENANCE, json_text(provenance))
        self.metrics_path.unlink(missing_ok=True)
        self.checkpoints_dir.mkdir(exist_ok=True)
        write_text_durably(self.path / ENVIRONMENT, json_text(now))
        write_text_durably(self.path / RECIPE, resolved_recipe)

    def _has_results(self) -> bool:
        finished = (self.path / FINISHED).is_file()
        return finished or bool(self._sealed() or self._published or any(line["step"] > 0 for line in self.metrics()))

    def _withdraw(self) -> None:
        """Take back the set-up; provenance last, for it marks the other files as ours."""
        self._sweep()
        with suppress(OSError):
            self.checkpoints_dir.rmdir()
        for name in (RECIPE, ENVIRONMENT, METRICS, PROVENANCE):
            (self.path / name).unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, each with its `step`; none where the file is not there."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        return [json.loads(line) for line in lines]

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. `step` (optimizer steps done) must be among the values.

        Numbers that JSON has no word for are written as the strings "nan", "inf", "-inf".
        """
        if not isinstance(metrics.get("step"), int):
            raise TypeError(f"metrics need an integer `step`, got {metrics.get('step')!r}")
        append_lines(self.metrics_path, json.dumps(plain(metrics), ensure_ascii=False, allow_nan=False) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Keep the lines of steps up to `step`; -1 keeps none."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text_durably(self.metrics_path, "".join(kept))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` lies, if it was sealed and not pruned."""
        return self.checkpoints_dir / f"step-{step:06d}"

    def seal_checkpoint(self, staging: Path, step: int) -> Path:
        """Sync `staging`, add its manifest, rename it to checkpoints/step-000123. A whole checkpoint there stays.

        staging: a folder below `staging_dir` that holds all of the checkpoint's files.

        Raises:
            MachineError: the disk is full; earlier checkpoints are whole.
        """
        target = self.checkpoint(step)
        with disk_errors(self.path):
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
            if self.metrics_path.exists():  # what led to this checkpoint must not be lost before it
                fsync_path(self.metrics_path)
            if target.exists():
                self._drop(target)
            os.rename(staging, target)
            fsync_path(self.checkpoints_dir)
        self._passed_over.discard(target)
        return target

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files are exactly those of its manifest; a warning names each passed over."""
        for _, checkpoint in sorted(self._sealed().items(), reverse=True):
            fault = checkpoint_fault(checkpoint)
            if fault is None:
                return checkpoint
            self._passed_over.add(checkpoint)
            logger.warning("%s: passed over: %s", checkpoint, fault)
        return None

    def prune(self, keep: int, best: int | None = None) -> None:
        """Remove all checkpoints but the newest `keep` and that of step `best`. Those passed over go too."""
        sealed = self._sealed()
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

    def _sealed(self) -> dict[int, Path]:
        entries = self.checkpoints_dir.iterdir() if self.checkpoints_dir.is_dir() else ()
        return {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name))}

    # -- the end -------------------------------------------------------------------------------------------------------

    def publish(self, write_files: Callable[[Path], None]) -> list[str]:
        """Let `write_files(folder)` write the result's files, then sync them and rename them into the run folder.

        Configs go last, so that a folder whose weights have not all arrived does not open as a model. May be called
        again, also after a kill: files of the same name are replaced.

        Returns:
            Names of the published files, relative to the run folder.

        Raises:
            MachineError: the disk is full; the run folder's checkpoints are whole.
        """
        staging = self.path / _PUBLISHING
        with disk_errors(self.path):
            remove(staging)
            staging.mkdir()
            write_files(staging)
            names = sorted(file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file())
            _check_publishable(names)
            self._published |= files_sha256(staging, names)
            fsync_tree(staging)
            for entry in sorted(staging.iterdir(), key=lambda entry: (entry.name.endswith("config.json"), entry.name)):
                target = self.path / entry.name
                if target.is_dir():
                    remove(target)
                os.replace(entry, target)
            staging.rmdir()
            fsync_path(self.path)
        return names

    def mark_finished(self, summary: Mapping[str, Any]) -> None:
        """Write run.json, which makes the run finished: `summary` and the SHA-256 of every published file."""
        if not self._published:
            raise RuntimeError(f"{self.path}: nothing was published, so the run cannot be finished")
        self._sweep()
        write_text_durably(
            self.path / FINISHED, json_text({"finished": True, "summary": plain(summary), "files": self._published})
        )

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run, as it was given to `mark_finished`."""
        summary: dict[str, Any] = self._finished()["summary"]
        return summary

    def _finished(self) -> dict[str, Any]:
        return read_json(self.path / FINISHED)


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be read, or None where it is exactly what its manifest says."""
    manifest = checkpoint / MANIFEST
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: entry["sha256"] for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def _check_publishable(names: Sequence[str]) -> None:
    if not names:
        raise RuntimeError("nothing was written to publish")
    if own := [name for name in names if name.split("/")[0] in _OWN_NAMES]:
        raise RuntimeError(f"a published file may not be named {own[0]}: the run folder keeps its own there")
    if pickled := [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]:
        raise RuntimeError(f"published folders hold no pickles, and {pickled[0]} is one")
