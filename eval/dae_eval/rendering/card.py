"""The report in a student's model card: a section of its own, and the hub's `model-index` metadata.

An earlier report is replaced; everything else in the card stays as it is, byte for byte.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from dae_eval.rendering import markdown
from dae_eval.report import Report, TaskLine
from dae_eval.units import FULL_SCALE
from kd.config.layering import parsed
from kd.errors import UserError
from kd.runs.files import write_bytes_durably

BEGIN, END = "<!-- dae report: begin -->", "<!-- dae report: end -->"
SOURCE = "dae-align"
_METADATA = re.compile(r"(\A\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_MODEL_INDEX = re.compile(r"^model-index:[^\n]*\n(?:(?:[ \t-][^\n]*)?\r?\n)*(?:[ \t-][^\n]*\Z)?", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A model card without an earlier report.

    begin, metadata, end: the metadata between its lines `---`, without `model-index`. index: that of the card without
    our results. before, after: the text around the report. ending: of a line.
    """

    begin: str
    metadata: str
    end: str
    index: Mapping[str, Any]
    before: str
    after: str
    ending: str


def read_card(path: Path) -> Card:
    """The card at `path`; where there is none, a new one.

    Raises:
        UserError: it is no README.md in a folder, its metadata cannot be read, or an earlier report is damaged.
    """
    if path.name != "README.md":
        raise UserError(f"--card {path}: expected the README.md of the student's folder, which the hub shows")
    if not path.parent.is_dir():
        raise UserError(f"--card {path}: folder {path.parent} not found; give the README.md of the student's folder")
    title = path.absolute().parent.name
    try:
        text = path.read_bytes().decode("utf-8") if path.exists() else f"\n# {title}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card {path}: cannot be read: {error}") from error
    ending = "\r\n" if text.find("\r\n") == text.find("\n") - 1 >= 0 else "\n"
    found = _METADATA.match(text)
    begin, metadata, end = found.groups() if found else (f"---{ending}", "", f"---{ending}")
    text = text[found.end() :] if found else text
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1 or text.find(END) < text.find(BEGIN):
        raise UserError(f"--card {path}: the marks of an earlier report are damaged; remove `{BEGIN}` and `{END}`")
    before, there, rest = text.partition(BEGIN)
    if not there:
        before += ending * max(0, 2 - len(before) + len(before.rstrip("\r\n"))) if before else ""
    after = rest.partition(END)[2]
    after = after.removeprefix(ending)
    stated = _stated(metadata, path)
    without = _MODEL_INDEX.sub("", metadata)
    if not _says(without, {key: value for key, value in stated.items() if key != "model-index"}):
        raise UserError(
            f"--card {path}: model-index: cannot be replaced without changing other metadata; write it as lines of "
            "`key: value`, or remove it"
        )
    without += "" if not without or without.endswith("\n") else ending
    return Card(begin, without, end, _other_results(stated.get("model-index"), title, path), before, after, ending)


def write_card(report: Report, path: Path) -> None:
    """Write the report into the card at `path`. Raises UserError as `read_card`, MachineError if the disk is full."""
    card = read_card(path)
    (ours,) = eval_results_to_model_index(card.index["name"], [_result(task) for task in report.tasks])
    index = {**card.index, "results": [*card.index["results"], *ours["results"]]}
    stated = yaml.safe_dump({"model-index": [index]}, sort_keys=False, allow_unicode=True)
    section = f"{BEGIN}\n{markdown.section(report)}\n{END}\n"
    stated, section = (part.replace("\n", card.ending) for part in (stated, section))
    text = f"{card.begin}{card.metadata}{stated}{card.end}{card.before}{section}{card.after}"
    found = _METADATA.match(text)
    if found is None or _stated(found[2], path).get("model-index") != [index]:
        raise UserError(
            f"--card {path}: its metadata has a form that cannot be added to; write it as lines of `key: value`"
        )
    write_bytes_durably(path, text.encode())


def upload_command(path: Path) -> str:
    """The command that uploads the card's folder with the hub's own client."""
    name = path.absolute().parent.name
    return f"hf upload {shlex.quote(f'YOUR-NAME/{name}')} {shlex.quote(str(path.parent))}"


def _stated(metadata: str, path: Path) -> dict[str, Any]:
    try:
        stated = parsed(metadata, yaml.SafeLoader)[1] or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--card {path}: the metadata between the `---` lines is not valid YAML: {error}") from error
    if not isinstance(stated, dict):
        raise UserError(f"--card {path}: the metadata between the `---` lines is not a mapping of keys and values")
    return stated


def _says(metadata: str, expected: Mapping[str, Any]) -> bool:
    try:
        return (parsed(metadata, yaml.SafeLoader)[1] or {}) == expected
    except (yaml.YAMLError, RecursionError):
        return False


def _other_results(index: Any, title: str, path: Path) -> dict[str, Any]:
    """The card's only model in `model-index`, with the results that are not ours."""
    if index is None:
        return {"name": title, "results": []}
    try:
        (only,) = index
        results = [result for result in only["results"] if (result.get("source") or {}).get("name") != SOURCE]
        return {**only, "name": str(only["name"]), "results": results}
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
