"""Candidates' responses, read from files, all to the same prompts in one order.

A row is {"prompt", "completion"} as text, or as lists of messages with one assistant message as the completion; or
{"messages"} whose last message is the response.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd.config.data_recipe import SourceRecipe
from kd.data.record_forms import form_of
from kd.data.records import read_records
from kd.errors import UserError

FORMS = "expected `prompt` and `completion`, or `messages` that end with the response"
SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Response:
    """One response to one prompt.

    prompt: text, or messages up to the response; response: its text; location: file and row, for messages;
    cut_off: whether it was truncated (the row's `finish_reason` is length), so that it has no end token.
    """

    location: str
    prompt: str | tuple[Mapping[str, Any], ...]
    response: str
    tools: Any = None
    cut_off: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """The row as kd.data.examples encodes it: the loss is on the response only."""
        cut = {"finish_reason": "length"} if self.cut_off else {}
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "completion": self.response, **cut}
        reply = {"role": "assistant", "content": self.response}
        tools = {} if self.tools is None else {"tools": self.tools}
        return {"prompt": [dict(message) for message in self.prompt], "completion": [reply], **tools, **cut}

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Prompt and response as messages; a text prompt is a user turn."""
        if isinstance(self.prompt, str):
            asked = [{"role": "user", "content": self.prompt.rstrip()}]
            return [*asked, {"role": "assistant", "content": self.response.strip()}]
        return [*map(dict, self.prompt), {"role": "assistant", "content": self.response}]

    @property
    def key(self) -> str:
        return prompt_key(self.prompt, self.tools)


def prompt_key(prompt: str | Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """Equal for equal prompts. White space at the end of a text prompt is ignored."""
    if isinstance(prompt, str):
        return json.dumps(prompt.rstrip())
    return json.dumps([list(prompt), tools or None], sort_keys=True)


def read_responses(path: str) -> list[Response]:
    """All responses of a file or of a folder saved by `datasets`.

    Raises:
        UserError: it cannot be read, a row has another form, or a prompt or response is empty.
    """
    responses = [response_of(record, location) for location, record in read_records(SourceRecipe(path=path))]
    empty = [response.location for response in responses if not response.response.strip()]
    if empty:
        raise UserError(
            f"{empty[0]}: the response is empty ({len(empty)} of {len(responses)} rows of {path}); "
            "remove this prompt from every candidate's file"
        )
    return responses


def response_of(record: Mapping[str, Any], location: str) -> Response:
    """One row. Raises UserError unless it is a prompt and one response."""
    form, tools = form_of(record), record.get("tools")
    cut_off = record.get("finish_reason") == "length"
    if form == "pair":
        if not record["prompt"].strip():
            raise UserError(f"{location}: prompt: must not be empty")
        return Response(location, record["prompt"], record["completion"], cut_off=cut_off)
    if form == "text":
        raise UserError(f"{location}: has only `text`; {FORMS}")
    if form == "messages":
        prompt, reply = record["messages"][:-1], record["messages"][-1:]
    else:
        prompt, reply = record["prompt"], record["completion"]
    if len(reply) != 1 or reply[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in reply)
        raise UserError(f"{location}: ends with {roles}; expected one assistant message; {FORMS}")
    if reply[0].get("tool_calls"):
        raise UserError(f"{location}: the response calls tools, which cannot be ranked; remove the row")
    if not prompt:
        raise UserError(f"{location}: has no prompt; {FORMS}")
    return Response(location, tuple(prompt), reply[0].get("content") or "", tools, cut_off)


def same_prompts(expected: Sequence[tuple[str, str]], path: str, responses: Sequence[Response]) -> list[Response]:
    """Responses in the order of the expected prompts; a repeated prompt needs as many responses.

    Args:
        expected: (location, key) of each prompt.
        path: the file of the responses, for messages.
        responses: in any order.

    Raises:
        UserError: some prompts have no response, or some responses are to other prompts.
    """
    by_key: dict[str, list[Response]] = defaultdict(list)
    for response in reversed(responses):
        by_key[response.key].append(response)
    found, unanswered = [], []
    for location, key in expected:
        if by_key[key]:
            found.append(by_key[key].pop())
        else:
            unanswered.append((location, key))
    left = {id(response) for rest in by_key.values() for response in rest}
    others = [(response.location, response.key) for response in responses if id(response) in left]
    if not unanswered and not others:
        return found
    problems = []
    if unanswered:
        problems.append(f"{len(unanswered)} of {len(expected)} prompts have no response, first {shown(unanswered[0])}")
    if others:
        problems.append(f"{len(others)} responses are to other prompts, first {shown(others[0])}")
    hint = " (one has text prompts, the other messages: use one form)" if mixed(expected, responses) else ""
    raise UserError(f"{path}: {'; '.join(problems)}{hint}; all candidates must answer the same prompts")


def shown(prompt: tuple[str, str]) -> str:
    location, key = prompt
    return f"{location} {key if len(key) <= SHOWN else key[: SHOWN - 3] + '...'}"


def mixed(expected: Sequence[tuple[str, str]], responses: Sequence[Response]) -> bool:
    """Whether one side has only text prompts and the other only messages."""
    kinds = [{key.startswith('"') for _, key in expected}, {isinstance(each.prompt, str) for each in responses}]
    return all(len(kind) == 1 for kind in kinds) and kinds[0] != kinds[1]
