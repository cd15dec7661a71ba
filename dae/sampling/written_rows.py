"""A continuation -> a row that encodes, as in training, to the ids that the model read and wrote.

A continuation without such a row is dropped, and the reason is counted. One reason are tokens that the tokenizer would
not choose (`hel` + `lo`): training would then use other ids than the model wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dae.sampling.generation import END_TOKEN, Continuation
from kd.config.data_recipe import DataRecipe
from kd.data.chat import ChatFormat, UnrenderableError
from kd.data.chat_markers import marks_responses
from kd.data.drafts import Dropped
from kd.data.examples import encode_record
from kd.errors import UserError

OTHER_TOKENS = "its text encodes to other tokens"
OTHER_END = "ended by another token than rows of this form"
NOT_RENDERED = "the chat template renders the answer otherwise"
REFUSED = "the answer makes no row"

Prompt = str | list[dict[str, Any]]
_WHOLE = DataRecipe(max_length=1 << 40)  # nothing is truncated
_PROBE = "replyprobe"


@dataclass(frozen=True)
class Batch:
    """One batch: its rows, why each stopped, their new tokens, and how many were dropped, by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, written: Continuation, row: Mapping[str, Any] | str) -> None:
        """Add a continuation's row, or count why it has none (a text)."""
        if isinstance(row, str):
            self.dropped[row] += 1
            return
        self.rows.append(dict(row))
        self.stops.append(written.stop)
        self.tokens.append(written.tokens)


@dataclass(frozen=True)
class RowMaker:
    """Builds rows from continuations. fmt: the tokenizer's chat format, if it has one."""

    tokenizer: Any
    fmt: ChatFormat | None

    def row(self, prompt: Prompt | None, prompt_ids: Sequence[int], written: Continuation) -> dict[str, Any] | str:
        """The row that encodes to the prompt's ids and those written; or, as text, why there is none.

        prompt: None if the model started from the one token in `prompt_ids`.
        """
        if written.fault is not None or written.text is None:
            return written.fault or REFUSED
        if prompt is None:
            return self._begun(prompt_ids, written)
        reasons = []
        for row in self._candidates(prompt, written.text):
            finished = written.stop == END_TOKEN
            reason = self._difference(row if finished else as_cut(row), prompt_ids, written)
            if reason is None:
                return row if finished else as_cut(row)
            reasons.append(reason)
        return next((reason for reason in (OTHER_END, NOT_RENDERED, OTHER_TOKENS) if reason in reasons), REFUSED)

    def _begun(self, prompt_ids: Sequence[int], written: Continuation) -> dict[str, Any] | str:
        """A row {"text"}: it has no end token, and a first token only if the tokenizer adds one."""
        row = {"text": written.text} if written.stop == END_TOKEN else as_cut({"text": written.text})
        encoded = encode_record(row, self.tokenizer, _WHOLE, "the row")
        if isinstance(encoded, Dropped):
            return REFUSED
        wanted = ([*prompt_ids, *written.ids], [*written.ids])
        return row if encoded.input_ids in wanted else OTHER_TOKENS

    def _candidates(self, prompt: Prompt, text: str) -> Iterator[dict[str, Any]]:
        """Rows that may fit, the best first: with the template's opening of the answer, then stripped, then as is."""
        if isinstance(prompt, str):
            yield {"prompt": prompt, "completion": text}
            return
        contents = [*(opening + text for opening in self._openings(prompt)), text.strip(), text]
        for content in dict.fromkeys(contents):
            yield {"messages": [*prompt, {"role": "assistant", "content": content}]}

    def _openings(self, prompt: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """What the template writes at the beginning of the model's answer, such as `<think>`.

        It is the part of a generation prompt after the header that a finished answer has, last or earlier in the chat.
        """
        assert self.fmt is not None
        reply = {"role": "assistant", "content": _PROBE}
        for messages in ([*prompt, reply], [*prompt, reply, {"role": "user", "content": "question"}]):
            try:
                asked, answered = self.fmt.render(prompt, ask=True), self.fmt.render(messages)
            except UnrenderableError:
                continue
            header = answered.partition(_PROBE)[0]
            parted = next((i for i, (a, b) in enumerate(zip(asked, header, strict=False)) if a != b), len(header))
            if opening := asked[parted:]:
                yield opening

    def _difference(self, row: Mapping[str, Any], prompt_ids: Sequence[int], written: Continuation) -> str | None:
        """Why a row does not encode to what was written; None if it does."""
        try:
            encoded = encode_record(dict(row), self.tokenizer, _WHOLE, "the row")
        except UserError:
            return REFUSED
        if isinstance(encoded, Dropped):
            return REFUSED
        end = [] if written.end is None else [written.end]
        wanted = [*prompt_ids, *written.ids, *end]
        ids, mask = encoded.input_ids, encoded.response_mask
        first = len(prompt_ids)
        while first < len(wanted) and is_space(self.tokenizer, wanted[first]) and mask[first : first + 1] == [False]:
            first += 1  # a space by itself belongs to the header
        # Text after the end token, such as a line break, has no loss, unless the template marks it.
        carries_loss = [first <= t < len(wanted) for t in range(len(ids))]
        marked = self.fmt is not None and marks_responses(self.fmt)
        if ids[: len(wanted)] == wanted and (marked or mask == carries_loss):
            return None
        length = len(prompt_ids) + len(written.ids)
        if ids[:length] == wanted[:length]:
            other = end and length < len(ids) and mask[length] and ids[length] != written.end
            return OTHER_END if other else NOT_RENDERED
        same_text = self._decode(ids).startswith(self._decode(wanted[:length]))
        return OTHER_TOKENS if same_text else NOT_RENDERED

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def is_space(tokenizer: Any, token: int) -> bool:
    return not str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).strip(" ")


def as_cut(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a truncated answer: it has no end token."""
    return {**row, "finish_reason": "length"}
