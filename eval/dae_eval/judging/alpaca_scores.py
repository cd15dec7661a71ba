"""AlpacaEval's win rate from annotations, and the length-controlled rate of its own package."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dae_eval.judging.readings import counted
from kd.data.messages import kind_of
from kd.errors import UserError

NOT_IN_FILE = "not in file"
UNRATED = "unrated"  # key of an annotation of ours: why it has no preference
GAMED_FILE = "df_gamed.csv of the data set tatsu-lab/alpaca_eval"
EXTRA = "pip install -e '.[alpaca]'"
_TIE = 1.5
# SHA-256 of AlpacaEval's 805 instructions as a JSON list, in the order of its evaluation set and published annotations.
PUBLISHED_ORDER = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"


@dataclass(frozen=True)
class Annotation:
    """A judge's preference between the baseline's output (1) and the model's (2).

    preference: from 1 (the baseline's is better) to 2 (the model's is better), 1.5 for a tie; None: the judge gave
    none. Texts are None if they are not in the file. row: the whole annotation from the file.
    """

    index: int
    instruction: str | None
    dataset: str
    baseline: str
    model: str
    baseline_output: str | None
    output: str | None
    annotator: str
    preference: float | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class WinRate:
    """Percent. standard_error: None for a single preference. dropped: annotations without a preference.

    unrated: how many of them for which reason, if the file says it. Mean lengths in characters, None if the texts are
    not in the file.
    """

    win_rate: float
    standard_error: float | None
    preferences: int
    wins: int
    losses: int
    ties: int
    dropped: int
    unrated: Mapping[str, int]
    mean_length: float | None
    baseline_mean_length: float | None


@dataclass(frozen=True)
class LengthControlled:
    """Percent, or the reason why there is no rate."""

    win_rate: float | None
    standard_error: float | None
    missing: str = ""


def read_rows(path: Path, flag: str) -> list[dict[str, Any]]:
    """The objects of one of AlpacaEval's files, which are JSON lists. Raises UserError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error}); give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{flag} {path}: not valid JSON ({error}); AlpacaEval's files are one list of objects"
        ) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{flag} {path}: expected a list of at least one object, not {kind_of(rows)}")
    return rows


def text_of(row: Mapping[str, Any], key: str, location: str) -> str:
    """A required string. Raises UserError."""
    if not isinstance(row.get(key), str):
        raise UserError(f"{location}: {key}: expected a string, not {kind_of(row.get(key))}")
    return str(row[key])


def read_annotations(path: Path, flag: str = "--annotations") -> list[Annotation]:
    """Annotations of one model against one baseline.

    Raises:
        UserError: an annotation has no valid preference or generators, or there are several models or baselines.
    """
    annotations = [_annotation(row, index, f"{path}: row {index}") for index, row in enumerate(read_rows(path, flag))]
    for what, names in (
        ("generator_2", {annotation.model for annotation in annotations}),
        ("generator_1", {annotation.baseline for annotation in annotations}),
    ):
        if len(names) > 1:
            raise UserError(
                f"{path}: {what}: several names ({', '.join(sorted(names))}); expected one model and baseline"
            )
    return annotations


def _annotation(row: Mapping[str, Any], index: int, location: str) -> Annotation:
    preference = row.get("preference")
    if preference is not None:
        if isinstance(preference, bool) or not isinstance(preference, int | float):
            raise UserError(f"{location}: preference: expected a number or null, not {kind_of(preference)}")
        # NaN is how pandas writes a missing one, 0 how older files write a tie.
        preference = None if math.isnan(preference) else _TIE if preference == 0 else float(preference)
    if preference is not None and not 1 <= preference <= 2:
        raise UserError(f"{location}: preference: {preference}: expected 1 (baseline) to 2 (model), or null")
    return Annotation(
        index=index,
        instruction=_text_or_none(row.get("instruction")),
        dataset=_text_or_none(row.get("dataset")) or "",
        baseline=text_of(row, "generator_1", location),
        model=text_of(row, "generator_2", location),
        baseline_output=_text_or_none(row.get("output_1")),
        output=_text_or_none(row.get("output_2")),
        annotator=_text_or_none(row.get("annotator")) or "(unknown)",
        preference=preference,
        row=row,
    )


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def occurrences(annotations: Sequence[Annotation]) -> list[int]:
    """For each annotation: how often its instruction of its data set was there before."""
    seen, found = Counter[tuple[str, str | int]](), []
    for annotation in annotations:
        key = (annotation.dataset, annotation.index if annotation.instruction is None else annotation.instruction)
        found.append(seen[key])
        seen[key] += 1
    return found


def win_rate(annotations: Sequence[Annotation]) -> WinRate:
    """100 x mean(preference - 1) and 100 x its standard error (n - 1 in the variance), as the package computes them.

    Raises:
        UserError: no annotation has a preference.
    """
    shares = [annotation.preference - 1 for annotation in annotations if annotation.preference is not None]
    problems = [annotation.row.get(UNRATED) for annotation in annotations if annotation.preference is None]
    unrated = [problem for problem in problems if isinstance(problem, str)]
    if not shares:
        why = f" ({counted(unrated)})" if unrated else ""
        raise UserError(f"no annotation has a preference{why}; check the judge's replies")
    standard_error = 100 * statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
    return WinRate(
        win_rate=100 * math.fsum(shares) / len(shares),
        standard_error=standard_error,
        preferences=len(shares),
        wins=sum(share > 0.5 for share in shares),
        losses=sum(share < 0.5 for share in shares),
        ties=sum(share == 0.5 for share in shares),
        dropped=len(annotations) - len(shares),
        unrated=dict(Counter(unrated).most_common()),
        mean_length=_mean_length([annotation.output for annotation in annotations]),
        baseline_mean_length=_mean_length([annotation.baseline_output for annotation in annotations]),
    )


def _mean_length(texts: Sequence[str | None]) -> float | None:
    lengths = [len(text) for text in texts if text is not None]
    return math.fsum(lengths) / len(lengths) if len(lengths) == len(texts) else None


def length_controlled(
    annotations: Sequence[Annotation], gamed_file: Path | None, order: Sequence[str] | None = None
) -> LengthControlled:
    """The length-controlled win rate by the package's own model (arXiv 2404.04475), or the reason why there is none.

    gamed_file: the package's df_gamed.csv, which it would download from the hub. It numbers the instructions of the
    evaluation set, while the package takes a row's place for its number. order: the instructions in the evaluation
    set's order; without it the annotations must be AlpacaEval's own, in their order.

    Raises:
        UserError: the file is invalid, an instruction is not in the list, or the package is not installed.
    """
    if gamed_file is None:
        return LengthControlled(None, None, "needs the package's df_gamed.csv (--gamed-file)")
    if not gamed_file.is_file():
        raise UserError(f"--gamed-file {gamed_file}: not found; expected {GAMED_FILE}")
    if any(annotation.output is None or annotation.baseline_output is None for annotation in annotations):
        return LengthControlled(None, None, f"the outputs (output_1, output_2) are {NOT_IN_FILE}")
    own = [annotation.instruction for annotation in annotations]
    if order is None and hashlib.sha256(json.dumps(own).encode()).hexdigest() != PUBLISHED_ORDER:
        return LengthControlled(None, None, "not AlpacaEval's 805 in order: give --instructions")
    rows = [{**annotation.row, "preference": annotation.preference} for annotation in annotations]
    if order is not None:
        rows = [{**rows[place], "index": number} for number, place in numbered(annotations, order).items()]
    with _package() as package:
        # The package has no argument for the file's path, so its download function returns it.
        fetch, package.hf_hub_download = package.hf_hub_download, lambda **_: str(gamed_file)
        try:
            # Without save_weights_dir=None it writes into its own installation.
            found = package.get_length_controlled_winrate(rows, save_weights_dir=None)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"--gamed-file {gamed_file}: the length-controlled rate cannot be computed ({error!r}); it needs "
                f"{GAMED_FILE} and annotations of its instructions"
            ) from error
        finally:
            package.hf_hub_download = fetch
    return LengthControlled(float(found["length_controlled_winrate"]), float(found["lc_standard_error"]))


def numbered(annotations: Sequence[Annotation], order: Sequence[str]) -> dict[int, int]:
    """The place of each annotation by its instruction's number in `order`, ascending.

    So neither the order of the file nor a missing row changes the number of an instruction.

    Raises:
        UserError: an instruction is not in `order`, or more often than there.
    """
    numbers: dict[str | None, list[int]] = {}
    for number, instruction in enumerate(order):
        numbers.setdefault(instruction, []).append(number)
    found = {}
    for place, annotation in enumerate(annotations):
        left = numbers.get(annotation.instruction)
        if not left:
            raise UserError(
                f"--instructions: the instruction of annotation {annotation.index} is missing, or duplicated in the "
                "annotations; give the instructions that were annotated"
            )
        found[left.pop(0)] = place
    return dict(sorted(found.items()))


@contextmanager
def _package() -> Iterator[Any]:
    """The package's module of length control; the environment and scikit-learn's configuration are restored.

    On import it reads .env files into the environment, and its model changes scikit-learn's global configuration.
    """
    environment = dict(os.environ)
    try:
        glm_winrate = import_module("alpaca_eval.metrics.glm_winrate")
        scikit_learn = import_module("sklearn")
    except ImportError as error:
        raise UserError(f"--gamed-file: the package alpaca_eval cannot be imported ({error}): {EXTRA}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    with scikit_learn.config_context():
        yield glm_winrate
