"""Reading rows: JSONL files, folders saved by `datasets`, hub data sets; each record checked before it is encoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kd.config import SourceRecipe
from kd.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_ENDINGS = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".gz", ".zst", ".arrow")

Form = Literal["messages", "pair", "chat pair", "text"]


def read_records(source: SourceRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, record) for every row of a source, in its order.

    The location is what messages to the user name: `rows.jsonl:7` is line 7, `folder[train][6]` the row with index 6.

    Raises:
        UserError: the source is missing, empty or unreadable, or a record has none of `record_form`'s forms.
    """
    path = Path(source.path)
    if path.is_file():
        rows: Iterator[tuple[str, Any]] = read_jsonl(source.path)
    else:
        dataset = open_folder(source) if path.is_dir() else open_hub_dataset(source)
        rows = ((f"{source.path}[{source.split}][{index}]", record) for index, record in enumerate(dataset))
    empty = True
    for location, record in rows:
        record_form(record, location)
        empty = False
        yield location, record
    if empty:
        raise UserError(f"{source.path}: has no rows; give a source with at least one, or remove it from the recipe")


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """Yields (`path:line`, value) for every line that is not blank; lines count from 1.

    Raises:
        UserError: the file cannot be read, or a line is no UTF-8 or no JSON.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", parse_line(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_line(line: bytes, location: str) -> Any:
    """One line of a JSONL file. Raises UserError where it is no UTF-8 or no JSON."""
    try:
        # "-sig": editors on Windows put a byte order mark before the first row.
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}: not valid JSON ({error.msg}, column {error.colno}); a JSONL file has one object on each line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{location}: JSON nested too deeply; a row is one flat object") from error


def open_folder(source: SourceRecipe) -> Iterable[Any]:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` (then `split` names the part)."""
    folder = Path(source.path)
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{source.path}: a folder, but none that `datasets` saved (no state.json or dataset_dict.json in it); "
            "give a JSONL file, or a folder made by save_to_disk"
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(source.path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source.path}: `datasets` cannot read it: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if source.split not in loaded:
        raise UserError(f"{source.path}: split: {source.split!r}: not there; it has {', '.join(map(str, loaded))}")
    split: datasets.Dataset = loaded[source.split]
    return split


def open_hub_dataset(source: SourceRecipe) -> Iterable[Any]:
    """A hub data set, `owner/name`, through `datasets` and its cache."""
    missing = f"{source.path}: no such file or folder"
    if not HUB_ID.fullmatch(source.path) or source.path.endswith(FILE_ENDINGS):
        raise UserError(f"{missing}; give a JSONL file, a folder saved by `datasets`, or a hub data set as owner/name")
    import datasets

    try:
        loaded: Iterable[Any] = datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{missing}, nor can it be read as a hub data set (split {source.split!r}): {error}") from error
    return loaded


def record_form(record: Any, location: str) -> Form:
    """Which form a record has. Other fields than those of its form (an id, a category) are passed over.

    Forms: `messages`, a conversation; `prompt` and `completion`, both text ("pair") or both lists of messages ("chat
    pair"); `text`.

    Raises:
        UserError: none of the forms, several at once, or a value that the form does not take.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{location}: a row is a JSON object, not {kind_of(record)}")
    present = {name for name in ("messages", "prompt", "completion", "text") if record.get(name) is not None}
    if "messages" in present and not present & {"completion", "text"}:
        check_messages(record["messages"], f"{location}: messages")
        return "messages"
    if {"prompt", "completion"} <= present and not present & {"messages", "text"}:
        return pair_form(record, location)
    if present == {"text"}:
        check_text(record["text"], f"{location}: text")
        return "text"
    if len(present) > 1:
        problem = f"`{'`, `'.join(sorted(present))}` together are ambiguous"
    else:
        problem = f"its fields are {', '.join(map(str, record)) or '(none)'}"
    raise UserError(f"{location}: {problem}; a row has `messages`, or `prompt` and `completion`, or `text`")


def pair_form(record: Mapping[str, Any], location: str) -> Literal["pair", "chat pair"]:
    """`record_form` for a record with `prompt` and `completion`."""
    kinds = {kind_of(record[name]) for name in ("prompt", "completion")}
    if kinds == {"text"}:
        for name in ("prompt", "completion"):
            check_text(record[name], f"{location}: {name}")
        return "pair"
    if kinds == {"a list"}:
        for name in ("prompt", "completion"):
            check_messages(record[name], f"{location}: {name}")
        return "chat pair"
    raise UserError(
        f"{location}: prompt is {kind_of(record['prompt'])}, completion is {kind_of(record['completion'])}; "
        "both are text, or both are lists of messages"
    )


def check_messages(messages: Any, where: str) -> None:
    """Raises UserError unless these are messages {role, content}; an assistant with `tool_calls` needs no content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: wants a list of at least one message, not {kind_of(messages)}")
    for index, message in enumerate(messages):
        place = f"{where}[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{place}: a message is an object with `role` and `content`, not {kind_of(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{place}.role: {role!r}: unknown role; the roles are {', '.join(ROLES)}")
        if message.get("content") is None and role == "assistant" and message.get("tool_calls"):
            continue
        check_text(message.get("content"), f"{place}.content")


def check_text(value: Any, where: str) -> None:
    """Raises UserError unless `value` is text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{where}: wants text, not {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair ({value[error.start]!a}) at character {error.start + 1}, which no "
            "tokenizer takes; repair the text"
        ) from error


def kind_of(value: Any) -> str:
    """A JSON value's kind, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "an empty list" if isinstance(value, Sequence) and not value else "a list"
