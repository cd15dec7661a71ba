"""A conversation as one chat template reads it: roles that it knows, tool arguments in its form, nothing left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kd.data.chat import ChatFormat
from kd.data.chat_parts import argument_form, shape_of, unrendered_parts
from kd.data.messages import check_text, json_of, strings_of
from kd.errors import UserError

DEVELOPER = "the template knows no developer turn: rendered as system"
READ_AS_OBJECT = "tool arguments given as JSON text: rendered as the object that the chat template wants"
READ_AS_TEXT = "tool arguments given as an object: rendered as the JSON text that the chat template wants"


class LostPartError(UserError):
    """A chat template leaves out a part of a conversation that carries meaning."""


def as_the_template_wants(
    fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any, location: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as this template reads them: roles that it knows, tool arguments in its form.

    Raises UserError for arguments that are no JSON object, and for strings that no tokenizer takes.
    """
    notes = []
    taken = [{key: value for key, value in m.items() if key not in ("weight", "train")} for m in messages]
    if any(message["role"] == "developer" for message in taken) and "developer" not in fmt.template:
        notes.append(DEVELOPER)
        taken = [{**m, "role": "system"} if m["role"] == "developer" else m for m in taken]
    for text in strings_of([taken, tools]):
        check_text(text, f"{location}: messages")
    if not any("tool_calls" in message for message in taken):
        return taken, notes
    wanted = argument_form(fmt, shape_of(taken, tools))
    for place, message in enumerate(taken):
        if "tool_calls" in message:
            where = f"{location}: messages[{place}].tool_calls"
            converted = [in_form(call, wanted, f"{where}[{at}]") for at, call in enumerate(message["tool_calls"])]
            if converted != message["tool_calls"]:
                notes.append(READ_AS_TEXT if wanted == "text" else READ_AS_OBJECT)
            taken[place] = {**message, "tool_calls": converted}
    return taken, list(dict.fromkeys(notes))


def in_form(call: Mapping[str, Any], wanted: str | None, where: str) -> dict[str, Any]:
    """A tool call with its arguments in the form that the template expects: an object, JSON text, or unchanged.

    No arguments (null, or text without a character, as servers write it) are an empty object. Raises UserError where
    text is no JSON object.
    """
    function = dict(call.get("function", call))
    if "arguments" not in function:
        return dict(call)
    given = function["arguments"]
    value = given if given is not None else {}
    if isinstance(given, str):
        value = json_of(given, f"{where}.arguments") if given.strip() else {}
        if not isinstance(value, dict):
            raise UserError(f"{where}.arguments: {given[:60]!r}: expected a JSON object; repair the row")
        for text in strings_of(value):
            check_text(text, f"{where}.arguments")
    is_text = isinstance(given, str) and bool(given.strip())
    if wanted == "text":
        function["arguments"] = given if is_text else json.dumps(value, ensure_ascii=False)
    elif wanted == "object" or not is_text:
        function["arguments"] = value
    return {**call, "function": function} if "function" in call else function


def refuse_lost_parts(
    fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], tools: Any, location: str
) -> tuple[str, ...]:
    """The other keys that the template leaves out. Raises LostPartError where it leaves out a part with a meaning."""
    lost = unrendered_parts(fmt, messages, tools)
    essential = [part.name for part in lost if part.essential]
    if essential:
        others = len(essential) - 1
        more = f" and {others} other {'part' if others == 1 else 'parts'}" if others else ""
        raise LostPartError(
            f"{location}: {essential[0]}: the chat template {fmt.title} does not render it{more}, so it would be "
            "lost; remove it from the row, or use a chat template that renders it (chat_template.jinja next to the "
            "tokenizer)"
        )
    return tuple(dict.fromkeys(part.name for part in lost))
