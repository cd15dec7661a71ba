"""Rows of eval sets that also occur in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.examples import SourceReport
from kd.data.records import read_records
from kd.runs.provenance import HELD_OUT


@dataclass(frozen=True)
class Overlap:
    """Of a route's eval set: rows that occur in training, and rows whose prompt does."""

    same_row: int
    same_prompt: int


def overlaps(data: DataRecipe, reports: Mapping[str, Sequence[SourceReport]]) -> dict[str, Overlap]:
    """Route -> overlap of its eval set with the training rows of all routes, by normalised text.

    reports: of the sources, as in kd.data.stage_data; dropped rows are ignored.
    """
    whole: set[str] = set()
    prompts: set[str] = set()
    for name, sources in data.routes.items():
        for prompt, text in texts(sources, reports[name]):
            whole.add(text)
            prompts.add(prompt)
    prompts.discard("")
    found = {}
    for name, sources in data.eval.items():
        held_out = list(texts(sources, reports[f"{HELD_OUT}{name}"]))
        same_row = sum(text in whole for _, text in held_out)
        same_prompt = sum(prompt in prompts for prompt, _ in held_out)
        found[name] = Overlap(same_row, same_prompt)
    return found


def texts(sources: Sequence[SourceRecipe], reports: Sequence[SourceReport]) -> Iterable[tuple[str, str]]:
    """(prompt, whole row) of each kept record, normalised; the prompt is empty if there is none."""
    for source, report in zip(sources, reports, strict=True):
        dropped = frozenset(report.dropped_at)
        for place, (_, record) in enumerate(read_records(source)):
            if place in dropped:
                continue
            prompt, response = parts(record)
            yield normalised(prompt), normalised(f"{prompt}\n{response}")


def parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """A record's text before its last response, and the rest."""
    if record.get("messages") is not None:
        turns = record["messages"]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return contents(turns[:last]), contents(turns[last:])
    if record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        return (prompt, completion) if isinstance(prompt, str) else (contents(prompt), contents(completion))
    return "", record["text"]


def contents(messages: Iterable[Mapping[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def normalised(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())
