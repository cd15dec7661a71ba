"""Conversations: rendered by the chat template, with the characters that are the assistant's responses."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config.data_recipe import DataRecipe
from kd.data.special_text import special_texts
from kd.errors import MachineError, UserError
from kd.models.checkpoint import Checkpoint
from kd.models.template_limits import TemplateLimitError, limit_chat_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("dae")

PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token is defined else '' }}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt else '' }}"
)
PROBE = "replyprobe"

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and where the responses stand in it.

    Attributes:
        text: up to the last turn that carries loss; messages after it are left out.
        spans: [start, end) in characters of each response or part of one, in order; with its end token, if it has one.
        end: where the first end token after the start of the last span begins; None where there is none.
        rewritten: earlier turns look different once later ones are there, so that `spans` holds the last response only.
    """

    text: str
    spans: tuple[Span, ...]
    end: int | None
    rewritten: bool


class UnrenderableError(Exception):
    """The chat template refuses these messages; the text is its own error."""


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer writes conversations: its template, and the texts of the tokens that end a response."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    end_tokens: tuple[str, ...]

    @property
    def title(self) -> str:
        """How messages name the template, after the words "the chat template"."""
        return "`plain`" if self.template == PLAIN_TEMPLATE else f"of {self.tokenizer.name_or_path or 'the tokenizer'}"

    def render(self, messages: Messages, tools: Any = None, ask: bool = False) -> str:
        """Messages as text; with `ask`, up to where the model answers next. Raises UnrenderableError."""
        return render(self.tokenizer, self.template, messages, tools, ask)

    def end_token(self, text: str, start: int, mark: str = "") -> Span | None:
        """[start, end) of the first end token in text[start:] that the template wrote, or None.

        mark: a character before those that are text (see kd.data.special_text).
        """
        place = start
        while match := self.end_pattern.search(text, place):
            if not mark or text[match.start() - 1 : match.start()] != mark:
                return match.span()
            place = match.end()
        return None

    @functools.cached_property
    def end_pattern(self) -> re.Pattern[str]:
        """Matches the end tokens, the longest where several begin at one place."""
        return re.compile("|".join(map(re.escape, sorted(self.end_tokens, key=len, reverse=True))) or r"(?!)")


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, tools: Any = None, ask: bool = False
) -> str:
    """`apply_chat_template` as text, within `kd.models.template_limits`. Raises as `template_errors` does."""
    limit_chat_templates()
    with template_errors(tokenizer):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=ask,
            tokenize=False,
        )
    assert isinstance(text, str)
    return text


@contextmanager
def template_errors(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Raise UserError for a template that Jinja cannot read or that does too much, UnrenderableError for what else goes
    wrong in it.
    """
    from jinja2.exceptions import TemplateSyntaxError

    name = tokenizer.name_or_path or "the tokenizer"
    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(
            f"{name}: its chat template, line {error.lineno}: {error.message}; repair the template"
        ) from error
    except TemplateLimitError as error:
        raise UserError(f"{name}: {error}") from error
    except (RecursionError, SyntaxError) as error:  # of Jinja's parser or of what it compiles a template to
        raise UserError(f"{name}: the chat template is nested too deeply; correct the template") from error
    except (UserError, MachineError, MemoryError):
        raise
    except Exception as error:  # a template may raise whatever Python's operators and methods do
        raise UnrenderableError(str(error) or type(error).__name__) from error


def template_of(tokenizer: PreTrainedTokenizerBase, settings: DataRecipe, tools: Any = None) -> str | None:
    """The chat template: the tokenizer's own, else the fallback that `data.chat_template` names, else None.

    A tokenizer may hold several by name (`default`, `tool_use`); transformers chooses.

    Raises:
        UserError: `data.chat_template` is neither `plain` nor a readable file, or transformers cannot choose.
    """
    if tokenizer.chat_template:
        try:
            return tokenizer.get_chat_template(tools=tools or None)
        except ValueError as error:
            raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'}: its chat templates: {error}") from error
    return None if settings.chat_template is None else named_template(settings.chat_template)


def named_template(name: str) -> str:
    """`plain`, or the contents of a .jinja file. Raises UserError."""
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {name}: unreadable ({error}); give `plain` or a .jinja file") from error


def load_tokenizer(
    source: Checkpoint, settings: DataRecipe, trust_remote_code: bool = False, chat_template: Any = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the fallback chat template set where it has none of its own.

    So the tokenizer that a run writes into its folder renders conversations as they were trained.

    chat_template: takes the place of the tokenizer's own and of the fallback.

    Raises:
        UserError: there is no tokenizer that transformers can open, or the fallback cannot be read.
    """
    tokenizer = source.tokenizer(trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif settings.chat_template is not None:
        if tokenizer.chat_template:
            logger.warning(
                "data.chat_template: %s is not used: the tokenizer of %s has a chat template of its own",
                settings.chat_template,
                source,
            )
        else:
            tokenizer.chat_template = named_template(settings.chat_template)
    return tokenizer


@functools.lru_cache(maxsize=8)
def chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    """The format of a tokenizer's conversations.

    End tokens: EOS, and the first special token that the template writes after an assistant's content (`<|im_end|>`,
    `<end_of_turn>`, ...): seen by rendering a short conversation, since templates do not say. A marker that this
    tokenizer has no special token for is ordinary text.
    """
    special = special_texts(tokenizer)
    ends = set() if tokenizer.eos_token is None else {str(tokenizer.eos_token)}
    reply = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
    for messages in (reply, [{"role": "system", "content": "instruction"}, *reply]):
        try:
            _, probe, after = render(tokenizer, template, messages).rpartition(PROBE)
        except UnrenderableError:
            continue
        found = [(after.find(token), -len(token), token) for token in special if token in after]
        if probe and found:
            ends.add(min(found)[2])
        break
    return ChatFormat(tokenizer, template, tuple(sorted(ends)))


def render_chat(
    fmt: ChatFormat, messages: Messages, turns: Sequence[int], tools: Any = None, mark: str = ""
) -> RenderedChat | None:
    """Renders a conversation and finds its responses, under a template that does not mark them (kd.data.chat_markers).

    The response to messages[:k] is what render(messages[:k+1]) has after render(messages[:k], ask), up to and including
    the end token that the template writes behind it; without one, all of it. Each is looked up in the whole
    conversation. Where an earlier one does not stand there as it was (templates that drop old reasoning), only the last
    response is taken.

    Args:
        fmt: the tokenizer's format.
        messages: the conversation.
        turns: places of the assistant turns that carry loss, at least one.
        tools: in the form that the template expects.
        mark: a character before special tokens that are text (see kd.data.special_text); it is left where it is.

    Returns:
        None where the last response cannot be told from the rest.

    Raises:
        UnrenderableError: the template refuses the conversation.
    """
    assert turns
    text = fmt.render(messages[: turns[-1] + 1], tools)
    last = response_span(fmt, messages[: turns[-1] + 1], text, tools, mark)
    if last is None:
        return None
    ending = fmt.end_token(text, last[0], mark)
    end = None if ending is None else ending[0]
    spans = []
    for k in turns[:-1]:
        try:
            as_asked = fmt.render(messages[: k + 1], tools)
        except UnrenderableError:
            return RenderedChat(text, (last,), end, rewritten=True)
        span = response_span(fmt, messages[: k + 1], as_asked, tools, mark)
        if span is None or text[: span[1]] != as_asked[: span[1]]:
            return RenderedChat(text, (last,), end, rewritten=True)
        spans.append(span)
    return RenderedChat(text, (*spans, last), end, rewritten=False)


def response_span(fmt: ChatFormat, messages: Messages, text: str, tools: Any, mark: str) -> Span | None:
    """[start, end) of the last message's response in `text`, which is `messages` rendered; None if it is not found."""
    try:
        question = fmt.render(messages[:-1], tools, ask=True)
        start = len(question) if text.startswith(question) else None
    except UnrenderableError:
        start = None  # Nothing comes before the response, or only what no model is asked to answer.
    if start is None:
        start = content_start(fmt, messages, text, tools)
    if start is None:
        return None
    ending = fmt.end_token(text, start, mark)
    return start, len(text) if ending is None else ending[1]


def content_start(fmt: ChatFormat, messages: Messages, text: str, tools: Any) -> int | None:
    """Where the last message's content begins in `text`: where two renderings that differ in it alone part.

    For templates whose question is no beginning of the answered conversation, such as those that open the model's
    reasoning when they ask, and leave it out of the history.
    """
    try:
        one, other = (fmt.render([*messages[:-1], {"role": "assistant", "content": c}], tools) for c in ("x", "y"))
    except UnrenderableError:
        return None
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return start if start is not None and text[:start] == one[:start] else None
