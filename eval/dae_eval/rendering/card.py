"""The report in a student's model card: a section of its own, and the hub's `model-index` metadata.

An earlier report is replaced; everything else in the card stays as it is, byte for byte.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from dae_eval.rendering import markdown
from dae_eval.report import Report, TaskLine
from dae_eval.units import FULL_SCALE
from kd.errors import UserError
from kd.runs.files import write_bytes_durably

BEGIN, END = "<!-- dae report: begin -->", "<!-- dae report: end -->"
SOURCE = "dae-align"
_METADATA = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_MODEL_INDEX = re.compile(r"^model-index:.*?(?=^[^\s#-]|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A model card without an earlier report.

    metadata: the YAML without its `model-index`; name, others: of that index, the model and results from elsewhere.
    before, after: the text around the report. ending: of a line.
    """

    metadata: str
    name: str
    others: tuple[Any, ...]
    before: str
    after: str
    ending: str


def read_card(path: Path) -> Card:
    """The card at `path`; where there is none, a new one.

    Raises:
        UserError: its folder does not exist, its metadata cannot be read, or an earlier report is damaged.
    """
    if not path.parent.is_dir():
        raise UserError(f"--card {path}: folder {path.parent} not found; give the README.md of the student's folder")
    title = path.absolute().parent.name
    try:
        raw = path.read_bytes().decode("utf-8") if path.exists() else f"\n# {title}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card {path}: cannot be read: {error}") from error
    text = raw.replace("\r\n", "\n")
    found = _METADATA.match(text)
    metadata, text = (found[1], text[found.end() :]) if found else ("", text)
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1 or text.find(END) < text.find(BEGIN):
        raise UserError(f"--card {path}: the marks of an earlier report are damaged; remove `{BEGIN}` and `{END}`")
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2].removeprefix("\n")
    name, others = _other_results(_stated(metadata, path).get("model-index"), path)
    without = _MODEL_INDEX.sub("", metadata)
    return Card(
        metadata=without if not without or without.endswith("\n") else f"{without}\n",
        name=name or title,
        others=tuple(others),
        before=before if begin else f"{before.rstrip()}\n\n",
        after=after,
        ending="\r\n" if "\r\n" in raw else "\n",
    )


def write_card(report: Report, path: Path) -> None:
    """Write the report into the card at `path`. Raises UserError as `read_card`, MachineError if the disk is full."""
    card = read_card(path)
    index = eval_results_to_model_index(card.name, [_result(task) for task in report.tasks])
    index[0]["results"] = [*card.others, *index[0]["results"]]
    stated = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    section = f"{BEGIN}\n{markdown.section(report)}\n{END}\n"
    text = f"---\n{card.metadata}{stated}---\n{card.before}{section}{card.after}"
    write_bytes_durably(path, text.replace("\n", card.ending).encode())


def upload_command(path: Path) -> str:
    """The command that uploads the card's folder with the hub's own client."""
    name = path.absolute().parent.name
    return f"hf upload {shlex.quote(f'YOUR-NAME/{name}')} {shlex.quote(str(path.parent))}"


def _stated(metadata: str, path: Path) -> dict[str, Any]:
    try:
        stated = yaml.safe_load(metadata) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--card {path}: the metadata between the `---` lines is not valid YAML: {error}") from error
    if not isinstance(stated, dict):
        raise UserError(f"--card {path}: the metadata between the `---` lines is not a mapping of keys and values")
    return stated


def _other_results(index: Any, path: Path) -> tuple[str, list[Any]]:
    """The model's name and the results that are not ours."""
    if index is None:
        return "", []
    try:
        (only,) = index
        results = [result for result in only["results"] if (result.get("source") or {}).get("name") != SOURCE]
        return str(only["name"]), results
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--card {path}: model-index: expected a list of one model with `name` and `results`; correct or remove it"
        ) from error


def _result(task: TaskLine) -> EvalResult:
    """The student's score of one task, in per cent or as a rating."""
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=task.task,
        dataset_name=task.task,
        metric_type=task.metric.partition(",")[0],
        metric_name=task.metric,
        metric_value=round(FULL_SCALE[task.unit] * task.scores["student"], 2),
        source_name=SOURCE,
        source_url="https://arxiv.org/abs/2406.19112",
    )
