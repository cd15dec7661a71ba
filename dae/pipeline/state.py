"""What a pipeline's folder knows: which stages have run, from what, and whether that still holds.

OUTPUT/
  .lock            held (flock) by the living process
  pipeline.json    of each stage that was begun: settings, fingerprints of its inputs and of its result
  recipes/         the resolved recipe of each stage, as its own command reads it
  NAME/ ...        what the stages wrote; NAME.replaced-1 is what `--redo` moved aside
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
    """What a stage was begun from, and, once it has finished, the fingerprint of its result."""

    stage: str
    output: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    result: str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Standing:
    """Where a stage stands: `stale` means that what it wrote is not what it would write now, for these reasons."""

    word: Word
    reasons: tuple[str, ...] = ()


class Fingerprints:
    """SHA-256 of models, rows and results.

    Files whose sizes and times of writing are as they were are not read again.
    """

    def __init__(self, known: Mapping[str, Mapping[str, str]]) -> None:
        self.known = {key: dict(entry) for key, entry in known.items()}

    def of(self, wanted: Reads, path: str, recipe: Any = None) -> str:
        """Of an input or a result. recipe: the stage's, whose suite it is. Raises UserError where it cannot be had."""
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
    """Digest of names, sizes and times of writing: of a file, of a folder's files, or of all files below it."""
    files = [place] if place.is_file() else sorted(place.rglob("*") if deep else place.iterdir())
    facts = [(str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    facts = [fact for fact in facts if fact[0] != LOCK]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()


def file_of(path: Path) -> str:
    """SHA-256 of a file that a finished stage has. Raises UserError where it is not there."""
    if not path.is_file():
        raise UserError(f"{path.parent}: has no {path.name}")
    return file_sha256(path)


def suite_sha256(recipe: EvalStage | ReportStage) -> str:
    """Digest of a suite with all that it names: its keys, its tasks, held-out rows, and paths in its metadata.

    Raises:
        UserError: the suite has mistakes, or names what is not there.
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
        """Write pipeline.json, if anything in it has changed."""
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
        """Where a stage's resolved recipe is kept."""
        return self.path / RECIPES / f"{stage.name}.yaml"

    # -- where stages stand --------------------------------------------------------------------------------------------

    def standings(self) -> dict[str, Standing]:
        """Of every stage. What waits for an earlier stage is judged by all else."""
        found: dict[str, Standing] = {}
        for stage in self.pipeline.stages:
            found[stage.name] = self.standing(stage, {name for name, one in found.items() if one.word == "done"})
        return found

    def standing(self, stage: Stage, done: set[str]) -> Standing:
        """Of one stage. done: the earlier stages whose outputs are what they should be."""
        record = self.records.get(stage.name)
        if not any(place.exists() for place in places(stage)):
            return Standing("waiting")
        if record is None or record.output != self._relative(stage.output):
            return Standing("begun")  # its own command judges what is there
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
        """Fingerprint of each input by its key; of each checkpoint's tokenizer and templates, which decide what rows
        become; and of each base that only an adapter among them names.
        """
        found = {one.name: self.fingerprints.of(one.wanted, one.path, stage.recipe) for one in inputs}
        for one in inputs:
            if one.wanted in ("checkpoint", "full checkpoint"):
                found[f"{TOKENIZER_OF}{one.name}"] = tokenizer_sha256(checkpoint(one.path).folder)
        for one in inputs if self._finds_bases(stage) else ():
            with suppress(UserError):  # where it cannot be had, the stage will say so
                base = checkpoint(one.path).base if one.wanted == "checkpoint" else None
                if base is not None:
                    found[f"base of {one.name}"] = self.fingerprints.of("full checkpoint", str(base))
        return found

    def _finds_bases(self, stage: Stage) -> bool:
        """Whether a stage's adapters stand on what they name: it is not told of a full checkpoint to put them on."""
        by_name = {one.name: one for one in stage.inputs}
        told = by_name.get("base", by_name.get("reference"))
        if told is None:
            return True
        with suppress(UserError):
            return checkpoint(told.path).is_adapter
        return False  # an earlier stage is yet to write it

    def result(self, stage: Stage) -> str:
        """Fingerprint of what a stage has written."""
        gives = kinds()[stage.kind].gives
        if gives == "report":
            return file_of(stage.output / "report.json")
        return self.fingerprints.of(gives, str(stage.output))

    def _fault(self, stage: Stage, result: str) -> str:
        try:
            if self.result(stage) == result:
                return ""
        except (UserError, OSError) as error:
            return f"its output is not whole: {error}"
        return f"its output in {stage.output} has changed since it finished"

    def _relative(self, place: Path) -> str:
        return os.path.relpath(place, self.path)

    # -- what happens --------------------------------------------------------------------------------------------------

    def begin(self, stage: Stage) -> None:
        """Note what a stage is about to run from."""
        inputs = self.inputs(stage, stage.inputs)
        record = Record(stage.kind, self._relative(stage.output), stage.settings(), inputs)
        before = self.records.get(stage.name)
        if before is None or (before.settings, before.inputs, before.result) != (record.settings, inputs, None):
            self.records[stage.name] = record
        self.save()

    def finish(self, stage: Stage) -> str | None:
        """Note that a stage has finished; the word of its verdict, where it is a report."""
        verdict = None
        if kinds()[stage.kind].gives == "report":
            verdict = str(read_json(stage.output / "report.json").get("word"))
        record = asdict(self.records[stage.name])
        self.records[stage.name] = Record(**{**record, "result": self.result(stage), "verdict": verdict})
        self.save()
        return verdict

    def with_downstream(self, names: set[str]) -> list[Stage]:
        """These stages and all that read of them, directly or not, in the order of the pipeline."""
        chosen: set[str] = set()
        for stage in self.pipeline.stages:
            if stage.name in names or stage.upstream & chosen:
                chosen.add(stage.name)
        return [stage for stage in self.pipeline.stages if stage.name in chosen]

    def move_aside(self, stages: Sequence[Stage]) -> list[tuple[Path, Path]]:
        """Rename what these stages have written, the last one first; (from, to) of each.

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
    """The content of pipeline.json; empty where there is none. Raises UserError where it cannot be read."""
    path = folder / STATE
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("toolkit") != TOOLKIT or content.get("version") != VERSION:
        raise UserError(f"{path}: was not written by this version of `dae run`; give `output` a new folder")
    return content


def changes(record: Record, stage: Stage, inputs: Mapping[str, str]) -> list[str]:
    """One line for each setting and input that is not what the record says; inputs that are not given are left out."""
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
    """All that a stage writes."""
    output = stage.output
    if kinds()[stage.kind].gives != "rows":
        return [output]
    return [output, *(output.with_name(output.name + ending) for ending in (".meta.json", ".partial"))]


def aside(place: Path, number: int) -> Path:
    """Where `--redo` moves something to."""
    return place.with_name(f"{place.name}.replaced-{number}")


@contextmanager
def held_for_moving(output: Path) -> Iterator[None]:
    """Refuse to move a folder that a live process writes. Raises UserError."""
    if not output.is_dir():
        yield
        return
    with hold(output / LOCK, str(output)):
        yield
