"""Records -> token rows: input ids, and which of them are response tokens (only they carry loss).

Legend: T positions of a row, R rows. The response mask is aligned with the ids: mask_T[t] says that token t is a
response token, which the logits of position t - 1 predict. mask_T[0] is False in every row: nothing predicts token 0.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import ChatFormat, Messages
from kd.data.drafts import Draft, Dropped, draft, unanswered_draft
from kd.data.record_forms import record_of
from kd.data.records import Reading, read_records
from kd.data.special_text import encode_with_literals, has_surplus, reads_normalised, special_ids
from kd.data.token_rows import Mask, TokenRow, TokenRows
from kd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_RECORDS = 1024

NO_RESPONSE = "no response token"
PADDING = "null keys of tools and calls dropped: Arrow's padding"
PROMPT_TOO_LONG = "prompt fills max_length: no response token left"


@dataclass
class SourceReport:
    """What became of one source's records. `kept` includes truncated rows; each note begins with its number of rows.

    dropped_at: indices of the dropped records; formats: number of records by shape; unread: keys that nothing reads,
    with the number of records that have them; texts: texts of some rows; conversations: kept rows that the chat
    template rendered.
    """

    path: str
    records: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_at: list[int] = field(default_factory=list)
    tokens: int = 0
    response_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list, repr=False)
    conversations: int = 0

    def fill(self, reading: Reading, dropped: Mapping[str, int], notes: Mapping[str, int]) -> None:
        """Take over what was counted while the records were read and encoded."""
        if reading.nulls_dropped:
            notes = {**notes, PADDING: reading.nulls_dropped}
        self.dropped = dict(dropped)
        self.notes = [f"{count} {'row' if count == 1 else 'rows'}: {note}" for note, count in notes.items()]
        self.formats, self.unread, self.texts = dict(reading.formats), dict(reading.unread), reading.texts


@dataclass(frozen=True)
class Encoded:
    """A row, and what its source's report counts."""

    input_ids: list[int]
    response_mask: Mask
    truncated: bool
    notes: tuple[str, ...]
    unread: tuple[str, ...] = ()
    rendered: bool = False


def encode_record(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, settings: DataRecipe, location: str
) -> TokenRow | Dropped:
    r"""One record as a token row.

    `text`: every token is a response token, BOS excepted; BOS as the tokenizer adds it, EOS with `append_eos: true`.

    `prompt` and `completion` as text: no template; ids and cut as in lm-eval 0.4.13 (`TemplateLM._encode_pair`), so
    that a row is trained as it will be scored. Trailing white space of the prompt goes to the completion, both are
    encoded together, and as many tokens as the prompt has alone are the prompt's, so a token across the boundary is
    too (there lm-eval replaces the prompt's tokens by those of the prompt alone; here the row stays what was encoded).
    An EOS that the tokenizer adds by itself is taken off both first. EOS is appended unless `append_eos: false`, never
    twice.

    Conversations (`messages`; or `prompt` and `completion` as message lists, where only the completion's assistant
    turns are responses): the template's text is encoded once, without further special tokens, so BOS is there exactly
    if the template writes it. Responses are what the template marks with `{% generation %}` (kd.data.chat_markers); in
    a template without markers, they are found by comparing renderings (kd.data.chat). A token belongs to a response if
    its first character that is no white space does; a token of white space only belongs where it begins. So after
    `Answer: `, a token ` yes` is a response token, and where `\n` before a response merges with a `\n` in it, that
    token is not. Where no end token is rendered, EOS is appended unless `append_eos: false`. (Tokenizers that give no
    character offsets: cut as pairs are.) Contents are text, whatever they spell: control tokens come from the template.
    A turn of `weight: 0` and an empty one carry no loss, and with `finish_reason: length` the last response gets no end
    token. What the template leaves out is refused.

    In strings, `special_tokens` says whether the control tokens that they spell are read as such.

    A row longer than `max_length` is cut on the right, EOS included.

    Args:
        record: as `read_records` yields it.
        tokenizer: as `load_tokenizer` gives it.
        settings: all but the sources are used.
        location: named in messages, such as `rows.jsonl:7`.

    Raises:
        UserError: the record has none of these forms, the template refuses it or leaves a part of it out, or the
            tokenizer lacks what it needs.
    """
    drafted = draft(record_of(record, location).row, tokenizer, settings, location)
    if isinstance(drafted, Dropped):
        return drafted
    (encoded,) = encode_drafts([drafted], tokenizer, settings.max_length)
    if isinstance(encoded, Dropped):
        return encoded
    return TokenRow(encoded.input_ids, encoded.response_mask.tolist())


def load_rows(
    sources: Sequence[SourceRecipe], tokenizer: PreTrainedTokenizerBase, settings: DataRecipe
) -> tuple[list[TokenRows], list[SourceReport]]:
    """Reads and encodes sources, in order: the rows of each, and what became of its records.

    Raises:
        UserError: a source cannot be read, a record is wrong (the first one is named), or every record was dropped.
    """
    rows, reports = [], []
    for source in sources:
        report = SourceReport(source.title)
        kept = TokenRows.from_rows(encode_source(source, tokenizer, settings, report))
        refuse_empty(report, len(kept), settings)
        report.kept, report.tokens = len(kept), len(kept.input_ids)
        report.response_tokens = int(kept.response_mask.sum())
        rows.append(kept)
        reports.append(report)
    return rows, reports


def refuse_empty(report: SourceReport, kept: int, settings: DataRecipe) -> None:
    """Raise UserError if no row of a source is kept."""
    if not kept:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.dropped.items())
        raise UserError(
            f"{report.path}: none of its {report.records} rows has a response token ({reasons}); "
            f"check the rows, or raise data.max_length ({settings.max_length})"
        )


def encode_source(
    source: SourceRecipe, tokenizer: PreTrainedTokenizerBase, settings: DataRecipe, report: SourceReport
) -> Iterator[tuple[list[int], Mask]]:
    """Yields the rows of a source; counts records, truncated and dropped rows and notes in its report."""
    notes: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    reading = Reading()
    records = read_records(source, reading)
    while batch := list(itertools.islice(records, BATCH_RECORDS)):
        for place, encoded in enumerate(encode_records(batch, tokenizer, settings), start=report.records):
            if isinstance(encoded, Dropped):
                dropped[encoded.reason] += 1
                report.dropped_at.append(place)
                continue
            report.truncated += encoded.truncated
            notes.update(encoded.notes)
            reading.unread.update(encoded.unread)
            report.conversations += encoded.rendered
            yield encoded.input_ids, encoded.response_mask
        report.records += len(batch)
    report.fill(reading, dropped, notes)


def encode_records(
    records: Sequence[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, settings: DataRecipe
) -> list[Encoded | Dropped]:
    """(location, record) pairs as rows, one entry for each record. Raises UserError (see `encode_record`)."""
    drafted = [draft(record, tokenizer, settings, location) for location, record in records]
    encoded = iter(encode_drafts([i for i in drafted if isinstance(i, Draft)], tokenizer, settings.max_length))
    return [item if isinstance(item, Dropped) else next(encoded) for item in drafted]


def encode_drafts(
    drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded | Dropped]:
    """Drafts through the tokenizer, many at a time."""
    ids: list[list[int]] = [[] for _ in drafts]
    masks: list[Mask] = [np.zeros(0, np.bool_) for _ in drafts]
    kinds = sorted({(item.special, item.parses) for item in drafts if item.spans is None})
    for special, parses in kinds:
        chosen = [
            i
            for i, item in enumerate(drafts)
            if item.spans is None and (item.special, item.parses) == (special, parses)
        ]
        texts = encode_texts([drafts[i].text for i in chosen], tokenizer, special, parses)
        prompts = encode_texts([drafts[i].prompt or "" for i in chosen], tokenizer, special, parses)
        for i, text_ids, prompt_ids in zip(chosen, texts, prompts, strict=True):
            ids[i], masks[i] = cut_text(drafts[i], text_ids, prompt_ids)
    chats = [i for i, item in enumerate(drafts) if item.spans is not None]
    for i, (text_ids, mask) in zip(chats, encode_chats([drafts[i] for i in chats], tokenizer), strict=True):
        ids[i], masks[i] = text_ids, mask
    return [
        finish(item, row_ids, mask, tokenizer.eos_token_id, max_length)
        for item, row_ids, mask in zip(drafts, ids, masks, strict=True)
    ]


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool, parses: bool = True
) -> list[list[int]]:
    """Token ids of each text; an EOS that the tokenizer adds by itself is taken off (`append_eos` decides).

    special: whether the tokenizer adds its special tokens; parses: whether those that a text spells become such.

    Raises UserError if `parses` is false and the tokenizer reads them as control tokens anyway.
    """
    if not texts:
        return []
    how = {} if parses else {"split_special_tokens": True}
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False, **how)["input_ids"]
    if special and tokenizer.eos_token is not None:
        for text, row in zip(texts, encoded, strict=True):
            spelt = parses and text.endswith(str(tokenizer.eos_token))
            if row[-1:] == [tokenizer.eos_token_id] and not spelt:
                row.pop()
    if not parses:
        refuse_control_tokens(texts, encoded, tokenizer, special)
    return encoded


def refuse_control_tokens(
    texts: Sequence[str], encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, special: bool
) -> None:
    """Raise UserError if a text that must be encoded as plain text gave control tokens."""
    control = special_ids(tokenizer)
    added = sum(token in control for token in tokenizer("", add_special_tokens=special)["input_ids"])
    for text, ids in zip(texts, encoded, strict=True):
        if sum(token in control for token in ids) > added:
            raise UserError(
                f"data.special_tokens: literal: the tokenizer {tokenizer.name_or_path} reads a control token in "
                f"{text[:60]!r} anyway; rephrase the row, or set data.special_tokens=parse"
            )


def cut_text(item: Draft, text_ids: list[int], prompt_ids: list[int]) -> tuple[list[int], Mask]:
    """Ids and response mask of a text or a pair, by the number of tokens that the prompt has alone."""
    cut = 0 if item.prompt is None else len(prompt_ids)
    if item.context is not None:
        text_ids = text_ids if text_ids[:1] == [item.context] else [item.context, *text_ids]
        cut = 1
    return text_ids, np.arange(len(text_ids)) >= cut


def encode_chats(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], Mask]]:
    """(ids, response mask) of rendered conversations."""
    if not drafts:
        return
    texts = ["" if item.literal else item.text for item in drafts]
    if not tokenizer.is_fast:
        for item, ids in zip(drafts, encode_texts(texts, tokenizer, False), strict=True):
            if item.literal:
                raise UserError(literal_remedy(item, tokenizer))
            yield ids, mask_from_prefixes(item, len(ids), tokenizer)
        return
    normalises = reads_normalised(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for item, ids, offsets in zip(drafts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if item.literal:
            found = encode_with_literals(item.text, item.literal, tokenizer)
            if found is None:
                raise UserError(literal_remedy(item, tokenizer))
            ids, offsets = found  # noqa: PLW2901
        elif normalises and has_surplus(ids, item.text, (), tokenizer):
            raise UserError(
                f"{item.location}: the tokenizer's normaliser turns its text into a control token; rephrase the row"
            )
        yield ids, mask_from_offsets(item.text, item.spans or (), offsets)


def conversation_ids(fmt: ChatFormat, messages: Messages, tools: Any = None, *, ask: bool, location: str) -> list[int]:
    """[T] token ids of a conversation; its contents are text, as in training.

    Args:
        fmt: the tokenizer's format.
        messages: with string contents.
        tools: as in a row.
        ask: whether it goes on to where the model answers next.
        location: named in messages.

    Raises:
        LostPartError: the template leaves out a part of it.
        UserError: the tokenizer cannot encode its text as text.
        UnrenderableError: the template refuses it.
    """
    ((ids, _),) = encode_chats([unanswered_draft(fmt, messages, tools, location, ask)], fmt.tokenizer)
    return ids


def literal_remedy(item: Draft, tokenizer: PreTrainedTokenizerBase) -> str:
    """The message for a tokenizer that cannot encode a special token's text as text."""
    spelt = ", ".join(f"`{token}`" for token in dict.fromkeys(item.text[start:end] for start, end in item.literal))
    return (
        f"{item.location}: its text contains {spelt}, which the tokenizer {tokenizer.name_or_path} can only encode as "
        "a control token; rephrase the row"
    )


def mask_from_offsets(text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> Mask:
    """[T] which tokens are in a span, by the rule of `encode_record`.

    Args:
        text: what was encoded.
        spans: [start, end) in characters.
        offsets: [start, end) in characters of each token, in order.
    """
    edges = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = edges[:, 0].copy(), edges[:, 1]
    # Byte-level tokenizers trim spaces off their offsets: a token of spaces shrinks to nothing behind them. It begins
    # where the token before it ends. (What they trim off a word does not matter: its first other character decides.)
    before = np.concatenate([[0], ends[:-1]])
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    mask = np.zeros(len(edges), np.bool_)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    for edge in {edge for span in spans for edge in span}:
        for token in np.flatnonzero((starts < edge) & (ends > edge)):
            piece = text[starts[token] : ends[token]]
            first = int(starts[token]) + len(piece) - len(piece.lstrip())
            if piece.strip():
                mask[token] = any(start <= first < end for start, end in spans)
    return mask


def mask_from_prefixes(item: Draft, length: int, tokenizer: PreTrainedTokenizerBase) -> Mask:
    """[T] which tokens are in a span, by the number of tokens before its two ends (for tokenizers without offsets)."""
    mask = np.zeros(length, np.bool_)
    for start, end in item.spans or ():
        first, last = (len(ids) for ids in encode_texts([item.text[:start], item.text[:end]], tokenizer, False))
        mask[first:last] = True
    return mask


def finish(item: Draft, ids: list[int], mask: Mask, eos_token_id: int | None, max_length: int) -> Encoded | Dropped:
    """Append EOS, truncate, and drop the row if no response token is left."""
    if item.append_eos and eos_token_id is not None and ids[-1:] != [eos_token_id]:
        ids, mask = [*ids, eos_token_id], np.append(mask, True)
    had_response = bool(mask[1:].any())
    truncated = len(ids) > max_length
    ids, mask = ids[:max_length], mask[:max_length].copy()
    mask[:1] = False
    if not mask.any():
        return Dropped(PROMPT_TOO_LONG if had_response else NO_RESPONSE)
    return Encoded(ids, mask, truncated, item.notes, item.unread, item.spans is not None)


def marked_text(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A row for people: consecutive (text, is_response) segments that together are the decoded row, special tokens too.

    A character whose bytes fall into two segments is shown in the later one.
    """
    edges = [t for t in range(1, len(row.input_ids)) if row.response_mask[t] != row.response_mask[t - 1]]
    segments = []
    shown = 0
    for begin, end in itertools.pairwise([0, *edges, len(row.input_ids)]):
        text = tokenizer.decode(row.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        upto = len(text) if end == len(row.input_ids) else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        segments.append((text[shown:upto], row.response_mask[begin]))
        shown = max(shown, upto)
    return segments
