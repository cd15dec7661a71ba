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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from kd.config.loading import resolved_yaml
from kd.config.schema import Frozen
from kd.errors import UserError
from kd.runs.checkpoints import Checkpoints
from kd.runs.claimed_folder import LOCK, ClaimedFolder
from kd.runs.environment import changes, environment
from kd.runs.files import (
    append_lines,
    cut_torn_line,
    disk_errors,
    file_sha256,
    files_sha256,
    fsync_path,
    fsync_tree,
    json_text,
    plain,
    read_json,
    remove,
    whole_lines,
    write_bytes_durably,
    write_text_durably,
)
from kd.runs.provenance import FINISHED, PROVENANCE, TOOLKIT, DataInput, changed_inputs, read_provenance
from kd.runs.settings import as_rows_per_step, changed, cut_of, recipe_values, recorded_recipe, refuse_changes

logger = logging.getLogger("dae")

State = Literal["new", "resume", "finished"]

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"
_PUBLISHING = ".publishing"
_OWN_NAMES = {PROVENANCE, ENVIRONMENT, RECIPE, METRICS, CHECKPOINTS, TRACKERS, LOCK, FINISHED}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True)
class Start:
    """What a run is started with; the same again goes on with it.

    Args:
        stage: `sft`, `align`, ...
        recipe: its key `output` may change (the folder may be moved).
        inputs: fingerprint of each model by role; `base` must be among them.
        base: path or hub id of the base, as typed.
        data: the sources of each route, in the order of the recipe.
        processes: how many train together.
    """

    stage: str
    recipe: Frozen
    inputs: Mapping[str, str]
    base: str
    data: Mapping[str, Sequence[DataInput]]
    processes: int = 1

    def provenance(self) -> dict[str, Any]:
        """The content of provenance.json."""
        quantization = getattr(self.recipe, "quantization", None)
        quantised = {"quantization": quantization} if quantization else {}
        return {
            "toolkit": TOOLKIT,
            "stage": self.stage,
            "processes": self.processes,
            "base": {"path": self.base, "fingerprint": self.inputs["base"]} | quantised,
            "inputs": dict(self.inputs),
            "data": {route: [asdict(source) for source in sources] for route, sources in self.data.items()},
        }


class _Marked(ClaimedFolder):
    """A folder that is ours where provenance.json names the toolkit: other tools have files of that name, too."""

    def is_ours(self) -> bool:
        return read_provenance(self.path) is not None


class RunFolder:
    """One run's folder. Only the main process of a run claims it and writes into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / METRICS
        self.trackers_dir = self.path / TRACKERS
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, self.metrics_path)
        self._folder = _Marked(self.path, PROVENANCE, inside=(CHECKPOINTS,))
        self._published: dict[str, str] = {}

    # -- claiming ------------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, start: Start) -> Iterator[State]:
        """Hold the folder for this process while the context lasts, and say where its run stands.

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
        with self._folder.held(lambda: self._state(start)) as state:
            if state != "finished":
                with disk_errors(self.path):
                    self._set_up(state, start)
            try:
                yield state
            except UserError:
                if state == "new" and not self._has_results():
                    self._withdraw()
                raise

    def look(self, start: Start) -> State:
        """What `claim` would find, with nothing touched. Raises UserError where `claim` would refuse."""
        return self._folder.look(lambda: self._state(start))

    def _state(self, start: Start) -> State:
        before = read_provenance(self.path)
        if before is None:
            return "new"
        recipe_path = self.path / RECIPE
        if not recipe_path.is_file():  # the recipe is the last file of the set-up
            if self.checkpoints.sealed():
                raise UserError(
                    f"{recipe_path}: not found, so this run cannot resume; restore it or choose another output"
                )
            return "new"
        try:
            refuse_changes(self.path, self._changes(before, start))
        except UserError:
            if self._has_results():
                raise
            return "new"  # a first try that trained no step leaves nothing to go on with
        if self._is_cut_otherwise(before, start) and not self._has_results():
            return "new"  # the recipe that is recorded is that of the first step
        if not (self.path / FINISHED).is_file():
            return "resume"
        self._check_published()
        return "finished"

    def _changes(self, before: Mapping[str, Any], start: Start) -> list[str]:
        if stage := changed({"stage": before.get("stage")}, {"stage": start.stage}):
            return stage  # all else follows from it
        recorded = recorded_recipe(self.path / RECIPE, type(start.recipe))
        recipes = (
            as_rows_per_step(recorded, before.get("processes", 1)),
            as_rows_per_step(recipe_values(start.recipe), start.processes),
        )
        return changed(*recipes) + changed_inputs(before, start.provenance())

    def _is_cut_otherwise(self, before: Mapping[str, Any], start: Start) -> bool:
        """Whether the same rows of a step are cut into other micro-batches or processes."""
        recorded = recorded_recipe(self.path / RECIPE, type(start.recipe))
        return cut_of(recorded, before.get("processes", 1)) != cut_of(recipe_values(start.recipe), start.processes)

    def _check_published(self) -> None:
        for name, sha256 in self._finished()["files"].items():
            file = self.path / name
            if name.endswith(".safetensors") and (not file.is_file() or file_sha256(file) != sha256):
                fate = "has changed" if file.is_file() else "is missing"
                raise UserError(
                    f"{file}: {fate} since this run finished; restore it, or remove {self.path} and run again"
                )

    def _set_up(self, state: State, start: Start) -> None:
        now = environment()
        if state == "resume":
            before = read_json(self.path / ENVIRONMENT)
            for line in changes(before, now):
                logger.warning("%s: going on in another environment, so the last bits may differ: %s", self.path, line)
            cut_torn_line(self.metrics_path)
            return
        # Provenance is the mark of a run folder, hence first; the recipe says that the set-up is whole, hence last.
        write_text_durably(self.path / PROVENANCE, json_text(start.provenance()))
        self.metrics_path.unlink(missing_ok=True)
        self.checkpoints.folder.mkdir(exist_ok=True)
        write_text_durably(self.path / ENVIRONMENT, json_text(now))
        write_text_durably(self.path / RECIPE, resolved_yaml(start.recipe))

    def _has_results(self) -> bool:
        if (self.path / FINISHED).is_file() or self.checkpoints.sealed() or self._published:
            return True
        return any(line["step"] > 0 for line in self.metrics())

    def _withdraw(self) -> None:
        """Take back the set-up; provenance last, for it marks the other files as ours."""
        self._folder.sweep()
        with suppress(OSError):
            self.checkpoints.folder.rmdir()
        for name in (RECIPE, ENVIRONMENT, METRICS, PROVENANCE):
            (self.path / name).unlink(missing_ok=True)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, each with its `step`; none where the file is not there. Raises UserError."""
        return [self._metrics_of(number, line) for number, line in enumerate(whole_lines(self.metrics_path), 1)]

    def _metrics_of(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            metrics = json.loads(line)
            if not isinstance(metrics["step"], int):
                raise TypeError("step is no integer")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self.metrics_path}:{number}: is no line of metrics ({error!r}); restore the file"
            ) from error
        return cast("dict[str, Any]", metrics)

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
        lines = enumerate(whole_lines(self.metrics_path), 1)
        kept = [line for number, line in lines if self._metrics_of(number, line)["step"] <= step]
        write_bytes_durably(self.metrics_path, b"".join(kept))

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
        self._folder.sweep()
        write_text_durably(
            self.path / FINISHED, json_text({"finished": True, "summary": plain(summary), "files": self._published})
        )

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run, as it was given to `mark_finished`."""
        summary: dict[str, Any] = self._finished()["summary"]
        return summary

    def _finished(self) -> dict[str, Any]:
        finished = read_json(self.path / FINISHED)
        files = finished.get("files")
        hashes = isinstance(files, dict) and all(isinstance(sha256, str) for sha256 in files.values())
        if not hashes or not isinstance(finished.get("summary"), dict):
            raise UserError(f"{self.path / FINISHED}: has no summary or hashes of files; restore it")
        return finished


def _check_publishable(names: Sequence[str]) -> None:
    if not names:
        raise RuntimeError("nothing was written to publish")
    if own := [name for name in names if name.split("/")[0] in _OWN_NAMES]:
        raise RuntimeError(f"a published file may not be named {own[0]}: the run folder keeps its own there")
    if pickled := [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]:
        raise RuntimeError(f"published folders hold no pickles, and {pickled[0]} is one")
