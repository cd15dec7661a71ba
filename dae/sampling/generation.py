"""Continuations sampled from a model's full distribution, as text that its tokenizer encodes to the same ids.

Shape legend: B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kd.data.batches import left_padded
from kd.data.chat import chat_format
from kd.data.special_text import special_ids
from kd.errors import UserError
from kd.models.adapters import put_adapter
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import TOKENIZER_FILES
from kd.models.compatibility import check_adapter
from kd.models.roles import STUDENT_ADAPTER, LoadSettings, load_model, refuse_bad_weights

END_TOKEN, SPECIAL_TOKEN, LENGTH = "end token", "other special token", "length"


@dataclass(frozen=True)
class Continuation:
    """What the model wrote.

    tokens: number of new tokens, including the one that stopped it; stop: what stopped it; text, or the fault if there
    is none; ids: those of the text; end: the end token, if that stopped it.

    Trailing white space and incomplete characters of a truncated text are removed.
    """

    tokens: int
    stop: str
    text: str | None = None
    fault: str | None = None
    ids: tuple[int, ...] = ()
    end: int | None = None


@dataclass(frozen=True)
class Writer:
    """A model to sample from.

    end_ids: tokens that end a text or turn; special_ids: all tokens that are not text, including `end_ids`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    special_ids: frozenset[int]
    context: int | None

    def continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[Continuation]:
        """One continuation per prompt (token ids), sampled in one batch that depends on `seed` alone.

        The context caps `max_new_tokens` by the longest prompt of the batch; a prompt that fills it gets a fault.
        """
        room = [self._room(prompt) for prompt in prompts]
        fitting = [prompt for prompt, left in zip(prompts, room, strict=True) if left > 0]
        length = min([max_new_tokens, *(left for left in room if left > 0)])
        written = iter(self._generate(fitting, length, temperature, seed) if fitting else [])
        return [
            self._as_text(prompt, next(written))
            if left > 0
            else Continuation(0, LENGTH, fault="no room in the context")
            for prompt, left in zip(prompts, room, strict=True)
        ]

    def _room(self, prompt: Sequence[int]) -> int:
        return 1 << 30 if self.context is None else self.context - len(prompt)

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """New token ids per prompt, up to and including the first special token."""
        input_ids_BT, attention_mask_BT = left_padded(prompts)
        device = self.model.device
        # Every setting that truncates the distribution is explicit: transformers' defaults differ (top_k is 50).
        config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.special_ids),
            pad_token_id=min(self.special_ids),
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            output_BT = self.model.generate(
                input_ids=input_ids_BT.to(device),
                attention_mask=attention_mask_BT.to(device),
                generation_config=config,
            )
        return [self._up_to_special(row) for row in output_BT[:, input_ids_BT.shape[1] :].tolist()]

    def _up_to_special(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.special_ids), len(ids) - 1)
        return ids[: end + 1]

    def _as_text(self, prompt: Sequence[int], written: Sequence[int]) -> Continuation:
        stopped = written[-1] in self.special_ids
        end = written[-1] if written[-1] in self.end_ids else None
        stop = END_TOKEN if end is not None else SPECIAL_TOKEN if stopped else LENGTH
        ids = list(written[:-1] if stopped else written)
        text = self._text_after(prompt, ids)
        while end is None and ids and text != text.rstrip().rstrip("\ufffd"):
            ids.pop()
            text = self._text_after(prompt, ids)
        fault = self._fault(text)
        if fault:
            return Continuation(len(written), stop, fault=fault)
        return Continuation(len(written), stop, text=text, ids=tuple(ids), end=end)

    def _text_after(self, prompt: Sequence[int], ids: list[int]) -> str:
        """The continuation decoded after its prompt: decoders treat the beginning of a text differently."""
        before = self._decode([token for token in prompt if token not in self.special_ids])
        whole = self._decode([token for token in [*prompt, *ids] if token not in self.special_ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _fault(self, text: str) -> str | None:
        """Why a text cannot become a row."""
        if not text.strip():
            return "no text"
        if "\ufffd" in text:
            return "not UTF-8"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if any(token in self.special_ids for token in ids):
            return "spells a special token"
        return None if self._decode(ids).strip() == text.strip() else "does not survive the tokenizer"


def derived_seed(*parts: int) -> int:
    """A different seed for each sequence of numbers, such as (seed, batch): 0 <= seed < 2^63."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def open_writer(source: Checkpoint, trust_remote_code: bool) -> Writer:
    """Open a checkpoint, or an adapter on its base, with its tokenizer: bfloat16 on a GPU, else float32.

    Raises:
        UserError: model or tokenizer cannot be opened, the adapter does not fit its base, or the tokenizer has no end
            token.
    """
    torch.set_flush_denormal(True)  # denormal numbers slow some CPUs down several times
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    settings = LoadSettings(dtype, None, trust_remote_code, "cuda" if on_gpu else "cpu")
    tokenizer = open_tokenizer(source, trust_remote_code)
    model = open_model(source, settings)
    ends = model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if tokenizer.chat_template:
        end_ids |= {
            tokenizer.convert_tokens_to_ids(end)
            for end in chat_format(tokenizer, tokenizer.get_chat_template()).end_tokens
        }
    if not end_ids:
        raise UserError(
            f"{source}: has no end token in its tokenizer or generation_config.json; set eos_token in "
            "tokenizer_config.json"
        )
    control_ids = {*end_ids, *special_ids(tokenizer)}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Its own settings (top_p, repetition_penalty, ...) would apply wherever a call sets none.
    model.generation_config = GenerationConfig()
    return Writer(model, tokenizer, frozenset(end_ids), frozenset(control_ids), context)


def open_tokenizer(source: Checkpoint, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, else its base's. Raises UserError if neither can be opened."""
    home = source.tokenizer_home
    if not home.has_tokenizer:
        where = "" if home is source else f", nor in its base {home}"
        files = ", ".join(TOKENIZER_FILES)
        raise UserError(f"{source}: tokenizer not found{where}: expected one of {files}; copy it next to the weights")
    return home.tokenizer(trust_remote_code)


def open_model(source: Checkpoint, settings: LoadSettings) -> Any:
    """A checkpoint, or an adapter on its base, in eval mode. Raises UserError if it is incomplete."""
    base = source.base
    if base is None:
        return load_model(source, settings)
    check_adapter("model", source, base, settings.trust_remote_code)
    model = put_adapter(load_model(base, settings), source, STUDENT_ADAPTER).eval()
    refuse_bad_weights(model, source, STUDENT_ADAPTER)
    return model
