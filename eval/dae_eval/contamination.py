"""Contamination: documents of an evaluation whose text occurs in the training rows of a model or of its run's teachers.

A text occurs in a row if it matches word for word; letter case and the amount of white space are ignored, and a match
starts and ends at word boundaries. All parts of a row count (prompt, completion, messages, text), joined in order.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dae_eval.results import TrainingRows
from kd.config.data_recipe import SourceRecipe
from kd.config.in_memory_rows import recorded_in_memory
from kd.config.layering import parse_file
from kd.data.fingerprint import data_sha256
from kd.data.hub import HUB_ID
from kd.data.record_forms import texts_of
from kd.data.records import read_records
from kd.runs.provenance import read_provenance

ANCHOR = 8  # words by which a text is looked up before it is compared
_WORDS = re.compile(r"\w+|[^\w\s]")
_RECIPE = "recipe.yaml"


class ContaminatedTexts:
    """The texts that occur in the rows added so far: exact, in one pass, with memory for the texts only.

    Each text is looked up by one run of up to `ANCHOR` words, the one that it shares with the fewest other texts
    (beginnings such as "Question:" are shared by all). The whole text is compared where that run is found.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._found: set[str] = set()
        self._by_run: dict[tuple[str, ...], set[str]] = defaultdict(set)
        self._lengths: dict[str, set[int]] = defaultdict(set)  # of the runs that begin with a word
        words_of = {text: _WORDS.findall(text) for text in {normalised(text) for text in texts}}
        shared = Counter(run for words in words_of.values() for run in set(_runs(words)))
        for text, words in words_of.items():
            if words:
                run = min(_runs(words), key=lambda run: shared[run])
                self._by_run[run].add(text)
                self._lengths[run[0]].add(len(run))

    def add_row(self, row: str) -> None:
        whole = normalised(row)
        words = _WORDS.findall(whole)
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                waiting = self._by_run.get(tuple(words[start : start + length]))
                if waiting:
                    found = {text for text in waiting if _occurs_in(text, whole)}
                    waiting -= found
                    self._found |= found

    def __contains__(self, text: str) -> bool:
        return normalised(text) in self._found


def normalised(text: str) -> str:
    """The text in one letter case, with every run of white space as one space."""
    return " ".join(text.casefold().split())


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    length = min(ANCHOR, len(words))
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _occurs_in(text: str, row: str) -> bool:
    """Whether the text occurs in the row, at word boundaries; both are normalised."""
    start = row.find(text)
    while start >= 0:
        end = start + len(text)
        cut_before = start > 0 and _is_word(row[start - 1]) and _is_word(text[0])
        cut_after = end < len(row) and _is_word(row[end]) and _is_word(text[-1])
        if not cut_before and not cut_after:
            return True
        start = row.find(text, start + 1)
    return False


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def row_text(record: Mapping[str, Any]) -> str:
    """All text of a training row, as kd.data.records reads it, in order."""
    return " ".join(texts_of(record))


def training_rows(paths: Sequence[str]) -> list[tuple[TrainingRows, SourceRecipe | None]]:
    """The sources that models were trained on, from their runs, the runs of their bases and teachers, and so on.

    Each comes with a recipe's source to read it by, or with None and the problem if it is missing or has changed.
    Models that are not run folders of dae have none.
    """
    found: dict[tuple[str, str, str], tuple[TrainingRows, SourceRecipe | None]] = {}
    waiting, done = list(paths), set[Path]()
    while waiting:
        folder = Path(waiting.pop(0))
        if not folder.is_dir() and _is_place(str(folder)):
            problem = "teacher or base not found, so its training rows are unknown"
            found.setdefault((str(folder), "", ""), (TrainingRows(str(folder), "", problem), None))
        if folder.resolve() in done or (provenance := read_provenance(folder)) is None:
            continue
        done.add(folder.resolve())
        recipe = _recipe(folder)
        for route, sources in provenance["data"].items():
            if route.startswith("eval."):
                continue
            for place, source in enumerate(sources):
                how = _how_read(recipe, route, place)
                found.setdefault((source["path"], source["sha256"], str(how)), _source(folder, source, how))
        waiting += _model_paths(recipe)
    return list(found.values())


def _is_place(name: str) -> bool:
    """Whether the name of a missing folder is a path and not a hub id."""
    return "/" in name and (not HUB_ID.fullmatch(name) or Path(name).parent.is_dir())


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / _RECIPE
    return parse_file(path)[1] if path.is_file() else {}


def _how_read(recipe: Mapping[str, Any], route: str, place: int) -> dict[str, Any]:
    """A source's split and format, where the recipe names them."""
    try:
        source = recipe["data"][route][place]
        return {key: source[key] for key in ("split", "format") if source.get(key) is not None}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}


def _model_paths(recipe: Mapping[str, Any]) -> list[str]:
    experts = recipe.get("expert")
    teachers = experts.values() if isinstance(experts, Mapping) else ()
    named = [recipe.get("base"), recipe.get("reference"), recipe.get("student_from"), *teachers]
    return [name for name in named if isinstance(name, str)]


def _source(
    folder: Path, source: Mapping[str, str], how: Mapping[str, Any]
) -> tuple[TrainingRows, SourceRecipe | None]:
    path, sha256 = source["path"], source["sha256"]
    problem = ""
    if recorded_in_memory(path):
        problem = f"no run folder keeps such rows; {folder} was trained on them"
    elif not Path(path).exists():  # a hub data set is not fetched for this
        problem = f"not found; {folder} was trained on it"
    elif data_sha256(path) != sha256:
        problem = f"has changed since {folder} was trained on it"
    return TrainingRows(path, sha256, problem), None if problem else SourceRecipe(path=path, **how)


def contaminated_texts(texts: Iterable[str], source: SourceRecipe) -> ContaminatedTexts:
    """Those of the texts that occur in the rows of a source. Raises UserError if a row cannot be read."""
    found = ContaminatedTexts(texts)
    for _, record in read_records(source):
        found.add_row(row_text(record))
    return found
