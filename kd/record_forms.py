"""The shapes that rows come in, and the three that the rest of the toolkit knows.

    messages     {"messages": [{"role", "content"}, ...]}, with `tools`, `system`, `finish_reason`
    pair         {"prompt", "completion"}: both strings, or both lists of messages
    text         {"text"}

Other well-known shapes are mapped onto these. A key that means something is honoured or refused, and every key that is
not read is named, so that somebody can count it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kd.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys that hold an assistant turn's thoughts
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)

Format = Literal["messages", "prompt-completion", "text", "sharegpt", "alpaca", "prompt-response"]
FORMATS: tuple[Format, ...] = get_args(Format)
Form = Literal["messages", "pair", "chat pair", "text"]

# The keys that tell a format, and those that it also reads.
_NEEDED: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-response": ("prompt", "response"),
}
_CONVERSATION = ("system", "tools", "finish_reason")
_ALSO_READ: Mapping[Format, tuple[str, ...]] = {
    "messages": _CONVERSATION,
    "prompt-completion": _CONVERSATION,
    "text": ("finish_reason",),
    "sharegpt": _CONVERSATION,
    "alpaca": ("input", "history", *_CONVERSATION),
    "prompt-response": _CONVERSATION,
}
_EXAMPLES: Mapping[Format, str] = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "prompt-completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt-response": '{"prompt": "...", "response": "..."}',
}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_OLD_CALLS = {
    "function_call": "the former shape of `tool_calls`: write tool_calls: [{type: function, function: {name, "
    "arguments}}]",
    "functions": "the former shape of `tools`: write tools: [{type: function, function: {name, parameters}}]",
}


@dataclass(frozen=True)
class Record:
    """One row in a shape that the toolkit knows.

    Attributes:
        row: `messages`, or `prompt` and `completion`, or `text`; with `tools` (a list) and `finish_reason` where there
            are any. A message has `role`, `content` (a string) and what else it was given with a value.
        format: what the row was given as.
        unread: keys of the row that mean nothing here, such as an id.
    """

    row: dict[str, Any]
    format: Format
    unread: tuple[str, ...] = ()


def record_of(raw: Any, location: str, declared: Format | None = None, padded: bool = False) -> Record:
    """A row as it was read, in a shape that the toolkit knows.

    Args:
        raw: the row.
        location: named in messages, such as `rows.jsonl:7`.
        declared: the source's `format`; None: the one that the row's keys tell.
        padded: the row comes from Arrow, which fills structs up with nulls: those in tools and calls are dropped.

    Raises:
        UserError: the row has none of the shapes, several at once, or a value that its shape does not take.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{location}: expected a JSON object, not {kind_of(raw)}; a row is {EXAMPLE}")
    given = {str(key): value for key, value in raw.items() if value is not None}
    kind = declared or format_of(given, location)
    if missing := [key for key in _NEEDED[kind] if key not in given]:
        raise UserError(
            f"{location}: format {kind}: `{missing[0]}` is missing; its keys are {_listed(given)}; expected "
            f"{_EXAMPLES[kind]}"
        )
    for key, words in _OLD_CALLS.items():
        if given.get(key):
            raise UserError(f"{location}: {key}: {words}")
    unread = tuple(key for key in given if key not in (*_NEEDED[kind], *_ALSO_READ[kind]))
    row = _READERS[kind](given, location)
    row |= _finish(given, location)
    if "text" in row or isinstance(row.get("prompt"), str):
        refuse_conversation_keys(given, location, kind)
        return Record(row, kind, unread)
    tools = list_of_objects(given.get("tools"), f"{location}: tools")
    if tools:
        row["tools"] = [without_nulls(tool) for tool in tools] if padded else tools
    row = with_system(row, given.get("system"), location)
    for key in ("messages", "prompt", "completion"):
        if key in row:
            given_as = "conversations" if kind == "sharegpt" else key
            row[key] = messages_of(row[key], f"{location}: {given_as}", padded)
    return Record(row, kind, unread)


def format_of(given: Mapping[str, Any], location: str) -> Format:
    """The format that a row's keys tell. Raises UserError where they tell none, or several."""
    found = [kind for kind in FORMATS if all(key in given for key in _NEEDED[kind])]
    # A `prompt` beside messages is an id or the first turn again, as hub data sets have it; a completion is neither.
    if found == ["messages"] and "completion" in given:
        found.append("prompt-completion")
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{location}: its keys are {_listed(given)}; a row is {EXAMPLE}")
    keys = ", ".join(f"`{key}`" for key in sorted({key for kind in found for key in _NEEDED[kind]}))
    raise UserError(
        f"{location}: {keys} together are ambiguous; set the source's format to {' or '.join(found)}, such as "
        f"data.ROUTE.0.format={found[0]}"
    )


def texts_of(row: Mapping[str, Any]) -> Iterator[str]:
    """What people and models say in a `Record.row`, in order."""
    for key in ("text", "messages", "prompt", "completion"):
        value = row.get(key)
        if isinstance(value, str):
            yield value
        else:
            yield from (message["content"] for message in value or ())


def form_of(row: Mapping[str, Any]) -> Form:
    """Which of the known shapes a `Record.row` has."""
    if "messages" in row:
        return "messages"
    if "text" in row:
        return "text"
    return "pair" if isinstance(row["prompt"], str) else "chat pair"


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(given) or "(none)"


def _finish(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    """`finish_reason`, as completions of servers have it: `length` means that the response was cut off."""
    reason = given.get("finish_reason")
    if reason is None:
        return {}
    if not isinstance(reason, str):
        raise UserError(f"{location}: finish_reason: expected a string such as stop or length, not {kind_of(reason)}")
    return {"finish_reason": reason} if reason == "length" else {}


def refuse_conversation_keys(given: Mapping[str, Any], location: str, kind: Format) -> None:
    """Raise UserError where a string row has keys that only a chat template could render."""
    for key in ("system", "tools"):
        if given.get(key) not in (None, "", [], "[]"):
            raise UserError(
                f"{location}: {key}: strings take no chat template, so it would be lost; put it into the "
                f"{'text' if kind == 'text' else 'prompt'}, or give the row as messages"
            )


# -- one reader for each format ----------------------------------------------------------------------------------------


def _read_messages(given: Mapping[str, Any], _location: str) -> dict[str, Any]:
    return {"messages": given["messages"]}


def _read_pair(given: Mapping[str, Any], location: str, answer: str = "completion") -> dict[str, Any]:
    kinds = {kind_of(given[name]) for name in ("prompt", answer)}
    if kinds == {"a string"}:
        for name in ("prompt", answer):
            check_text(given[name], f"{location}: {name}")
    elif not kinds <= {"a list", "an empty list"}:
        raise UserError(
            f"{location}: prompt is {kind_of(given['prompt'])}, {answer} is {kind_of(given[answer])}; expected two "
            "strings, or two lists of messages"
        )
    return {"prompt": given["prompt"], "completion": given[answer]}


def _read_response(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    return _read_pair(given, location, "response")


def _read_text(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    check_text(given["text"], f"{location}: text")
    return {"text": given["text"]}


def _read_sharegpt(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    """ShareGPT's `conversations`: turns of `from` and `value`, or of `role` and `content`."""
    where = f"{location}: conversations"
    turns = list_of_objects(given["conversations"], where)
    return {"messages": [_turn_of(turn, f"{where}[{place}]") for place, turn in enumerate(turns)]}


def _turn_of(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "from" not in turn:
        return dict(turn)
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where}.from: {speaker!r}: unknown speaker; expected one of {', '.join(_SPEAKERS)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker.lower() == "function_call":
        calls = _json_of(turn.get("value"), f"{where}.value")
        return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": role, "content": turn.get("value"), **rest}


def _read_alpaca(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Alpaca's `instruction`, `input`, `output` as one exchange; `history` holds earlier ones, [question, answer]."""
    for key in ("instruction", "input", "output"):
        if key in given:
            check_text(given[key], f"{location}: {key}")
    messages = []
    for place, turn in enumerate(given.get("history") or ()):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise UserError(f"{location}: history[{place}]: expected [question, answer], not {kind_of(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n".join(part for part in (given["instruction"], given.get("input")) if part)
    return {"messages": [*messages, {"role": "user", "content": question}, _reply(given["output"])]}


def _reply(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


_READERS: Mapping[Format, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "messages": _read_messages,
    "prompt-completion": _read_pair,
    "text": _read_text,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt-response": _read_response,
}


# -- messages ----------------------------------------------------------------------------------------------------------


def with_system(row: dict[str, Any], system: Any, location: str) -> dict[str, Any]:
    """The row with a `system` beside its messages as their first turn."""
    if system in (None, ""):
        return row
    check_text(system, f"{location}: system")
    key = "messages" if "messages" in row else "prompt"
    messages = row[key]
    if not isinstance(messages, (list, tuple)):
        return row  # refused by what checks messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") in ("system", "developer"):
        if first.get("content") == system:
            return row
        raise UserError(f"{location}: system: the messages have a system turn of their own; keep one of the two")
    return {**row, key: [{"role": "system", "content": system}, *messages]}


def messages_of(value: Any, where: str, padded: bool = False) -> list[dict[str, Any]]:
    """Messages with string contents and without keys that have no value. Raises UserError."""
    messages = list_of_objects(value, where)
    if not messages:
        raise UserError(f"{where}: expected a list of at least one message, not {kind_of(value)}")
    return [message_of(message, f"{where}[{place}]", padded) for place, message in enumerate(messages)]


def message_of(message: Mapping[str, Any], where: str, padded: bool) -> dict[str, Any]:
    """One message: `role`, `content` as a string, tool calls as a list, and its other keys that have a value."""
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}.role: {role!r}: unknown role; expected one of {', '.join(ROLES)}")
    if message.get("function_call"):
        raise UserError(f"{where}.function_call: {_OLD_CALLS['function_call']}")
    calls = list_of_objects(message.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise UserError(f"{where}.tool_calls: only an assistant turn calls tools, and this is one of {role}")
    known = ("role", "content", "tool_calls")
    rest = {str(key): value for key, value in message.items() if value is not None and key not in known}
    content = message.get("content")
    if content is None and role == "assistant" and (calls or any(rest.get(key) for key in REASONING)):
        content = ""
    taken = {"role": role, "content": content_of(content, f"{where}.content"), **rest}
    for key, extra in rest.items():
        if isinstance(extra, str):
            check_text(extra, f"{where}.{key}")
    if calls:
        taken["tool_calls"] = [
            call_of(call, f"{where}.tool_calls[{place}]", padded) for place, call in enumerate(calls)
        ]
    return taken


def content_of(content: Any, where: str) -> str:
    """A message's content as a string; a list of text parts is put together. Raises UserError for other parts."""
    if isinstance(content, (list, tuple)):
        parts = []
        for place, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            text = part.get("text") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(text, str):
                told = f"type {kind!r}" if isinstance(kind, str) and kind != "text" else kind_of(part)
                raise UserError(
                    f"{where}[{place}]: expected {{type: text, text: ...}}, not {told}; these models read text only"
                )
            parts.append(text)
        content = "".join(parts)
    check_text(content, where)
    assert isinstance(content, str)
    return content


def call_of(call: Mapping[str, Any], where: str, padded: bool) -> dict[str, Any]:
    """One tool call: {function: {name, arguments}}, or {name, arguments}. Raises UserError."""
    call = without_nulls(call) if padded else dict(call)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: has no name; expected {{type: function, function: {{name: ..., arguments: {{...}}}}}}"
        )
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (Mapping, str)):
        raise UserError(f"{where}.arguments: expected an object, or one as JSON text, not {kind_of(arguments)}")
    return call


def weight_of(message: Mapping[str, Any], where: str) -> bool:
    """Whether a turn carries loss: `weight` 0 or 1 (OpenAI's), or `train` true or false (axolotl's).

    Raises UserError for another weight.
    """
    for key in ("weight", "train"):
        value = message.get(key, 1)
        if value not in (0, 1):
            raise UserError(
                f"{where}.{key}: {value!r}: expected 0 (the turn carries no loss) or 1; other weights are not supported"
            )
        if not value:
            return False
    return True


# -- values ------------------------------------------------------------------------------------------------------------


def list_of_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text; [] for nothing. Raises UserError."""
    if isinstance(value, str) and value.strip() and where.endswith(("tools", "tool_calls")):
        value = _json_of(value, where)
    if value is None or value == "":
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: expected a list of objects, not {kind_of(value)}")
    for place, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise UserError(f"{where}[{place}]: expected an object, not {kind_of(item)}")
    return [dict(item) for item in value]


def _json_of(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected JSON text, not {kind_of(value)}")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); repair the row") from error


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, all the way down."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value


def check_text(value: Any, where: str) -> None:
    """Raises UserError unless `value` is text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a string, not {kind_of(value)}")
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
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    return "an empty list" if isinstance(value, Sequence) and not value else "a list"
