"""The folder of an evaluation (see dae_eval.results): crash-safe writing, and reading."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from dae_eval.results import Document, Evaluation, HeldOutLoss, ModelFacts, TaskResult, TrainingRows
from kd.errors import UserError
from kd.runs.claimed_folder import ClaimedFolder
from kd.runs.files import disk_errors, json_text, plain, read_json, write_bytes_durably, write_text_durably
from kd.runs.settings import changed, refuse_changes

EVALUATION = "evaluation.json"
DOCUMENTS = "documents"
HELD_OUT = "held_out"
FORMAT = "dae-align evaluation"
VERSION = 1
MOST_UNPACKED = 1 << 32  # bytes of a task's documents
KEY_DIGITS = 32  # 128 bits
_ADDED = ("weight", "unit", "total", "benchmark", "share")
_TASK = TypeAdapter(TaskResult)


class _Rest(BaseModel):
    """What evaluation.json holds beside its tasks."""

    model: ModelFacts
    conditions: dict[str, Any]
    held_out: tuple[HeldOutLoss, ...]
    training_rows: tuple[TrainingRows, ...]
    training: tuple[dict[str, Any], ...]


_REST = tuple(_Rest.model_fields)

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def read_evaluation(folder: Path) -> Evaluation:
    """The finished evaluation in `folder`.

    Raises:
        UserError: there is none, it has not finished, or its files have changed.
    """
    path = folder / EVALUATION
    if not path.is_file():
        unfinished = (folder / DOCUMENTS).is_dir()
        why = "not finished; run its `dae eval` command again" if unfinished else "not an evaluation"
        raise UserError(f"{folder}: {why} ({EVALUATION} not found)")
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise UserError(f"{path}: not a {FORMAT} of version {VERSION}; write it again with `dae eval`")
    try:
        rest = _Rest.model_validate_json(json.dumps(content), strict=True)
        return Evaluation(tasks=_tasks(folder, content["tasks"]), **{key: getattr(rest, key) for key in _REST})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: incomplete: {key}: {first['msg']}; write it again with `dae eval`") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: incomplete ({error!r}); write it again with `dae eval`") from error


def _tasks(folder: Path, listed: Sequence[Mapping[str, Any]]) -> dict[str, TaskResult]:
    """The tasks by name. Raises UserError if one is listed twice, or its facts or scores are invalid."""
    tasks: dict[str, TaskResult] = {}
    for facts in listed:
        result = _task_result(folder, facts)
        if result.task in tasks:
            raise UserError(f"{folder / EVALUATION}: task {result.task}: duplicate task; evaluate the model again")
        tasks[result.task] = result
    return tasks


def _task_result(folder: Path, facts: Mapping[str, Any]) -> TaskResult:
    known = {name: value for name, value in facts.items() if name not in ("file", "sha256", "n")}
    path, where = folder / facts["file"], f"{folder / EVALUATION}: task {facts['task']}"
    if Path(facts["file"]).parts != (DOCUMENTS, path.name):
        raise UserError(f"{where}: file: {facts['file']!r}: lies outside of {DOCUMENTS}/; evaluate the model again")
    try:
        TaskResult(**known, documents=())  # TypeError: a key is missing or unknown
        result = _TASK.validate_json(json.dumps({**known, "documents": []}), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['input']!r}: {first['msg']}; evaluate the model again") from error
    if result.is_loss and result.kind != "shown":
        raise UserError(f"{where}: kind: {result.kind}: {result.unit} is a loss, which can only be `shown`")
    if not 0 < result.share <= 1:
        raise UserError(f"{where}: share: {result.share!r}: expected a number above 0, at most 1")
    result = replace(result, documents=read_documents(path, facts["sha256"]))
    refuse_invalid_scores(result, path)
    return result


def refuse_invalid_scores(result: TaskResult, path: Path) -> None:
    """Raise UserError if a score is not finite or outside of its range (0 to 1; of losses, from 0 on)."""
    if not result.documents:
        raise UserError(f"{path}: task {result.task}: has no documents; run the `dae eval` command again")
    for document in result.documents:
        where = f"{path}: task {result.task}, document {document.id}"
        if not is_number(document.score) or document.score < 0 or (document.score > 1 and not result.is_loss):
            expected = "a number from 0 on" if result.is_loss else "a number from 0 to 1"
            raise UserError(f"{where}: score: {document.score!r}: expected {expected}; evaluate the model again")
        if not is_number(document.weight) or document.weight < 0:
            raise UserError(
                f"{where}: weight: {document.weight!r}: expected a number from 0 on; evaluate the model again"
            )
    if not any(document.weight for document in result.documents):
        raise UserError(f"{path}: task {result.task}: all documents have weight 0; evaluate the model again")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def write_evaluation(folder: Path, evaluation: Evaluation, keys: Mapping[str, str] | None = None) -> None:
    """Write an evaluation, its documents first and evaluation.json last; unchanged files are not rewritten.

    keys: for the file name of each task, a digest of all that its scores depend on; `default_key` if missing.

    Raises:
        UserError: the folder cannot be written.
        MachineError: the disk is full.
    """
    names = {
        task: documents_name(task, (keys or {}).get(task) or default_key(evaluation, result))
        for task, result in evaluation.tasks.items()
    }
    contents = {names[task]: pack_documents(result.documents) for task, result in evaluation.tasks.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(evaluation.model),
        "tasks": [_facts_of(result, names[task], contents[names[task]]) for task, result in evaluation.tasks.items()],
        "conditions": evaluation.conditions,
        "held_out": [asdict(line) for line in evaluation.held_out],
        "training_rows": [asdict(line) for line in evaluation.training_rows],
        "training": list(evaluation.training),
    }
    changed = {name: packed for name, packed in contents.items() if not _is(folder / name, packed)}
    if changed:  # a reader must not take new documents for old ones
        with disk_errors(folder):
            (folder / DOCUMENTS).mkdir(parents=True, exist_ok=True)
            (folder / EVALUATION).unlink(missing_ok=True)
    for name, packed in changed.items():
        write_bytes_durably(folder / name, packed)
    text = json_text(plain(content))
    if not _is(folder / EVALUATION, text.encode()):
        write_text_durably(folder / EVALUATION, text)


def _facts_of(result: TaskResult, name: str, packed: bytes) -> dict[str, Any]:
    facts = _without_defaults(result)
    del facts["documents"]
    return {**facts, "n": len(result.documents), "file": name, "sha256": hashlib.sha256(packed).hexdigest()}


def _without_defaults(value: Document | TaskResult) -> dict[str, Any]:
    """The fields of a document or task; those that release 0.1.0 did not have only if they are not the default."""
    return {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if field.name not in _ADDED or getattr(value, field.name) != field.default
    }


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def default_key(evaluation: Evaluation, result: TaskResult) -> str:
    """The key of a task's documents from model, task and settings."""
    model = evaluation.model
    facts = {"model": model.fingerprint, "base": model.base_fingerprint}
    return digest({**facts, "task": result.task, "version": result.version, "metric": result.metric, **result.settings})


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 over facts in any order, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(plain(facts), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def documents_name(task: str, key: str) -> str:
    return f"{DOCUMENTS}/{_UNSAFE.sub('-', task)}-{key[:KEY_DIGITS]}.jsonl.gz"


def pack_documents(documents: Iterable[Document]) -> bytes:
    """One line of JSON per document, compressed; the same documents give the same bytes."""
    lines = "".join(json.dumps(_without_defaults(document), ensure_ascii=False) + "\n" for document in documents)
    return gzip.compress(lines.encode("utf-8", "surrogatepass"), mtime=0)


def read_documents(path: Path, sha256: str | None = None) -> tuple[Document, ...]:
    """The documents of a file that `pack_documents` made.

    Raises:
        UserError: it is missing or damaged, or its SHA-256 is not `sha256`.
    """
    remedy = "remove it and run the `dae eval` command again"
    try:
        packed = path.read_bytes()
        if sha256 is not None and hashlib.sha256(packed).hexdigest() != sha256:
            raise UserError(f"{path}: has changed since {EVALUATION} was written; {remedy}")
        # Not splitlines(): answers may contain other line separators, which JSON does not escape.
        lines = unpacked(packed).decode("utf-8", "surrogatepass").split("\n")
        return tuple(_document(line) for line in lines if line)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; run the `dae eval` command again") from error
    except (OSError, EOFError, ValueError, TypeError, RecursionError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error


def _document(line: str) -> Document:
    """Not by pydantic: answers may hold halves of surrogate pairs. Raises ValueError, TypeError."""
    document = Document(**json.loads(line))
    texts = (document.hash, document.prompt, document.target, document.answer, document.cluster, document.category)
    if type(document.id) is not int or type(document.seen) is not bool or not all(type(text) is str for text in texts):
        raise ValueError(f"document {document.id!r:.40}: a value has another type")
    return document


def unpacked(packed: bytes) -> bytes:
    """What gzip bytes hold. Raises ValueError where that is more than documents ever are, or an error of zlib."""
    stream = zlib.decompressobj(wbits=31)
    content = stream.decompress(packed, MOST_UNPACKED)
    if stream.unconsumed_tail:
        raise ValueError(f"its {len(packed)} bytes unpack to more than {MOST_UNPACKED}")
    if not stream.eof:
        raise EOFError("its end is missing")
    return content


def evaluation_folder(folder: Path) -> ClaimedFolder:
    """The folder of an evaluation of tasks, which has no other files."""
    return ClaimedFolder(folder, None, own=frozenset({EVALUATION, DOCUMENTS, HELD_OUT}), inside=(DOCUMENTS, HELD_OUT))


def refuse_other_model(folder: Path, model: ModelFacts) -> None:
    """Raise UserError if `folder` has the finished evaluation of another model."""
    if not (folder / EVALUATION).is_file():
        return
    recorded = read_json(folder / EVALUATION).get("model")
    before, now = (recorded if isinstance(recorded, dict) else {}), asdict(model)
    if any(before.get(key) != now[key] for key in ("fingerprint", "base_fingerprint")):
        keys = ("path", "fingerprint", "base_fingerprint")
        sides = ({f"model.{key}": side.get(key) for key in keys} for side in (before, now))
        refuse_changes(folder, changed(*sides))
