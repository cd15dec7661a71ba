"""The parts of a conversation that a chat template leaves out, and the form of tool arguments that it expects.

Templates do not declare it. A part is rendered if changing it changes the text: so a conversation of the same shape
(roles, calls, keys) with words of our own is rendered with one part changed at a time. Shapes are few, so this is done
once for each.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kd.data.chat import ChatFormat, UnrenderableError
from kd.data.messages import REASONING
from kd.data.special_text import spelled_in_order

ArgumentForm = Literal["object", "text", "either"]

SCHEMAS = ("parameters", "input_schema")  # keys under which a tool says what arguments it takes
_ARGUMENTS = {"probekey": 'probe "value"'}


@dataclass(frozen=True)
class CallShape:
    """A tool call as far as templates look at it: nested in `function` or not, its arguments' kind, its other keys."""

    nested: bool
    arguments: Literal["object", "text", "none"]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class TurnShape:
    """A message as far as templates look at it: role, whether there is content, calls, other keys with text."""

    role: str
    content: bool
    calls: tuple[CallShape, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ChatShape:
    """A conversation's shape; tools: for each, whether it is nested in `function`, and the keys beside its name."""

    turns: tuple[TurnShape, ...]
    tools: tuple[tuple[bool, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Part:
    """A part of a conversation, as messages name it (`messages[1].tool_calls[0]`).

    essential: it carries meaning; lasting: it must still be rendered where later turns follow (content, calls), which
    what belongs to the last turn only, such as a thought, need not be.
    """

    name: str
    essential: bool = True
    lasting: bool = True


def unrendered_parts(fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[Part, ...]:
    """The parts of a conversation that the template leaves out.

    Raises:
        UnrenderableError: the template refuses the conversation.
    """
    try:
        return _unrendered_in_shape(fmt, shape_of(messages, tools))
    except UnrenderableError:  # something in the words matters to the template: ask with the row's own
        return _unrendered(fmt, messages, tools)


def shape_of(messages: Sequence[Mapping[str, Any]], tools: Any) -> ChatShape:
    """The shape of a conversation with `content` as text and calls as lists."""
    turns = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            arguments = function.get("arguments")
            kind = "none" if "arguments" not in function else "text" if isinstance(arguments, str) else "object"
            keys = tuple(sorted(key for key in call if key not in ("function", "name", "arguments")))
            calls.append(CallShape("function" in call, kind, keys))  # type: ignore[arg-type]
        keys = tuple(sorted(key for key in message if key not in ("role", "content", "tool_calls")))
        turns.append(TurnShape(message["role"], bool(message["content"]), tuple(calls), keys))
    described = tuple(
        ("function" in tool, tuple(sorted(key for key, value in tool.get("function", tool).items() if value)))
        for tool in tools or ()
    )
    return ChatShape(tuple(turns), described)


@functools.lru_cache(maxsize=4096)
def _unrendered_in_shape(fmt: ChatFormat, shape: ChatShape) -> tuple[Part, ...]:
    return _unrendered(fmt, *_chat_like(shape))


@functools.lru_cache(maxsize=4096)
def control_tokens(fmt: ChatFormat, shape: ChatShape, ask: bool) -> tuple[str, ...] | None:
    """The special tokens that the template writes into a conversation of this shape, in order; None: it refuses it."""
    try:
        return spelled_in_order(fmt.render(*_chat_like(shape), ask), fmt.tokenizer)
    except UnrenderableError:
        return None


def _chat_like(shape: ChatShape) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    messages = [_message_like(turn, place) for place, turn in enumerate(shape.turns)]
    return messages, [_tool_like(*tool, place) for place, tool in enumerate(shape.tools)]


def _message_like(turn: TurnShape, place: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": f"content{place}" if turn.content else ""}
    message |= {key: f"{key}{place}" for key in turn.keys}
    if turn.calls:
        message["tool_calls"] = [_call_like(call, place) for call in turn.calls]
    return message


def _call_like(call: CallShape, place: int) -> dict[str, Any]:
    function: dict[str, Any] = {"name": f"name{place}"}
    if call.arguments != "none":
        function["arguments"] = dict(_ARGUMENTS) if call.arguments == "object" else json.dumps(_ARGUMENTS)
    # Mistral's templates want ids of nine letters and digits.
    known = {"id": f"call{place:05d}"[-9:], "type": "function"}
    return {key: known.get(key, f"{key}{place}") for key in call.keys} | (
        {"function": function} if call.nested else function
    )


def _tool_like(nested: bool, keys: Sequence[str], place: int) -> dict[str, Any]:
    function = {key: _schema(f"field{place}") if key in SCHEMAS else f"{key}{place}" for key in keys}
    function["name"] = f"tool{place}"
    return {"type": "function", "function": function} if nested else function


def _schema(field: str, description: str = "what it is") -> dict[str, Any]:
    described = {"type": "string", "description": description, "enum": ["one"]}
    return {"type": "object", "properties": {field: described}, "required": [field]}


def _unrendered(fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[Part, ...]:
    text = fmt.render(messages, tools)
    return tuple(
        part
        for part, changed, changed_tools, upto in _variants(messages, tools or [])
        if _same(fmt, changed, changed_tools, text)
        # What a later turn hides counts as rendered if it is there while the turn is the last one.
        and (part.lasting or _same(fmt, changed[:upto], tools, _rendered(fmt, messages[:upto], tools)))
    )


def _rendered(fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any) -> str | None:
    try:
        return fmt.render(messages, tools)
    except UnrenderableError:
        return None


def _same(fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any, text: str | None) -> bool:
    return text is not None and _rendered(fmt, messages, tools) == text


Variant = tuple[Part, list[Mapping[str, Any]], Any, int]


def _variants(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Iterator[Variant]:
    """(a part, the conversation with that part changed, its tools, messages up to the part's own)."""

    def with_message(place: int, message: Mapping[str, Any], part: Part) -> Variant:
        return part, [*messages[:place], message, *messages[place + 1 :]], tools, place + 1

    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message["content"]:
            words = f"the {message['role']} turn {where}" if message["role"] != "assistant" else f"{where}.content"
            yield with_message(place, {**message, "content": _other(message["content"])}, Part(words))
        for at, call in enumerate(message.get("tool_calls", ())):
            for part, changed in _call_variants(call, f"{where}.tool_calls[{at}]"):
                calls = [*message["tool_calls"][:at], changed, *message["tool_calls"][at + 1 :]]
                yield with_message(place, {**message, "tool_calls": calls}, part)
        for key in message:
            if key not in ("role", "content", "tool_calls"):
                is_thought = key in REASONING and message["role"] == "assistant"
                name = f"{where}.{key}" if is_thought else f"messages[].{key}"
                yield with_message(place, _without(message, key), Part(name, essential=is_thought, lasting=False))
    for at, tool in enumerate(tools):
        for part, changed in _tool_variants(tool, f"tools[{at}]"):
            yield part, list(messages), [*tools[:at], changed, *tools[at + 1 :]], len(messages)


def _other(text: str) -> str:
    return text + "x"


def _with_function(whole: Mapping[str, Any], function: Mapping[str, Any]) -> dict[str, Any]:
    return {**whole, "function": dict(function)} if "function" in whole else dict(function)


def renamed(whole: Mapping[str, Any]) -> dict[str, Any]:
    function = whole.get("function", whole)
    return _with_function(whole, {**function, "name": _other(function["name"])})


def _call_variants(call: Mapping[str, Any], where: str) -> Iterator[tuple[Part, dict[str, Any]]]:
    function = call.get("function", call)
    yield Part(where), renamed(call)
    arguments = function.get("arguments")
    if arguments:
        other: Any = {**arguments, "another": 1} if isinstance(arguments, Mapping) else json.dumps({"another": 1})
        yield Part(f"{where}.arguments"), _with_function(call, {**function, "arguments": other})
    for key in call:
        if key not in ("function", "name", "arguments", "type"):
            yield _counted(f"messages[].tool_calls[].{key}"), _without(call, key)


def _tool_variants(tool: Mapping[str, Any], where: str) -> Iterator[tuple[Part, dict[str, Any]]]:
    function = tool.get("function", tool)
    yield Part(where), renamed(tool)
    for key, value in function.items():
        if key in SCHEMAS and value:
            yield Part(f"{where}.{key}"), _with_function(tool, {**function, key: _schema("another")})
            fields = value.get("properties") if isinstance(value, Mapping) else None
            if isinstance(fields, Mapping) and fields:
                told = {**value, "properties": {name: {"type": "x", "description": "y"} for name in fields}}
                part = _counted(f"tools[].{key}: types and descriptions")
                yield part, _with_function(tool, {**function, key: told})
        elif key not in ("name", "type"):
            yield _counted(f"tools[].{key}"), _with_function(tool, _without(function, key))


def _without(whole: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in whole.items() if name != key}


def _counted(name: str) -> Part:
    return Part(name, essential=False, lasting=False)


# -- arguments ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def argument_form(fmt: ChatFormat, shape: ChatShape) -> ArgumentForm | None:
    """How the template expects tool arguments: as an object, as JSON text, or either; None if that cannot be told.

    Right is what shows the arguments once: the object as JSON or part by part, and not as JSON text within JSON text
    or as Python writes it.
    """
    shown = {form: _shows(fmt, _with_arguments(shape, form)) for form in ("object", "text")}
    if all(shown.values()):
        return "either"
    return next((form for form in ("object", "text") if shown[form]), None)


def _with_arguments(shape: ChatShape, form: Any) -> ChatShape:
    def of(call: CallShape) -> CallShape:
        return call if call.arguments == "none" else replace(call, arguments=form)

    return replace(shape, turns=tuple(replace(turn, calls=tuple(map(of, turn.calls))) for turn in shape.turns))


def _shows(fmt: ChatFormat, shape: ChatShape) -> bool:
    text = _rendered(fmt, *_chat_like(shape))
    if text is None:
        return False
    if any(_json_at(text, place) == _ARGUMENTS for place in range(len(text)) if text[place] == "{"):
        return True
    key, value = next(iter(_ARGUMENTS.items()))
    # Part by part, as in <parameter=key>value</parameter>.
    return key in text and (value in text or json.dumps(value) in text) and f"'{key}'" not in text


def _json_at(text: str, place: int) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text, place)[0]
    except (ValueError, RecursionError):
        return None
