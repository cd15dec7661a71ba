"""The state of a pipeline's folder: which stages have run, with which inputs, and whether that is still current.

OUTPUT/
  .lock            held (flock) by the running process
  pipeline.json    for each started stage: settings, fingerprints of its inputs and of its result
  recipes/         the resolved recipe of each stage, as its own command reads it
  NAME/ ...        the stages' outputs; NAME.replaced-1 was moved aside by `--redo`
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dae.pipeline.kinds import EvalStage, ReportStage, kinds
from dae.pipeline.recipe import RECIPES, Pipeline, Stage
from dae.pipeline.references import Input
from kd.config.schema import Reads
from kd.data.fingerprint import data_sha256
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.tokenizer_files import tokenizer_sha256
from kd.runs.claimed_folder import LOCK, ClaimedFolder
from kd.runs.files import disk_errors, file_sha256, json_text, read_json, write_text_durably
from kd.runs.lock import hold
from kd.runs.provenance import TOOLKIT
from kd.runs.settings import changed, changed_facts, recorded_values

STATE = "pipeline.json"
VERSION = 1
TOKENIZER_OF = "tokenizer of "

Word = Literal["done", "begun", "waiting", "stale"]


@dataclass(frozen=True)
class Record:
    """Settings and inputs of a started stage, and the fingerprint of its result once finished."""

    stage: str
    output: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    result: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Standing:
    """A stage's state: `stale` means that its output is out of date, for these reasons."""

    word: Word
    reasons: tuple[str, ...] = ()


class Fingerprints:
    """SHA-256 of models, rows and results. Files with unchanged sizes and modification times are not read again."""

    def __init__(self, known: Mapping[str, Mapping[str, str]]) -> None:
        self.known = {key: dict(entry) for key, entry in known.items()}

    def of(self, wanted: Reads, path: str, recipe: Any = None) -> str:
        """Of an input or a result. recipe: the stage's, for its suite. Raises UserError if it is not found."""
        if wanted == "suite":
            return suite_sha256(recipe)
        if wanted == "template":
            return file_sha256(path) if Path(path).is_file() else ""
        if wanted == "rows":
            return self._remembered(f"rows {path}", Path(path), lambda: data_sha256(path))
        if wanted == "evaluation":
            return file_of(Path(path) / "evaluation.json")
        model = checkpoint(path)
        return self._remembered(f"checkpoint {path}", model.folder, lambda: model.fingerprint)

    def _remembered(self, key: str, place: Path, compute: Callable[[], str]) -> str:
        if not place.exists():  # a hub data set
            return compute()
        seen, entry = signature(place, deep=key.startswith("rows ")), self.known.get(key, {})
        if entry.get("files") != seen:
            entry = self.known[key] = {"files": seen, "sha256": compute()}
        return entry["sha256"]


def signature(place: Path, deep: bool) -> str:
    """Digest of names, sizes and modification times: of a file, of a folder's files, or of all files below it."""
    files = [place] if place.is_file() else sorted(place.rglob("*") if deep else place.iterdir())
    facts = [(str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    facts = [fact for fact in facts if fact[0] != LOCK]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


def file_of(path: Path) -> str:
    """SHA-256 of a finished stage's file. Raises UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return file_sha256(path)


def suite_sha256(recipe: EvalStage | ReportStage) -> str:
    """Digest of a suite and all that it names: keys, tasks, held-out rows, and paths in its metadata.

    Raises:
        UserError: the suite is invalid, or a file is not found.
    """
    from dae_eval.suites import load_suite

    assert recipe.suite is not None
    suite = load_suite(Path(recipe.suite.file), recipe.suite.assignments())
    named = [*(path for paths in suite.held_out.values() for path in paths)]
    named += [value for value in suite.metadata.values() if isinstance(value, str) and Path(value).exists()]
    named += [str(suite.task_folder)] if suite.task_folder is not None else []
    contents = {path: data_sha256(path) for path in named}
    settings = suite.model_dump(mode="json")
    return hashlib.sha256(json.dumps([settings, contents], sort_keys=True).encode()).hexdigest()


class PipelineFolder:
    """The pipeline's folder, held by this process."""

    def __init__(self, pipeline: Pipeline, fingerprints: Fingerprints) -> None:
        self.pipeline = pipeline
        self.path = pipeline.output
        self.fingerprints = fingerprints
        self.records: dict[str, Record] = {}
        self._written = ""

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            UserError: a live process holds it, it is not a pipeline's, or it may not be written.
        """
        with ClaimedFolder(self.path, STATE).held(lambda: read_state(self.path)) as content:
            self.records = {name: Record(**record) for name, record in content.get("stages", {}).items()}
            self._written = json_text(content) if content else ""
            yield

    def save(self) -> None:
        """Write pipeline.json if it has changed."""
        content = {
            "toolkit": TOOLKIT,
            "version": VERSION,
            "stages": {name: asdict(record) for name, record in self.records.items()},
            "fingerprints": self.fingerprints.known,
        }
        text = json_text(content)
        if text != self._written:
            write_text_durably(self.path / STATE, text)
            self._written = text

    def recipe_path(self, stage: Stage) -> Path:
        return self.path / RECIPES / f"{stage.name}.yaml"

    # -- the state of stages -------------------------------------------------------------------------------------------

    def standings(self) -> dict[str, Standing]:
        """Of every stage. Inputs from earlier stages that are not done are ignored."""
        found: dict[str, Standing] = {}
        for stage in self.pipeline.stages:
            found[stage.name] = self.standing(stage, {name for name, one in found.items() if one.word == "done"})
        return found

    def standing(self, stage: Stage, done: set[str]) -> Standing:
        """Of one stage. done: the earlier stages that are done."""
        record = self.records.get(stage.name)
        if not any(place.exists() for place in places(stage)):
            return Standing("waiting")
        if record is None or record.output != self._relative(stage.output):
            return Standing("begun")  # its own command decides
        ready = [one for one in stage.inputs if one.stage is None or one.stage in done]
        now = self.inputs(stage, ready)
        reasons = changes(record, stage, now)
        if reasons:
            return Standing("stale", tuple(reasons))
        if record.result is None:
            return Standing("begun")
        fault = self._fault(stage, record.result)
        if fault:
            return Standing("stale", (fault,))
        return Standing("done" if len(ready) == len(stage.inputs) else "begun")

    def inputs(self, stage: Stage, inputs: Sequence[Input]) -> dict[str, str]:
        """Fingerprints of inputs by key, of their tokenizers and templates, and of bases that only adapters name."""
        found = {one.name: self.fingerprints.of(one.wanted, one.path, stage.recipe) for one in inputs}
        for one in inputs:
            if one.wanted in ("checkpoint", "full checkpoint"):
                found[f"{TOKENIZER_OF}{one.name}"] = tokenizer_sha256(checkpoint(one.path).folder)
        for one in inputs if self._finds_bases(stage) else ():
            with suppress(UserError):  # if it is not found, the stage reports it
                base = checkpoint(one.path).base if one.wanted == "checkpoint" else None
                if base is not None:
                    found[f"base of {one.name}"] = self.fingerprints.of("full checkpoint", str(base))
        return found

    def _finds_bases(self, stage: Stage) -> bool:
        """Whether adapters go on the base that they name: the stage has no full checkpoint for them."""
        by_name = {one.name: one for one in stage.inputs}
        given = by_name.get("base", by_name.get("reference"))
        if given is None:
            return True
        with suppress(UserError):
            return checkpoint(given.path).is_adapter
        return False  # an earlier stage has not written it yet

    def result(self, stage: Stage) -> str:
        """Fingerprint of a stage's output."""
        gives = kinds()[stage.kind].gives
        if gives == "report":
            return file_of(stage.output / "report.json")
        return self.fingerprints.of(gives, str(stage.output))

    def _fault(self, stage: Stage, result: str) -> str:
        try:
            if self.result(stage) == result:
                return ""
        except (UserError, OSError) as error:
            return f"its output is incomplete: {error}"
        return f"its output in {stage.output} has changed since it finished"

    def _relative(self, place: Path) -> str:
        return os.path.relpath(place, self.path)

    # -- changes -------------------------------------------------------------------------------------------------------

    def begin(self, stage: Stage) -> None:
        """Record the settings and inputs of a stage that is about to run."""
        inputs = self.inputs(stage, stage.inputs)
        record = Record(stage.kind, self._relative(stage.output), stage.settings(), inputs)
        before = self.records.get(stage.name)
        if before is None or (before.settings, before.inputs, before.result) != (record.settings, inputs, None):
            self.records[stage.name] = record
        self.save()

    def finish(self, stage: Stage) -> str | None:
        """Record that a stage has finished; its verdict if it is a report."""
        verdict = None
        if kinds()[stage.kind].gives == "report":
            verdict = str(read_json(stage.output / "report.json").get("word"))
        record = asdict(self.records[stage.name])
        self.records[stage.name] = Record(**{**record, "result": self.result(stage), "verdict": verdict})
        self.save()
        return verdict

    def with_downstream(self, names: set[str]) -> list[Stage]:
        """These stages and all that depend on them, in the order of the pipeline."""
        chosen: set[str] = set()
        for stage in self.pipeline.stages:
            if stage.name in names or stage.upstream & chosen:
                chosen.add(stage.name)
        return [stage for stage in self.pipeline.stages if stage.name in chosen]

    def move_aside(self, stages: Sequence[Stage]) -> list[tuple[Path, Path]]:
        """Rename the outputs of these stages, the last one first; (from, to) of each.

        A kill in between leaves the first stage as it was: still stale.
        """
        moved = []
        for stage in reversed(stages):
            there = [place for place in places(stage) if place.exists()]
            number = next(n for n in range(1, 10**6) if not any(aside(place, n).exists() for place in places(stage)))
            with held_for_moving(stage.output):
                for place in there:
                    with disk_errors(place):
                        os.rename(place, aside(place, number))
                    moved.append((place, aside(place, number)))
            self.records.pop(stage.name, None)
            self.save()
        return moved


def read_state(folder: Path) -> dict[str, Any]:
    """The content of pipeline.json, or {}. Raises UserError if it cannot be read."""
    path = folder / STATE
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("toolkit") != TOOLKIT or content.get("version") != VERSION:
        raise UserError(f"{path}: was not written by this version of `dae run`; use a new `output`")
    return content


def changes(record: Record, stage: Stage, inputs: Mapping[str, str]) -> list[str]:
    """One line for each setting and input that differs from the record; missing inputs are ignored."""
    if record.stage != stage.kind:
        return changed({"stage": record.stage}, {"stage": stage.kind})
    schema = kinds()[stage.kind].schema
    try:
        recorded = recorded_values(record.settings, schema)
    except UserError as error:
        return [str(error)]
    settings = changed(recorded, recorded_values(stage.settings(), schema))
    contents = ({f"content of {name}": sha256 for name, sha256 in known.items()} for known in (record.inputs, inputs))
    return settings + changed_facts(*contents)


def places(stage: Stage) -> list[Path]:
    output = stage.output
    if kinds()[stage.kind].gives != "rows":
        return [output]
    return [output, *(output.with_name(output.name + ending) for ending in (".meta.json", ".partial"))]


def aside(place: Path, number: int) -> Path:
    return place.with_name(f"{place.name}.replaced-{number}")


@contextmanager
def held_for_moving(output: Path) -> Iterator[None]:
    """Raises UserError if a live process writes to the folder."""
    if not output.is_dir():
        yield
        return
    with hold(output / LOCK, str(output)):
        yield
