"""Chat templates that mark the responses themselves, with `{% generation %}` and `{% endgeneration %}`.

The markers are transformers': `apply_chat_template(..., return_assistant_tokens_mask=True)` reads them. A template that
has them says itself what a response is, so nothing is derived from prefixes (kd.data.chat.render_chat).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from kd.data.chat import PROBE, ChatFormat, Messages, RenderedChat, Span, template_errors
from kd.data.chat_parts import renamed
from kd.data.messages import REASONING
from kd.errors import UserError
from kd.models.template_limits import limit_chat_templates

# What Jinja renders to a string of its own before it becomes output.
_BUFFERED = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


class _Generation(Extension):
    """Parses the markers, to see where they are."""

    tags = {"generation"}  # noqa: RUF012 # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=64)
def marks_responses(fmt: ChatFormat) -> bool:
    """Whether a chat template marks the responses itself.

    Raises:
        UserError: a marked block is inside another one, or in a macro, call, filter, block `set` or recursive loop.
            There transformers gets its place wrong: it counts the characters of the output before the block.
    """
    with template_errors(fmt.tokenizer):
        # Nothing is rendered.
        tree = Environment(extensions=[_Generation, loopcontrols]).parse(fmt.template)  # noqa: S701
    blocks = list(_blocks(tree, buffered=False))
    for line, buffered in blocks:
        if buffered:
            raise UserError(
                f"the chat template {fmt.title}, line {line}: `{{% generation %}}` is inside another of its kind, "
                "a macro, a call, a filter, a block `set` or a recursive loop, and its place in the text is unknown "
                "there; move it out"
            )
    return bool(blocks)


def _blocks(node: nodes.Node, buffered: bool) -> Iterator[tuple[int, bool]]:
    """(line, whether its output is buffered) of each marked block below a node of a template's syntax tree."""
    is_block = isinstance(node, nodes.Scope)
    if is_block:
        yield node.lineno, buffered
    recursive = isinstance(node, nodes.For) and node.recursive
    for child in node.iter_child_nodes():
        yield from _blocks(child, buffered or is_block or recursive or isinstance(node, _BUFFERED))


def render_marked_chat(
    fmt: ChatFormat, messages: Messages, turns: Sequence[int], tools: Any = None, mark: str = ""
) -> RenderedChat | None:
    """Renders a conversation and finds its responses by the template's own markers.

    The markers are the truth, as they are to transformers: what a block includes (a header) is learnt, and what it
    leaves out (a thought, an earlier turn) is not. One thing is added, so that the model learns to stop: the end token
    belongs to the response if it follows a block that has none, with nothing but white space between them. Blocks of
    assistant turns without loss are left out.

    The arguments are those of kd.data.chat.render_chat; the template has markers.

    Returns:
        None where nothing is marked in the turns that carry loss.

    Raises:
        UnrenderableError: the template refuses the conversation.
    """
    shown = messages[: turns[-1] + 1]
    text, blocks = render_blocks(fmt, shown, tools)
    written = [text[start:stop] for start, stop in blocks]
    silent = [k for k, message in enumerate(shown) if message["role"] == "assistant" and k not in turns]
    without_loss = {place for k in silent for place in blocks_of_turn(fmt, shown, k, tools, written)}
    spans = []
    for place, (start, stop) in enumerate(blocks):
        ending = fmt.end_token(text, start, mark)
        if ending is not None and ending[0] >= stop and not text[stop : ending[0]].strip():
            stop = ending[1]  # noqa: PLW2901
        if place not in without_loss and start < stop:
            spans.append((start, stop))
    if not spans:
        return None
    ending = fmt.end_token(text, spans[-1][0], mark)
    return RenderedChat(text, tuple(spans), None if ending is None else ending[0], rewritten=False)


def render_blocks(fmt: ChatFormat, messages: Messages, tools: Any) -> tuple[str, list[Span]]:
    """A conversation as text, and [start, end) of each marked block in it. Raises UnrenderableError."""
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_chat_templates()
    with template_errors(fmt.tokenizer):
        special: Any = fmt.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=tools or None,
            chat_template=fmt.template,
            return_assistant_tokens_mask=True,
            **special,
        )
    (text,), (blocks,) = rendered
    return text, blocks


def blocks_of_turn(fmt: ChatFormat, messages: Messages, turn: int, tools: Any, written: Sequence[str]) -> range:
    """Which marked blocks an assistant turn has: those that change with its words. written: the text of each block."""
    text, blocks = render_blocks(fmt, [*messages[:turn], _other_words(messages[turn]), *messages[turn + 1 :]], tools)
    others = [text[start:stop] for start, stop in blocks]
    before = _equal(written, others)
    return range(before, len(written) - _equal(written[before:][::-1], others[before:][::-1]))


def _equal(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _other_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant turn of the same shape that says and calls something else; an empty one says something."""
    changed = {key: PROBE if key in REASONING else value for key, value in message.items()}
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [renamed(call) for call in calls]
    if message["content"] or not calls:
        changed["content"] = PROBE
    return changed
