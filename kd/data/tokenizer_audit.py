"""Does a tokenizer keep the text of the rows? Characters that vanish in silence are never learnt and never scored.

transformers 5 builds many a tokenizer anew: the class that tokenizer_config.json names (or that belongs to the model's
type) takes the vocabulary out of tokenizer.json and brings its own rules. Where those do not fit, characters are
dropped that tokenizer.json itself keeps, or makes `<unk>`.
"""

from __future__ import annotations

import json
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.data.special_text import special_pattern
from kd.errors import UserError
from kd.models.opening import opening

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TEXTS = 1000  # texts looked at, spread over all that are given
CHARACTERS = 2000  # of each text
MOST_LOSSY = 0.01  # part of the texts that may lose characters in silence
MOST_UNKNOWN = 0.1  # part of the texts that may have an unknown token: it at least says that something was there
AS_IS = "TokenizersBackend"  # the tokenizer_class that reads tokenizer.json as it is
SHOWN = 8
# What to look at where there are no texts: every mark, accents, another script, an emoji.
PROBES = (*(f"one {mark} two" for mark in string.punctuation), "naïve café, 42 €", "价格是多少？ 🙂")
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"

Counts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TokenizerAudit:
    """What a tokenizer did to a sample of texts.

    Attributes:
        tokenizer_class: the class that transformers opened it as.
        texts: how many were looked at.
        lossy: texts that lost a character without anything in its place.
        differing: texts that the checkpoint's own tokenizer.json cuts into other tokens (0 where there is none).
        lossy_as_is: texts that lose a character by tokenizer.json itself.
        with_unk: texts with a token for what the vocabulary lacks.
        changed: texts that the normaliser changed on purpose (lower case, NFKC, ...), white space left aside.
        lost: the characters that vanished, most frequent first, with their number.
        unknown: the characters under unknown tokens, in the same form.
        as_is_helps: whether tokenizer_class `AS_IS` would make transformers read tokenizer.json as it is.
    """

    tokenizer_class: str
    texts: int
    lossy: int = 0
    differing: int = 0
    lossy_as_is: int = 0
    with_unk: int = 0
    changed: int = 0
    lost: Counts = ()
    unknown: Counts = ()
    as_is_helps: bool = False

    def loss(self, path: str) -> str | None:
        """One line on lost or differing texts, with the remedy; None where the tokenizer keeps all of them."""
        if self.lossy:
            part = f"{self.lossy} of {self.texts} texts looked at ({100 * self.lossy / self.texts:.1f} %)"
            what = f"drops characters in silence in {part}: {shown(self.lost)}"
        elif self.differing:
            what = f"cuts {self.differing} of {self.texts} texts looked at into other tokens than {FILE} does"
        else:
            return None
        return f"{path}: its tokenizer, opened as {self.tokenizer_class}, {what}; {self.remedy}"

    def unknowns(self, path: str) -> str | None:
        """One line on characters that the vocabulary lacks; None where there are none."""
        if not self.with_unk:
            return None
        return (
            f"{path}: {self.with_unk} of {self.texts} texts looked at hold characters that the tokenizer's vocabulary "
            f"lacks and that become its unknown token: {shown(self.unknown)}"
        )

    def normalised(self, path: str) -> str | None:
        if not self.changed:
            return None
        return f"{path}: {self.changed} of {self.texts} texts looked at are changed by the tokenizer's normaliser"

    def lines(self, path: str) -> list[str]:
        """All that there is to say: losses with their remedy, unknown characters, what the normaliser changes."""
        return [line for line in (self.loss(path), self.unknowns(path), self.normalised(path)) if line is not None]

    @property
    def remedy(self) -> str:
        """What to do about losses and differences."""
        if not self.differing or self.lossy_as_is >= self.lossy > 0:
            return "its vocabulary has no tokens for them: replace them in the rows, or use another tokenizer"
        if self.as_is_helps:
            return f'set "tokenizer_class": "{AS_IS}" in its {CONFIG}, which reads {FILE} as it is'
        return (
            f"transformers opens this model's type as {self.tokenizer_class} whatever {CONFIG} says: give it a "
            "tokenizer of that kind"
        )


def audit(tokenizer: PreTrainedTokenizerBase, folder: str | Path, texts: Sequence[str]) -> TokenizerAudit:
    """Encode and decode a sample of texts, as transformers opened the tokenizer and as its tokenizer.json would.

    White space counts only where words run together; what a normaliser changes on purpose is no loss.

    Args:
        tokenizer: as AutoTokenizer opened it.
        folder: where its files lie.
        texts: plain text, such as the rows'. Special tokens that they spell are left out.
    """
    sample = [text for text in (without_special(tokenizer, text[:CHARACTERS]) for text in spread(texts)) if text]
    found = Findings()
    for text, ids, offsets in encoded(tokenizer, sample):
        found.add(text, kept(text, ids, offsets, tokenizer))
    file = Path(folder) / FILE
    differing = lossy_as_is = 0
    if file.is_file() and type(tokenizer).__name__ != AS_IS:
        with opening(f"{file}: cannot be read as a tokenizer"):
            differing, lossy_as_is = against_file(tokenizer, file, sample)
    return TokenizerAudit(
        type(tokenizer).__name__,
        len(sample),
        lossy=found.lossy,
        differing=differing,
        lossy_as_is=lossy_as_is,
        with_unk=found.with_unk,
        changed=found.changed,
        lost=tuple(found.lost.most_common()),
        unknown=tuple(found.unknown.most_common()),
        as_is_helps=bool(differing) and reads_file_as_is(Path(folder)),
    )


def refuse_lossy(found: TokenizerAudit, path: str, allowed: bool) -> None:
    """Raise UserError where too many texts lose characters, in silence or to the unknown token, unless allowed."""
    if allowed:
        return
    way = "To train on what is left of the text, set data.allow_lossy_tokenizer=true"
    if found.lossy > MOST_LOSSY * found.texts:
        raise UserError(f"{found.loss(path)}. {way}")
    if found.with_unk > MOST_UNKNOWN * found.texts:
        raise UserError(f"{found.unknowns(path)}; replace them in the rows, or use another tokenizer. {way}")


def spread(texts: Sequence[str]) -> Sequence[str]:
    """At most `TEXTS` of the texts, evenly over all of them (files may be sorted)."""
    return texts[:: max(1, -(-len(texts) // TEXTS))]


def shown(counts: Counts) -> str:
    words = ", ".join(f"{in_words(character)} ({count})" for character, count in counts[:SHOWN])
    return words if len(counts) <= SHOWN else f"{words} and {len(counts) - SHOWN} more"


def in_words(character: str) -> str:
    """A character as itself where it can be seen, else its code point."""
    if character == " ":
        return "space"
    return character if character.isprintable() else f"U+{ord(character):04X}"


class Findings:
    """Counts over texts."""

    def __init__(self) -> None:
        self.lossy = self.with_unk = self.changed = 0
        self.lost: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()

    def add(self, text: str, one: Kept) -> None:
        """Count one text."""
        self.lossy += bool(one.lost)
        self.with_unk += bool(one.has_unk)
        self.changed += one.changed
        self.lost += one.lost
        self.unknown += one.unknown


@dataclass(frozen=True)
class Kept:
    """What became of one text: characters lost, characters under unknown tokens, whether the normaliser changed it."""

    lost: Counter[str]
    unknown: Counter[str]
    has_unk: bool
    changed: bool


def kept(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None, tokenizer: Any) -> Kept:
    """Compare a text with what its ids decode to. offsets: [start, end) in characters of each token, where known."""
    unk = tokenizer.unk_token_id
    back = tokenizer.decode([i for i in ids if i != unk], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return compare(text, back, normalised(tokenizer, text), under_unknown(text, ids, offsets, unk))


def compare(text: str, back: str, normal: str, unknown: Counter[str] | None) -> Kept:
    """A text, what came back of it, and its normalised form.

    unknown: the characters under unknown tokens; None: not known which, so that all that is missing may be.
    """
    have = visible(back)
    missing, missing_normal = visible(text) - have, visible(normal) - have
    # Some normalisers spell the text anew (byte by byte), and decoding undoes it: the nearer form is the one to expect.
    expected, absent = (text, missing) if missing.total() <= missing_normal.total() else (normal, missing_normal)
    changed = bool(missing) and missing_normal.total() < missing.total()
    if unknown is None:
        return Kept(Counter(), absent, True, changed)
    lost = absent - unknown
    if not unknown and merged_words(expected, back, absent):
        lost[" "] += 1
    return Kept(lost, unknown, bool(unknown), changed)


def visible(text: str) -> Counter[str]:
    """Characters that are no white space (which sentencepiece writes as a lower block)."""
    return Counter(character for character in text if not character.isspace() and character != "▁")


def merged_words(text: str, back: str, absent: Counter[str]) -> bool:
    """Whether words of a text run together in what came back."""
    left = "".join(" " if character == "▁" else character for character in text if character not in absent)
    return len(back.replace("▁", " ").split()) < len(left.split())


def under_unknown(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None, unk: int | None
) -> Counter[str] | None:
    """The characters that unknown tokens stand for; None where there are such tokens, but no offsets."""
    if unk is None or unk not in ids:
        return Counter()
    if offsets is None:
        return None
    spans = [text[start:end] for token, (start, end) in zip(ids, offsets, strict=True) if token == unk]
    return visible("".join(spans))


def normalised(tokenizer: Any, text: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    return text if normalizer is None else str(normalizer.normalize_str(text))


def without_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without what spells a special token: rows may hold such, and each tokenizer treats it in its own way."""
    return special_pattern(tokenizer).sub(" ", text).strip()


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[tuple[str, list[int], list[tuple[int, int]] | None]]:
    """(text, ids, offsets) of each text; the offsets are None for tokenizers that give none."""
    if not texts:
        return
    found = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, padding=False, verbose=False
    )
    offsets = found["offset_mapping"] if tokenizer.is_fast else [None] * len(texts)
    yield from zip(texts, found["input_ids"], offsets, strict=True)


def against_file(tokenizer: PreTrainedTokenizerBase, file: Path, texts: Sequence[str]) -> tuple[int, int]:
    """How many texts tokenizer.json cuts into other tokens, and how many lose a character by it."""
    from tokenizers import Tokenizer

    as_is: Tokenizer = Tokenizer.from_file(str(file))
    as_is.no_truncation()
    as_is.no_padding()
    unk = as_is.token_to_id(str(tokenizer.unk_token)) if tokenizer.unk_token is not None else None
    differing = lossy = 0
    for (text, ids, _), theirs in zip(
        encoded(tokenizer, texts), as_is.encode_batch(list(texts), add_special_tokens=False), strict=True
    ):
        differing += ids != theirs.ids
        back = as_is.decode([i for i in theirs.ids if i != unk], skip_special_tokens=False)
        normal = text if as_is.normalizer is None else as_is.normalizer.normalize_str(text)
        lossy += bool(compare(text, back, normal, under_unknown(text, theirs.ids, theirs.offsets, unk)).lost)
    return differing, lossy


def reads_file_as_is(folder: Path) -> bool:
    """Whether transformers would read tokenizer.json as it is, were tokenizer_class `AS_IS`: tried on a copy.

    Some model types are opened by their own class whatever their files say.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for name in (FILE, "config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
        (copy / CONFIG).write_text(json.dumps({**written, "tokenizer_class": AS_IS}), encoding="utf-8")
        with suppress(UserError), opening(str(copy)):
            return type(AutoTokenizer.from_pretrained(str(copy))).__name__ == AS_IS
    return False
