"""Held-out rows that also stand in training: a score on them is no score on unseen rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.config import DataRecipe, SourceRecipe
from kd.data import read_records


@dataclass(frozen=True)
class Overlap:
    """Of a route's held-out rows: how many stand in training whole, and how many with the same prompt."""

    rows: int
    same_row: int
    same_prompt: int


def overlaps(data: DataRecipe) -> dict[str, Overlap]:
    """Route -> overlap of its held-out rows with the training rows of all routes, by normalised text."""
    whole: set[str] = set()
    prompts: set[str] = set()
    for sources in data.routes.values():
        for prompt, text in texts(sources):
            whole.add(text)
            prompts.add(prompt)
    prompts.discard("")
    found = {}
    for name, sources in data.eval.items():
        held_out = list(texts(sources))
        same_row = sum(text in whole for _, text in held_out)
        same_prompt = sum(prompt in prompts for prompt, _ in held_out)
        found[name] = Overlap(len(held_out), same_row, same_prompt)
    return found


def texts(sources: Sequence[SourceRecipe]) -> Iterable[tuple[str, str]]:
    """(prompt, whole row) of each record, normalised; the prompt is empty where there is none."""
    for source in sources:
        for _, record in read_records(source):
            prompt, response = parts(record)
            yield normalised(prompt), normalised(f"{prompt}\n{response}")


def parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """A record's text before its last response, and from there on."""
    if record.get("messages") is not None:
        turns = record["messages"]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return spoken(turns[:last]), spoken(turns[last:])
    if record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        return (prompt, completion) if isinstance(prompt, str) else (spoken(prompt), spoken(completion))
    return "", record["text"]


def spoken(messages: Iterable[Mapping[str, Any]]) -> str:
    """The contents of messages, one after the other."""
    return "\n".join(str(message.get("content") or "") for message in messages)


def normalised(text: str) -> str:
    """Case and white space do not make another row."""
    return " ".join(text.casefold().split())
