"""Text that spells a special token, such as `<s>12</s>` for a struck-through price: in a message it is text.

Control tokens come from the chat template alone. So before a conversation is rendered, each special token that its own
strings spell gets a mark in front (one character of Unicode's private use area), which the template carries along. In
the rendered text what is marked is literal, and what is not was written by the template. Marks at both ends of each
string show tokens that content and template form together, such as `<` + key + `>`: these are literal, too.

    render(marked messages)  ->  text with marks  ->  text, and the [start, end) that are literal  ->  token ids
"""

from __future__ import annotations

import bisect
import functools
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.data.messages import REASONING, strings_of
from kd.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = tuple(chr(code) for code in range(0xE000, 0xE010))
# Keys by which templates find their way: they carry no marks.
_STRUCTURE = frozenset(
    ("role", "content", "tool_calls", "function", "name", "arguments", "type", "id", "tool_call_id", "parameters",
     "description", "properties", "required", "input_schema", *REASONING)
)  # fmt: skip
_STAND_INS = (0xF0000, 0x100000)  # first characters of the two supplementary private use planes


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that this tokenizer reads as control tokens, the longest first."""
    return _control(tokenizer, len(tokenizer)).texts


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what `special_texts` has, the longest where several begin at one place."""
    return _control(tokenizer, len(tokenizer)).pattern


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return _control(tokenizer, len(tokenizer)).ids


@dataclass(frozen=True)
class _Control:
    """A tokenizer's control tokens: their texts, a pattern that matches these, their ids."""

    texts: tuple[str, ...]
    pattern: re.Pattern[str]
    ids: frozenset[int]


@functools.lru_cache(maxsize=16)
def _control(tokenizer: PreTrainedTokenizerBase, _size: int) -> _Control:
    """_size: of the vocabulary, so that tokens which are added later are not missed."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = tuple(sorted(found - {""}, key=lambda text: (-len(text), text)))
    ids: Any = tokenizer.convert_tokens_to_ids(list(texts))
    return _Control(texts, re.compile("|".join(map(re.escape, texts)) or r"(?!)"), frozenset(ids))


def spelled(texts: Iterator[str] | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens that these texts spell, each once."""
    pattern = special_pattern(tokenizer)
    return tuple(dict.fromkeys(token for text in texts for token in pattern.findall(text)))


def spelled_in_order(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every special token that a text spells, as often as it does."""
    return tuple(special_pattern(tokenizer).findall(text))


@dataclass(frozen=True)
class Marks:
    """Two characters that no string of a row has: one before tokens that it spells, one at both ends of its strings."""

    token: str
    edge: str


def marks_for(value: Any) -> Marks:
    """Characters that none of a value's strings has. Raises UserError where there are none."""
    used = set().union(*map(set, strings_of(value)))
    free = [mark for mark in _MARKS if mark not in used]
    if len(free) < 2:
        raise UserError(
            f"uses all of {_MARKS[0]!a} to {_MARKS[-1]!a}, private use characters; remove some from the row"
        )
    return Marks(*free[:2])


def marked(value: Any, tokens: Sequence[str], marks: Marks, edges: bool) -> Any:
    """A JSON value whose strings have a mark before each of these tokens and, with `edges`, at both of their ends.

    `role` and `type` stay as they are. White space at the ends stays outside of the marks, for templates that trim.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def string(text: str) -> str:
        text = pattern.sub(lambda match: marks.token + match[0], text)
        core = text.strip()
        return text.replace(core, f"{marks.edge}{core}{marks.edge}", 1) if edges and core else text

    def of(part: Any) -> Any:
        if isinstance(part, str):
            return string(part)
        if isinstance(part, Mapping):
            return {
                (key if key in _STRUCTURE else string(key)): inner if key in ("role", "type") else of(inner)
                for key, inner in part.items()
            }
        return [of(inner) for inner in part] if isinstance(part, (list, tuple)) else part

    return of(value)


@dataclass(frozen=True)
class Unmarked:
    """Text without its marks.

    text: the text; literal: [start, end) of the special tokens in it that the template did not write; places: where
    each character of the marked text went.
    """

    text: str
    literal: tuple[Span, ...]
    places: tuple[int, ...]


def unmarked(text: str, marks: Marks, tokenizer: PreTrainedTokenizerBase) -> Unmarked:
    """Takes the marks out of a rendered text. What is a special token only without them, the template did not write."""
    pattern = special_pattern(tokenizer)
    kept: list[str] = []
    places: list[int] = []
    for character in text:
        places.append(len(kept))
        if character not in (marks.token, marks.edge):
            kept.append(character)
    places.append(len(kept))
    clear = "".join(kept)
    written = {
        (places[match.start()], places[match.end()])
        for match in pattern.finditer(text)
        if text[match.start() - 1 : match.start()] != marks.token
    }
    literal = tuple(match.span() for match in pattern.finditer(clear) if match.span() not in written)
    return Unmarked(clear, literal, tuple(places))


def reads_normalised(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer looks for special tokens in text that its normaliser has changed."""
    normaliser = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    tokens = tokenizer.added_tokens_decoder.values()
    return normaliser is not None and any(token.special and token.normalized for token in tokens)


def has_surplus(ids: Sequence[int], text: str, literal: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids hold more control tokens than a text spells, where it is not literal (unknown tokens left aside)."""
    control = special_ids(tokenizer) - {tokenizer.unk_token_id}
    known = set(literal)
    spelt = sum(match.span() not in known for match in special_pattern(tokenizer).finditer(text))
    return sum(token in control for token in ids) > spelt


def encode_with_literals(
    text: str, literal: Sequence[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]] | None:
    """Ids and [start, end) offsets of a text in which some special tokens are text.

    The rest is encoded as the tokenizer itself does it: the others become control tokens, and what lies between is cut
    as before. None where this tokenizer cannot do it: it is no fast one, or has the token as an ordinary piece.
    """
    if not tokenizer.is_fast:
        return None
    first = next((first for first in _STAND_INS if not _uses(text, first)), _STAND_INS[0])
    twin = _twin(tokenizer, len(tokenizer), first)
    begins = dict(literal)
    written: list[str] = []
    place = 0
    pattern = special_pattern(tokenizer)
    while place < len(text):
        if place in begins:
            written.append(text[place : begins[place]])
            place = begins[place]
        elif match := pattern.match(text, place):
            written.append(twin.stand_ins.get(match[0], match[0]))
            place = match.end()
        else:
            written.append(text[place])
            place += 1
    encoded = twin.tokenizer.encode("".join(written), add_special_tokens=False)
    ids = [twin.ids.get(token, token) for token in encoded.ids]
    specials = special_ids(tokenizer)
    if any(token in specials and touches(literal, *span) for token, span in zip(ids, encoded.offsets, strict=True)):
        return None
    return ids, list(encoded.offsets)


def touches(spans: Sequence[Span], begin: int, end: int) -> bool:
    """Whether [begin, end) overlaps one of these spans, which are in order and apart from each other."""
    last = bisect.bisect_left(spans, end, key=operator.itemgetter(0)) - 1  # the last that starts before `end`
    return last >= 0 and spans[last][1] > begin


def _uses(text: str, first: int) -> bool:
    return any(first <= ord(character) < first + 0xFFFE for character in text)


@dataclass(frozen=True)
class _Twin:
    """A tokenizer whose special tokens have other texts: stand-ins of the same length, so that offsets stay true.

    ids: of its added tokens, where they differ -> those of the original.
    """

    tokenizer: Tokenizer
    stand_ins: Mapping[str, str]
    ids: Mapping[int, int]


@functools.lru_cache(maxsize=8)
def _twin(tokenizer: PreTrainedTokenizerBase, _size: int, first: int) -> _Twin:
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in content["added_tokens"]}
    texts = enumerate(text for text in special_texts(tokenizer) if text in added)
    stand_ins = {text: chr(first + place) * len(text) for place, text in texts}
    original = {}
    for token in content["added_tokens"]:
        name = stand_ins.get(token["content"], token["content"])
        original[name] = token["id"]
        if name != token["content"]:
            token |= {"content": name, "normalized": False}
    content["padding"] = content["truncation"] = None
    twin = Tokenizer.from_str(json.dumps(content))
    ids = {made: wanted for name, wanted in original.items() if (made := twin.token_to_id(name)) is not None}
    return _Twin(twin, stand_ins, {made: wanted for made, wanted in ids.items() if made != wanted})
