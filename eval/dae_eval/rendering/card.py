"""The report in a student's model card: a section of its own, and the hub's `model-index` metadata.

An earlier report is replaced; everything else in the card stays as it is, byte for byte.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from dae_eval.rendering import markdown
from dae_eval.rendering.wording import FULL_SCALE
from dae_eval.report import Report, TaskLine
from kd.errors import UserError
from kd.runs.files import disk_errors, write_bytes_durably

BEGIN, END = "<!-- dae report: begin -->", "<!-- dae report: end -->"
SOURCE = "dae-align"
_METADATA = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_MODEL_INDEX = re.compile(r"^model-index:.*?(?=^[^\s#-]|\Z)", re.DOTALL | re.MULTILINE)


def write_card(report: Report, path: Path) -> None:
    """Write the report into a model card, which is made if the folder has none.

    Raises:
        UserError: the folder does not exist, the metadata is not YAML, or the marks of an earlier report are damaged.
        MachineError: the disk is full.
    """
    if not path.parent.is_dir():
        raise UserError(f"--card {path}: folder {path.parent} not found; give the README.md of the student's folder")
    with disk_errors(path):
        raw = path.read_bytes().decode("utf-8") if path.is_file() else f"# {path.absolute().parent.name}\n"
    ending = "\r\n" if "\r\n" in raw else "\n"
    text = with_report(raw.replace("\r\n", "\n"), report, path)
    write_bytes_durably(path, text.replace("\n", ending).encode())


def upload_command(path: Path) -> str:
    """The command that uploads the card's folder with the hub's own client."""
    folder = path.absolute().parent
    return f"hf upload {shlex.quote(f'YOUR-NAME/{folder.name}')} {shlex.quote(str(path.parent))}"


def with_report(card: str, report: Report, path: Path) -> str:
    """A card's text with the report's section and metadata."""
    found = _METADATA.match(card)
    metadata, text = (found[1], card[found.end() :]) if found else ("", f"\n{card}")
    section = f"{BEGIN}\n{markdown.section(report)}\n{END}\n"
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1 or text.find(END) < text.find(BEGIN):
        raise UserError(f"{path}: the marks of an earlier report are damaged; remove `{BEGIN}` and `{END}`")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        text = before + section + rest.partition(END)[2].removeprefix("\n")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    return f"---\n{_with_index(metadata, report, path)}---\n{text}"


def _with_index(metadata: str, report: Report, path: Path) -> str:
    """The metadata with our results in `model-index`; results from elsewhere are kept."""
    try:
        stated = yaml.safe_load(metadata) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: the metadata between the `---` lines is not valid YAML: {error}") from error
    if not isinstance(stated, dict):
        raise UserError(f"{path}: the metadata between the `---` lines is not a mapping of keys and values")
    name, others = _other_results(stated.get("model-index"), path)
    index = eval_results_to_model_index(name or path.absolute().parent.name, [_result(task) for task in report.tasks])
    index[0]["results"] = [*others, *index[0]["results"]]
    rest = _MODEL_INDEX.sub("", metadata)
    rest = rest if not rest or rest.endswith("\n") else f"{rest}\n"
    return rest + str(yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True))


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
            f"{path}: model-index: expected a list of one model with `name` and `results`; correct or remove it"
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
