"""The shapes that rows come in, and the three that the rest of the toolkit knows.

    messages     {"messages": [{"role", "content"}, ...]}, with `tools`, `system`, `finish_reason`
    pair         {"prompt", "completion"}: both strings, or both lists of messages
    text         {"text"}

Other well-known shapes are mapped onto these. A key that means something is honoured or refused, and every key that is
not read is named, so that somebody can count it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kd.config.data_recipe import FORMATS, Format
from kd.data.messages import OLD_CALLS, check_text, holds_nulls, json_of, kind_of, list_of_objects, messages_of, tool_of
from kd.errors import UserError

EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."} or {"text": "..."}'
)

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
# What servers say of an answer that was broken off, and of one that was not.
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "max_length", "content_filter", "safety")
_COMPLETE = ("stop", "eos", "end", "end_turn", "end_token", "eos_token", "stop_sequence", "tool_calls", "tool_use",
             "function_call", "")  # fmt: skip
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


@dataclass(frozen=True)
class Record:
    """One row in a shape that the toolkit knows.

    Attributes:
        row: `messages`, or `prompt` and `completion`, or `text`; with `tools` (a list) and `finish_reason` where there
            are any. A message has `role`, `content` (a string) and what else it was given with a value.
        format: what the row was given as.
        unread: keys of the row that mean nothing here, such as an id.
        nulls_dropped: whether null keys were taken out of its tools or calls, as Arrow's padding.
    """

    row: dict[str, Any]
    format: Format
    unread: tuple[str, ...] = ()
    nulls_dropped: bool = False


def record_of(raw: Any, location: str, declared: Format | None = None, padded: Collection[str] = frozenset()) -> Record:
    """A row as it was read, in a shape that the toolkit knows.

    Args:
        raw: the row.
        location: named in messages, such as `rows.jsonl:7`.
        declared: the source's `format`; None: the one that the row's keys tell.
        padded: its columns that Arrow fills up with nulls: those in tools and calls are dropped.

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
    for key, words in OLD_CALLS.items():
        if given.get(key):
            raise UserError(f"{location}: {key}: {words}")
    unread = tuple(key for key in given if key not in (*_NEEDED[kind], *_ALSO_READ[kind]))
    row = _READERS[kind](given, location)
    row |= _finish(given, location)
    if "text" in row or isinstance(row.get("prompt"), str):
        refuse_conversation_keys(given, location, kind)
        return Record(row, kind, unread)
    if tools := list_of_objects(given.get("tools"), f"{location}: tools"):
        row["tools"] = [
            tool_of(tool, f"{location}: tools[{place}]", "tools" in padded) for place, tool in enumerate(tools)
        ]
    row = with_system(row, given.get("system"), location)
    for key in ("messages", "prompt", "completion"):
        if key in row:
            given_as = "conversations" if kind == "sharegpt" else key
            row[key] = messages_of(row[key], f"{location}: {given_as}", given_as in padded)
    dropped = ("tools" in padded and holds_nulls(tools)) or any(
        holds_nulls(message.get("tool_calls")) for column in padded for message in messages_in(given.get(column))
    )
    return Record(row, kind, unread, dropped)


def messages_in(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, (list, tuple)):
        yield from (message for message in value if isinstance(message, Mapping))


def format_of(given: Mapping[str, Any], location: str) -> Format:
    """The format that a row's keys tell. Raises UserError where they tell none, or several."""
    found = [kind for kind in FORMATS if all(key in given for key in _NEEDED[kind])]
    # A `prompt` beside messages is an id or the first turn again, as hub data sets have it; a completion is neither.
    if found == ["messages"] and "completion" in given:
        found.append("prompt-completion")
    if len(found) == 1:
        return found[0]
    if not found:
        words = f"{location}: its keys are {_listed(given)}; a row is {EXAMPLE}"
        answer = "; let a model answer prompts: dae sample --model MODEL --prompts FILE --output ROWS"
        raise UserError(words + (answer if "prompt" in given else ""))
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
    known = reason.lower().removeprefix("finish_reason_")
    if known not in (*_CUT_OFF, *_COMPLETE):
        raise UserError(
            f"{location}: finish_reason: {reason!r}: not known; write length where the answer was cut off, else stop"
        )
    return {"finish_reason": "length"} if known in _CUT_OFF else {}


def refuse_conversation_keys(given: Mapping[str, Any], location: str, kind: Format) -> None:
    """Raise UserError where a string row has keys that only a chat template could render."""
    for key in ("system", "tools"):
        if given.get(key) not in (None, "", [], "[]"):
            raise UserError(
                f"{location}: {key}: plain strings use no chat template, so it would be lost; put it into the "
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
    if turn.get("from") is None:
        return dict(turn)
    if other := next((key for key in ("role", "content") if turn.get(key) is not None), None):
        raise UserError(f"{where}: has `from` and `{other}`, which are ambiguous; keep `from` and `value`")
    if not isinstance(turn.get("value"), str):
        raise UserError(f"{where}.value: expected a string, not {kind_of(turn.get('value'))}")
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where}.from: {speaker!r}: unknown speaker; expected one of {', '.join(_SPEAKERS)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if speaker.lower() == "function_call":
        calls = json_of(turn.get("value"), f"{where}.value")
        return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": role, "content": turn.get("value"), **rest}


def _read_alpaca(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Alpaca's `instruction`, `input`, `output` as one exchange; `history` holds earlier ones, [question, answer]."""
    for key in ("instruction", "input", "output"):
        if key in given:
            check_text(given[key], f"{location}: {key}")
    messages = []
    history = given.get("history") or ()
    history = json_of(history, f"{location}: history") if isinstance(history, str) else history
    if not isinstance(history, (list, tuple)):
        raise UserError(f"{location}: history: expected a list of [question, answer], not {kind_of(history)}")
    for place, turn in enumerate(history):
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
