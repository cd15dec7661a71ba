"""Records -> text, before the tokenizer sees it: what is a response, what a control token, what is dropped and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kd.config.data_recipe import DataRecipe
from kd.data.chat import (
    ChatFormat,
    Messages,
    RenderedChat,
    Span,
    UnrenderableError,
    chat_format,
    render_chat,
    template_of,
)
from kd.data.chat_fitting import as_the_template_wants, refuse_lost_parts
from kd.data.chat_markers import marks_responses, render_marked_chat
from kd.data.chat_parts import control_tokens, shape_of
from kd.data.messages import REASONING, carries_loss, strings_of
from kd.data.record_forms import form_of
from kd.data.special_text import marked, marks_for, spelled, spelled_in_order, unmarked
from kd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ASSISTANT = "no assistant turn"
NO_WEIGHT = "every assistant turn has weight 0"
EMPTY_RESPONSE = "empty response"
RESPONSE_NOT_FOUND = "the chat template does not show where the response is"

EOS_APPENDED = "the template renders no end token: EOS appended"
ENDLESS = "the template renders no end token, and append_eos is false: the response has none"
MARKED = "responses as the chat template marks them: {% generation %}"
REWRITTEN = "the template rewrites earlier turns: last assistant turn only"
UNWEIGHTED = "assistant turns with weight 0: without loss"
EMPTY_TURNS = "empty assistant turns: without loss"
TRAILING = "messages after the last assistant turn: left out"
CHANGED = "the template leaves out or changes words of a message"
CUT_OFF = "finish_reason is length: the response has no end token"


class NoChatTemplateError(UserError):
    """A conversation meets a tokenizer without a chat template."""

    def __init__(self, problem: str, remedy: str = "set data.chat_template to `plain` or to a .jinja file") -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


@dataclass(frozen=True)
class Dropped:
    """A record that gives no row, and why."""

    reason: str


@dataclass(frozen=True)
class Draft:
    """A record as text, before the tokenizer has seen it.

    Attributes:
        location: named in messages.
        text: the whole row.
        special: whether the tokenizer adds its own special tokens (BOS).
        append_eos: whether EOS follows the text.
        prompt: pairs: the part of `text` that is no response.
        spans: conversations: [start, end) of each response in characters.
        context: token that stands before a pair without a prompt.
        parses: whether special tokens that the text spells become control tokens.
        literal: conversations: [start, end) of special tokens that are text nevertheless.
        notes: what is particular about the row.
        unread: keys of its messages that the chat template does not render.
    """

    location: str
    text: str
    special: bool
    append_eos: bool
    prompt: str | None = None
    spans: tuple[Span, ...] | None = None
    context: int | None = None
    parses: bool = True
    literal: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def draft(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, settings: DataRecipe, location: str
) -> Draft | Dropped:
    """A row, as kd.data.record_forms gives it, as text. Raises UserError (see kd.data.examples.encode_record)."""
    form = form_of(row)
    append_eos = settings.append_eos if settings.append_eos is not None else form != "text"
    cut_off = row.get("finish_reason") == "length"
    if form in ("messages", "chat pair"):
        return conversation_draft(row, tokenizer, settings, append_eos, cut_off, location)
    append_eos = append_eos and not cut_off
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{location}: {missing_eos(tokenizer)}")
    if form == "text":
        drafted = Draft(location, row["text"], adds_special(row["text"], tokenizer, settings), append_eos)
    elif not row["completion"].strip() and settings.empty_responses == "drop":
        return Dropped(EMPTY_RESPONSE)
    else:
        drafted = pair_draft(row["prompt"], row["completion"], tokenizer, settings, append_eos, location)
    notes = [CUT_OFF] if cut_off and (form == "pair" or settings.append_eos) else []
    if tokens := spelled([drafted.text], tokenizer):
        how = "read as control tokens" if settings.special_tokens == "parse" else "encoded as text"
        notes.append(f"the text spells {listed(tokens)}: {how} (data.special_tokens: {settings.special_tokens})")
    return replace(drafted, parses=settings.special_tokens == "parse", notes=tuple(notes))


def listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(f"`{token}`" for token in tokens[:3])
    return f"{shown} and {len(tokens) - 3} more" if len(tokens) > 3 else shown


def missing_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path} has no EOS token to append; set data.append_eos: false"


def adds_special(text: str, tokenizer: PreTrainedTokenizerBase, settings: DataRecipe) -> bool:
    """Whether the tokenizer may add its special tokens: not where the text itself already begins with BOS."""
    if settings.special_tokens == "literal":
        return True
    return tokenizer.bos_token is None or not text.startswith(str(tokenizer.bos_token))


def pair_draft(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataRecipe,
    append_eos: bool,
    location: str,
) -> Draft:
    """Prompt and completion as lm-eval prepares them; an empty prompt gives BOS (without one, EOS) as the context."""
    if prompt == "":
        context = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return Draft(location, completion, False, append_eos, prompt="", context=context)
    text = prompt + completion
    special = adds_special(text, tokenizer, settings)
    return Draft(location, text, special, append_eos, prompt=prompt.rstrip())


# -- conversations -----------------------------------------------------------------------------------------------------


def conversation_draft(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataRecipe,
    append_eos: bool,
    cut_off: bool,
    location: str,
) -> Draft | Dropped:
    """A conversation, rendered. Raises UserError where the template refuses it, or loses a part of it."""
    first = 0 if "messages" in row else len(row["prompt"])
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    turns = turns_with_loss(messages, first, settings, location)
    if isinstance(turns, Dropped):
        return turns
    places, notes = turns
    tools = row.get("tools")
    template = template_of(tokenizer, settings, tools)
    if template is None:
        raise NoChatTemplateError(f"{location}: a conversation, but {tokenizer.name_or_path} has no chat template")
    fmt = chat_format(tokenizer, template)
    roles = ", ".join(message["role"] for message in messages)
    last_reply = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    try:
        messages, more = as_the_template_wants(fmt, messages[: places[-1] + 1], tools, location)
        unread = refuse_lost_parts(fmt, messages, tools, location)
        find = render_marked_chat if marks_responses(fmt) else render_chat
        rendered = render_literally(
            fmt, messages, tools, location, lambda given, about, mark: find(fmt, given, places, about, mark)
        )
    except UnrenderableError as error:
        raise UserError(
            f"{location}: the chat template refuses this conversation: {error}; its roles are {roles}: change the row "
            "or the chat template"
        ) from error
    if rendered is None:
        return Dropped(RESPONSE_NOT_FOUND)
    chat, literal, spelled_notes = rendered
    notes = [*notes, *more, *spelled_notes, *([MARKED] if find is render_marked_chat else [])]
    # Earlier turns that a template rewrites carry no loss, and have a note of their own.
    kept = [m for k, m in enumerate(messages) if not chat.rewritten or m["role"] != "assistant" or k == places[-1]]
    if not says_all(chat.text, kept):
        notes.append(CHANGED)
    drafted = Draft(
        location, chat.text, False, append_eos, spans=chat.spans, literal=literal, notes=tuple(notes), unread=unread
    )
    # Where the turn that was cut off carries no loss, the row ends with an earlier one, which was not.
    return finished(drafted, chat, cut_off and places[-1] == last_reply, tokenizer)


def turns_with_loss(
    messages: Sequence[Mapping[str, Any]], first: int, settings: DataRecipe, location: str
) -> tuple[list[int], list[str]] | Dropped:
    """Places of the assistant turns from `first` on that carry loss, and notes on those that carry none."""
    asked = [k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"]
    carrying = [k for k, message in enumerate(messages) if carries_loss(message, f"{location}: messages[{k}]")]
    if not asked:
        return Dropped(NO_ASSISTANT)
    weighted = [k for k in asked if k in carrying]
    if not weighted:
        return Dropped(NO_WEIGHT)
    keeps = settings.empty_responses == "keep"
    turns = [k for k in weighted if keeps or not is_empty(messages[k])]
    if not turns:
        return Dropped(EMPTY_RESPONSE)
    facts = {
        UNWEIGHTED: len(weighted) < len(asked),
        EMPTY_TURNS: len(turns) < len(weighted),
        TRAILING: turns[-1] == asked[-1] and turns[-1] < len(messages) - 1,
    }
    return turns, [note for note, holds in facts.items() if holds]


def says_all(text: str, messages: Messages) -> bool:
    """Whether what the messages say stands in the rendered text, white space left aside."""
    rendered = "".join(text.split())
    return all("".join(message["content"].split()) in rendered for message in messages)


def is_empty(message: Mapping[str, Any]) -> bool:
    return not message["content"].strip() and not any(message.get(key) for key in ("tool_calls", *REASONING))


Render = Callable[[Messages, Any, str], RenderedChat | None]


def render_literally(
    fmt: ChatFormat, messages: Messages, tools: Any, location: str, render: Render, ask: bool = False
) -> tuple[RenderedChat, tuple[Span, ...], list[str]] | None:
    """A conversation rendered so that special tokens which its own strings spell stay text.

    Args:
        fmt: the tokenizer's format.
        messages: the conversation, as the template wants it.
        tools: its tools.
        location: named in messages to the user.
        render: (messages, tools, mark) -> the rendered conversation, with the mark before what is to stay text.
        ask: whether it goes on to where the model answers next.

    Returns:
        The rendered conversation without marks, [start, end) of what is literal in it, and notes; None where `render`
        gives none.

    Raises:
        UserError: the template changes such a token, so that it cannot be told whose it is.
    """
    tokens = spelled(list(strings_of([messages, tools])), fmt.tokenizer)
    plain = render(messages, tools, "")
    if plain is None:
        return None
    if not tokens and spelled_in_order(plain.text, fmt.tokenizer) == control_tokens(
        fmt, shape_of(messages, tools), ask
    ):
        return plain, (), []
    try:
        marks = marks_for([messages, tools])
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    # A template that takes a token out of the content itself, such as </think>, must find it there.
    unknown = [token for token in tokens if token in fmt.end_tokens or token not in fmt.template]
    for chosen, edges in ((list(tokens), True), (list(tokens), False), (unknown, False)):
        shown, shown_tools = (marked(value, chosen, marks, edges) for value in (messages, tools))
        try:
            chat = render(shown, shown_tools, marks.token)
        except UnrenderableError:  # what the template looks at is no longer there
            continue
        if chat is None:
            continue
        clear = unmarked(chat.text, marks, fmt.tokenizer)
        if clear.text == plain.text:
            spans = tuple((clear.places[start], clear.places[end]) for start, end in chat.spans)
            end = None if chat.end is None else clear.places[chat.end]
            found = listed(tuple(dict.fromkeys(clear.text[start:stop] for start, stop in clear.literal)))
            notes = [f"messages spell {found}: encoded as text"] if clear.literal else []
            if left := [token for token in tokens if token not in chosen]:
                notes.append(f"messages spell {listed(left)}, which the chat template reads: control tokens")
            return replace(chat, text=clear.text, spans=spans, end=end), clear.literal, notes
    raise UserError(
        f"{location}: its text contains {listed(tokens)}, and the chat template {fmt.title} changes it, so text "
        "and control tokens cannot be told apart; rephrase the row"
    )


def unanswered_draft(fmt: ChatFormat, messages: Messages, tools: Any, location: str, ask: bool) -> Draft:
    """A conversation as text without a response; with `ask`, up to where the model answers next.

    Raises:
        LostPartError: the template leaves out a part of it.
        UserError: its text cannot be told from control tokens.
        UnrenderableError: the template refuses it.
    """
    wanted, notes = as_the_template_wants(fmt, messages, tools, location)
    refuse_lost_parts(fmt, wanted, tools, location)

    def render(given: Messages, given_tools: Any, _mark: str) -> RenderedChat:
        return RenderedChat(fmt.render(given, given_tools, ask=ask), (), None, rewritten=False)

    rendered = render_literally(fmt, wanted, tools, location, render, ask)
    assert rendered is not None
    chat, literal, _ = rendered
    return Draft(location, chat.text, False, False, spans=(), literal=literal, notes=tuple(notes))


def finished(drafted: Draft, chat: RenderedChat, cut_off: bool, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """A conversation's end: the template's end token, EOS in its place, or none where the response was cut off."""
    notes = [*drafted.notes, *([REWRITTEN] if chat.rewritten else [])]
    if cut_off:
        start, end = chat.spans[-1]
        stop = start + len(drafted.text[start : end if chat.end is None else chat.end].rstrip())
        spans = (*chat.spans[:-1], (start, min(stop, end)))
        return replace(cut_at(drafted, stop), append_eos=False, spans=spans, notes=(*notes, CUT_OFF))
    if chat.end is not None:
        return replace(drafted, append_eos=False, notes=tuple(notes))
    if drafted.append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{drafted.location}: {missing_eos(tokenizer)}")
    # EOS follows the response, also where a template that marks it writes something after it.
    drafted = cut_at(drafted, chat.spans[-1][1])
    return replace(drafted, notes=(*notes, EOS_APPENDED if drafted.append_eos else ENDLESS))


def cut_at(drafted: Draft, stop: int) -> Draft:
    literal = tuple(span for span in drafted.literal if span[1] <= stop)
    return replace(drafted, text=drafted.text[:stop], literal=literal)
