"""Messages, tool calls and tools of a row: what they may be, and the one form that the rest of the toolkit sees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys that hold an assistant turn's thoughts
_OF_A_TEXT_PART = ("type", "text", "cache_control", "annotations", "citations")
_AS_JSON_TEXT = ("tools", "tool_calls", "messages", "conversations", "history")  # keys whose lists may be JSON text
OLD_CALLS = {
    "function_call": "the former shape of `tool_calls`: write tool_calls: [{type: function, function: {name, "
    "arguments}}]",
    "functions": "the former shape of `tools`: write tools: [{type: function, function: {name, parameters}}]",
}


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
        raise UserError(f"{where}.function_call: {OLD_CALLS['function_call']}")
    calls = list_of_objects(message.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise UserError(f"{where}.tool_calls: only an assistant turn calls tools, and this is one of {role}; remove it")
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
                found = f"type {kind!r}" if isinstance(kind, str) and kind != "text" else kind_of(part)
                raise UserError(
                    f"{where}[{place}]: expected {{type: text, text: ...}}, not {found}; these models read text only"
                )
            if unknown := [key for key in part if part[key] is not None and key not in _OF_A_TEXT_PART]:
                raise UserError(f"{where}[{place}].{unknown[0]}: unknown key of a text part; remove it")
            parts.append(text)
        content = "".join(parts)
    check_text(content, where)
    assert isinstance(content, str)
    return content


def tool_of(tool: Mapping[str, Any], where: str, padded: bool) -> dict[str, Any]:
    """One tool: {function: {name, parameters}}, or {name, parameters}. Raises UserError."""
    tool = without_nulls(tool) if padded else dict(tool)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: has no name; expected {{type: function, function: {{name: ..., parameters: {{...}}}}}}"
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UserError(f"{where}.parameters: expected a JSON schema (an object), not {kind_of(parameters)}")
    return tool


def call_of(call: Mapping[str, Any], where: str, padded: bool) -> dict[str, Any]:
    """One tool call: {function: {name, arguments}}, or {name, arguments}. Raises UserError."""
    call = without_nulls(call) if padded else dict(call)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: has no name; expected {{type: function, function: {{name: ..., arguments: {{...}}}}}}"
        )
    if "arguments" not in function and (
        other := next((key for key in ("parameters", "input") if key in function), None)
    ):
        raise UserError(f"{where}.{other}: a call has `arguments`; rename it")
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (Mapping, str)):
        raise UserError(f"{where}.arguments: expected an object, or one as JSON text, not {kind_of(arguments)}")
    return call


def carries_loss(message: Mapping[str, Any], where: str) -> bool:
    """Whether an assistant turn carries loss; other turns never do. Raises UserError where one is told to."""
    weighted = weight_of(message, where)
    if message["role"] != "assistant" and message.get("train"):
        raise UserError(
            f"{where}.train: {message['train']!r}: only assistant turns carry loss; remove it from this turn"
        )
    return weighted and message["role"] == "assistant"


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


def list_of_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text; [] for nothing. Raises UserError."""
    if isinstance(value, str) and value.strip() and where.endswith(_AS_JSON_TEXT):
        value = json_of(value, where)
    if value is None or value == "":
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}: expected a list of objects, not {kind_of(value)}")
    for place, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise UserError(f"{where}[{place}]: expected an object, not {kind_of(item)}")
    return [dict(item) for item in value]


def json_of(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected JSON text, not {kind_of(value)}")
    try:
        return json.loads(value, object_pairs_hook=without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); repair the row") from error


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values. Raises ValueError for a key that it has twice: json would keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


class DuplicateKeyError(ValueError):
    """A key that an object has twice."""

    def __str__(self) -> str:
        return f"{self.args[0]}: duplicate key"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def holds_nulls(value: Any) -> bool:
    """Whether a JSON value has a null anywhere in it."""
    if isinstance(value, Mapping):
        return any(part is None or holds_nulls(part) for part in value.values())
    return isinstance(value, (list, tuple)) and any(map(holds_nulls, value))


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, all the way down."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from strings_of(key)
            yield from strings_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings_of(part)


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
