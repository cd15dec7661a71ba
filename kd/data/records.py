"""Reading rows: files (JSONL, JSON, CSV, parquet; gzip too), folders of them, `datasets` folders, hub data sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, AnyStr

from kd.config.data_recipe import SourceRecipe
from kd.config.in_memory_rows import InMemoryRows, recorded_in_memory
from kd.data.hub import could_be_on_the_hub, hub_dataset
from kd.data.messages import DuplicateKeyError, without_duplicates
from kd.data.record_forms import Record, record_of, texts_of
from kd.errors import UserError

# What a file is read as, by its name without `.gz`; other names are JSONL.
_BY_ENDING = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_READ_IN_FOLDERS = tuple(f".{kind}{gz}" for kind in ("jsonl", "ndjson", "json", "csv", "tsv") for gz in ("", ".gz"))
_READ_IN_FOLDERS += (".parquet",)
_NOT_READ = (".zst", ".arrow", ".bz2", ".xz", ".zip", ".xlsx", ".npz", ".pkl")
LONGEST_LINE, LONGEST_LIST = 1 << 28, 1 << 32  # bytes of a line, and of a list of rows in one .json file
PIECE = 1 << 24
PARQUET_ROWS = 1024  # read at a time
TEXTS_KEPT = 1000  # per source, for a look at what the tokenizer does to them
CHARACTERS_KEPT = 2000  # of each

csv.field_size_limit(1 << 30)  # a row's text may be long


@dataclass
class Reading:
    """What was seen of the rows of a source: formats, and keys that were not read, with numbers of rows; some texts.

    texts: of rows spread evenly over the source, at most `TEXTS_KEPT`; nulls_dropped: rows whose tools or calls lost
    null keys, as Arrow's padding.
    """

    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)
    nulls_dropped: int = 0
    _rows: int = 0
    _stride: int = 1

    def add(self, record: Record) -> None:
        """Count one row."""
        self.formats[record.format] += 1
        self.unread.update(record.unread)
        self.nulls_dropped += record.nulls_dropped
        if self._rows % self._stride == 0:
            self.texts.append("\n".join(texts_of(record.row))[:CHARACTERS_KEPT])
            if len(self.texts) > TEXTS_KEPT:
                self.texts = self.texts[::2]
                self._stride *= 2
        self._rows += 1


def read_records(source: SourceRecipe, reading: Reading | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, row) for every row of a source, in its order; rows are as `kd.data.record_forms.Record.row`.

    The location is what messages to the user name: `rows.jsonl:7` is line 7, `folder[train][6]` the row with index 6.

    Args:
        source: the path, its split and its format.
        reading: is filled in as rows are read.

    Raises:
        UserError: the source is missing, empty or unreadable, or a row has no shape that is known.
    """
    empty = True
    for location, raw, padded in read_raw(source):
        record = record_of(raw, location, source.format, padded)
        empty = False
        if reading is not None:
            reading.add(record)
        yield location, record.row
    if empty:
        raise UserError(f"{source.title}: has no rows; give a source with at least one, or remove it from the recipe")


Raw = tuple[str, Any, frozenset[str]]


def read_raw(source: SourceRecipe) -> Iterator[Raw]:
    """Yields (location, row as it lies there, its columns that Arrow fills up with nulls). Raises UserError."""
    if isinstance(source.path, InMemoryRows):
        padded = padded_columns(source.path.features)
        for index, row in enumerate(source.path):
            yield source.path.location(index), row, padded
        return
    path = Path(source.path)
    if path.is_file():
        yield from read_file(source.path)
        return
    if path.is_dir() and not is_saved_dataset(path):
        for file in files_of_folder(path, source.split):
            yield from read_file(str(file))
        return
    open_dataset = open_saved_dataset if path.is_dir() else open_hub_dataset
    dataset = open_dataset(source.path, source.split)
    padded = padded_columns(getattr(dataset, "features", None) or {})
    for index, row in enumerate(dataset):
        yield f"{source.path}[{source.split}][{index}]", row, padded


def padded_columns(features: Mapping[str, Any]) -> frozenset[str]:
    """The columns whose objects all get each other's keys, as null: structs do, values kept as JSON do not."""
    return frozenset(name for name, feature in features.items() if not holds_json(feature))


def holds_json(feature: Any) -> bool:
    """Whether a feature of `datasets` keeps JSON somewhere in it."""
    if isinstance(feature, Mapping):
        return any(map(holds_json, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(holds_json, feature))
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Json" or (inner is not None and holds_json(inner))


# -- files -------------------------------------------------------------------------------------------------------------


def read_file(path: str) -> Iterator[Raw]:
    """The rows of one file, by its ending. Raises UserError."""
    name = Path(path).name.lower()
    if name.endswith(_NOT_READ):
        raise UserError(f"{path}: this kind of file is not read; convert it to JSONL, CSV or parquet (gzip is fine)")
    kind = _BY_ENDING.get(Path(name.removesuffix(".gz")).suffix, "jsonl")
    if kind == "parquet":
        yield from read_parquet(path)
        return
    reader = {"json": read_json_file, "csv": read_csv}.get(kind, read_jsonl)
    for location, row in reader(path):
        yield location, row, frozenset()


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where it is gzip by its first bytes, whatever its name. Raises UserError."""
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                yield file
                return
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """Yields (`path:line`, value) for every line that is not blank; lines count from 1.

    Raises:
        UserError: the file cannot be read, or a line is no UTF-8 or no JSON.
    """
    with opened(path) as file:
        for number, line in enumerate(lines_of(file, path), 1):
            if line.strip():
                yield f"{path}:{number}", parse_line(line, f"{path}:{number}")


def lines_of(file: IO[AnyStr], path: str) -> Iterator[AnyStr]:
    """A file's lines. Raises UserError for one that no row has: packed zeros may unpack to any length."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise UserError(f"{path}:{number}: is longer than {LONGEST_LINE >> 20} MiB; a line holds one row")
        yield line


def parse_line(line: bytes, location: str) -> Any:
    """One line of a JSONL file. Raises UserError where it is no UTF-8 or no JSON, or names a key twice."""
    try:
        # "-sig": editors on Windows put a byte order mark before the first row.
        return json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"{location}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}: not valid JSON ({error.msg}, column {error.colno}); a JSONL file has one object on each line"
        ) from error
    except DuplicateKeyError as error:
        raise UserError(f"{location}: {error}; keep one") from error
    except RecursionError as error:
        raise UserError(f"{location}: JSON nested too deeply; a row is one flat object") from error


def read_json_file(path: str) -> Iterator[tuple[str, Any]]:
    """A `.json` file: one list of rows, else lines as in JSONL. Yields (`path[index]`, value). Raises UserError."""
    with opened(path) as file:
        content = bytearray()
        while piece := file.read(PIECE):  # asked for at once, all of the limit would be allocated
            content += piece
            if len(content) > LONGEST_LIST:
                limit = LONGEST_LIST >> 30
                raise UserError(f"{path}: holds more than {limit} GiB in one list; write one row on each line")
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected a list of objects, or one on each line") from error
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def read_csv(path: str) -> Iterator[tuple[str, Any]]:
    """A table with a header: every cell is text as it stands there. Yields (`path:line`, row). Raises UserError."""
    delimiter = "\t" if ".tsv" in Path(path).name.lower() else ","
    with opened(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(lines_of(lines, path), delimiter=delimiter, strict=True)
        begin = 1
        try:
            header = reader.fieldnames or []
            if len(set(header)) < len(header):
                raise UserError(f"{path}:1: duplicate column {max(header, key=list(header).count)!r}; rename one")
            begin = reader.line_num + 1
            for row in reader:
                location, begin = f"{path}:{begin}", reader.line_num + 1
                if None in row or None in row.values():
                    count = len(row.get(None, ())) + sum(value is not None for key, value in row.items() if key)
                    raise UserError(f"{location}: has {count} cells, the header has {len(header)}; repair the row")
                yield location, row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{begin}: not valid CSV in UTF-8 ({error}); save the file as UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path}:{begin}: not valid CSV in UTF-8 ({error}); repair the row") from error


def read_parquet(path: str) -> Iterator[Raw]:
    """Rows of a parquet file, with what `datasets` keeps as JSON in it. Raises UserError."""
    import pyarrow as pa
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            padded = padded_columns(features)
            for batch in file.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    whole = row if len(padded) == len(features) else features.decode_example(row)
                    yield f"{path}[{index}]", whole, padded
                    index += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


# -- folders and hub data sets -----------------------------------------------------------------------------------------


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def files_of_folder(folder: Path, split: str) -> list[Path]:
    """The data files below a folder that belong to a split, in order of their names.

    Files tell their split as `datasets` reads it from their names (`train.parquet`, `data/test-00000-of-00002.parquet`,
    `train/part.jsonl`); where none does, all are of `train`.

    Raises:
        UserError: there are none, or none of this split.
    """
    inside = sorted(file for file in folder.rglob("*") if file.is_file() and not is_hidden(file.relative_to(folder)))
    files = [file for file in inside if file.name.lower().endswith(_READ_IN_FOLDERS)]
    left = [file for file in inside if file.name.lower().endswith(_NOT_READ)]
    if left:
        raise UserError(f"{left[0]}: this kind of file is not read; convert it to JSONL, CSV or parquet, or remove it")
    if declares_files(folder / "README.md"):
        raise UserError(
            f"{folder}: its README.md declares which files belong to which split (configs); give the files "
            "themselves, each as a source"
        )
    if not files:
        raise UserError(
            f"{folder}: a folder without data files; give JSONL, JSON, CSV or parquet files (gzip too), or a "
            "folder made by save_to_disk"
        )
    splits = splits_of(folder, files)
    if split not in splits:
        raise UserError(f"{folder}: split: {split!r}: not there; it has {', '.join(splits)}")
    chosen = splits[split]
    stray = [file for file in files if not any(file in several for several in splits.values())]
    kinds = {Path(file.name.lower().removesuffix(".gz")).suffix for file in chosen}
    if stray or len(kinds) > 1:
        what = (
            f"{stray[0].name} belongs to no split by its name" if stray else f"has {' and '.join(sorted(kinds))} files"
        )
        raise UserError(f"{folder}: {what}; give the files themselves, each as a source")
    return chosen


def is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def declares_files(card: Path) -> bool:
    """Whether a data set's card has `configs` with `data_files` in its front matter."""
    if not card.is_file():
        return False
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    return (
        len(parts) == 3
        and not parts[0].strip()
        and re.search(r"^[ \t]+(- )?data_files:", parts[1], re.MULTILINE) is not None
    )


def splits_of(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Data files by the split that `datasets` takes them for."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        return {"train": files}
    by_path = {str(file.absolute()): file for file in files}
    found: dict[str, list[Path]] = {}
    for split, wanted in patterns.items():
        paths: set[str] = set()
        for pattern in wanted:
            with suppress(FileNotFoundError):  # one of several that nothing matches
                paths |= set(resolve_pattern(pattern, str(folder.absolute())))
        if taken := [file for path, file in by_path.items() if path in paths]:
            found[str(split)] = taken
    return found or {"train": files}


def open_saved_dataset(path: str, split: str) -> Iterable[Any]:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` (then `split` names the part)."""
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: `datasets` cannot read it: {error}; save it again") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"{path}: split: {split!r}: not there; it has {', '.join(map(str, loaded))}")
    found: datasets.Dataset = loaded[split]
    return found


def open_hub_dataset(path: str, split: str) -> Any:
    """A hub data set, `owner/name`, through `datasets` and its cache."""
    refuse_recorded_in_memory(path)
    if not could_be_on_the_hub(path):
        raise UserError(
            f"{path}: no such file or folder; give a file or folder of rows (JSONL, JSON, CSV, parquet), a folder "
            "saved by `datasets`, or a hub data set as owner/name"
        )
    return hub_dataset(path, split)


def refuse_recorded_in_memory(path: str) -> None:
    """Raise UserError where a path, as a run folder records it, stands for rows that were in memory."""
    if recorded_in_memory(path):
        raise UserError(f"{path}: these rows were in memory, and no run folder keeps them; give them again")
