"""Text that spells a special token, such as `<s>12</s>` for a struck-through price: in a message it is text.

Control tokens come from the chat template alone. So before a conversation is rendered, each special token that its own
strings spell gets a mark in front (one character of Unicode's private use area), which the template carries along. In
the rendered text what is marked is literal, and what is not was written by the template.

    render(marked messages)  ->  text with marks  ->  text, and the [start, end) that are literal  ->  token ids
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.messages import strings_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = tuple(chr(code) for code in range(0xE000, 0xE010))
_STAND_INS = (0xF0000, 0x100000)  # first characters of the two supplementary private use planes


@functools.lru_cache(maxsize=8)
def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that this tokenizer reads as control tokens, the longest first."""
    found = {str(token) for token in tokenizer.all_special_tokens}
    found |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(found - {""}, key=lambda text: (-len(text), text)))


@functools.lru_cache(maxsize=8)
def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what `special_texts` has, the longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of what `special_texts` has."""
    return frozenset(int(tokenizer.convert_tokens_to_ids(text)) for text in special_texts(tokenizer))  # type: ignore[arg-type]


def spelled(texts: Iterator[str] | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens that these texts spell, each once."""
    pattern = special_pattern(tokenizer)
    return tuple(dict.fromkeys(token for text in texts for token in pattern.findall(text)))


def mark_for(value: Any) -> str:
    """A character that none of a value's strings has."""
    used = set().union(*map(set, strings_of(value)))
    free = next((mark for mark in _MARKS if mark not in used), None)
    if free is None:
        raise UserError(f"uses all of {_MARKS[0]!a} to {_MARKS[-1]!a}, private use characters; remove one from the row")
    return free


def marked(value: Any, tokens: Sequence[str], mark: str) -> Any:
    """A JSON value whose strings have the mark before each of these tokens; `role` stays as it is."""
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def of(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub(lambda match: mark + match[0], part)
        if isinstance(part, Mapping):
            return {of(key): inner if key == "role" else of(inner) for key, inner in part.items()}
        return [of(inner) for inner in part] if isinstance(part, (list, tuple)) else part

    return of(value)


@dataclass(frozen=True)
class Unmarked:
    """Text without its marks.

    text: the text; literal: [start, end) of what was marked; places: where each character of the marked text went.
    """

    text: str
    literal: tuple[Span, ...]
    places: tuple[int, ...]


def unmarked(text: str, mark: str, tokenizer: PreTrainedTokenizerBase) -> Unmarked:
    """Takes the marks out of a rendered text. A mark whose token the template took away marks nothing."""
    pattern = special_pattern(tokenizer)
    kept: list[str] = []
    literal: list[Span] = []
    places: list[int] = []
    length = 0
    for place, character in enumerate(text):
        places.append(length)
        if character != mark:
            kept.append(character)
            length += 1
        elif match := pattern.match(text, place + 1):
            literal.append((length, length + len(match[0])))
    places.append(length)
    return Unmarked("".join(kept), tuple(literal), tuple(places))


def encode_with_literals(
    text: str, literal: Sequence[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]] | None:
    """Ids and [start, end) offsets of a text in which some special tokens are text.

    The rest is encoded as the tokenizer itself does it: the others become control tokens, and what lies between is cut
    as before. None where this tokenizer cannot do it: it is no fast one, or has the token as an ordinary piece.
    """
    if not tokenizer.is_fast:
        return None
    twin = _twin(tokenizer, next((first for first in _STAND_INS if not _uses(text, first)), _STAND_INS[0]))
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
    inside = [any(start < end_of and begin < end for start, end in literal) for begin, end_of in encoded.offsets]
    if any(token in specials for token, within in zip(ids, inside, strict=True) if within):
        return None
    return ids, list(encoded.offsets)


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
def _twin(tokenizer: PreTrainedTokenizerBase, first: int) -> _Twin:
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
