"""A checkpoint as a chat model in this process, for answers and as a judge.

Shape legend: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from dae_eval.judging.asking import LENGTH, NO_ROOM, Reply, Request
from dae_eval.judging.endpoints import NO_SYSTEM, without_system
from dae_eval.models import Model, load_settings, own_chat_template, warn_of_losses
from kd.data.batches import left_padded
from kd.data.chat import PLAIN_TEMPLATE, ChatFormat, UnrenderableError, chat_format
from kd.data.chat_fitting import LostPartError
from kd.data.examples import conversation_ids
from kd.errors import UserError
from kd.models.roles import Backbone, add_frozen_adapter, load_model


class DrawPerRow(LogitsProcessor):
    """Turns greedy decoding into sampling with a temperature and a seed for each row.

    argmax(z / T - log E), with E exponential, is a draw from softmax(z / T) (Gumbel-max). So a row's text depends on
    its own seed and not on its batch. Temperature 0 leaves the row greedy.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int], device: torch.device) -> None:
        self._temperatures = temperatures
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits -> [B, V] scores whose argmax is the next token."""
        scores_BV = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature > 0:
                wait_V = torch.empty_like(scores_BV[row]).exponential_(generator=generator)
                scores_BV[row] = scores_BV[row] / temperature - wait_V.log()
        return scores_BV


@dataclass(frozen=True)
class LocalChat:
    """A checkpoint that answers conversations (a `dae_eval.judging.asking.ChatModel`).

    end_ids: tokens that end an answer. context: the model's positions, None if unknown.
    """

    name: str
    model: Any
    fmt: ChatFormat
    end_ids: tuple[int, ...]
    context: int | None
    batch_size: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.fmt.tokenizer

    def replies(self, requests: Sequence[Request], wanted: Collection[str]) -> Iterator[tuple[str, Reply]]:
        """Yield (key, reply), batch by batch. A conversation that fills the context gets an empty reply (`NO_ROOM`).

        Batches are made of all requests, so that they are the same if only some replies are wanted.

        Raises:
            UserError: the chat template rejects a conversation.
        """
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            if any(request.key in wanted for request in batch):
                answered = self._answer(batch)
                yield from ((r.key, reply) for r, reply in zip(batch, answered, strict=True) if r.key in wanted)

    def _answer(self, batch: Sequence[Request]) -> list[Reply]:
        asked = [self.encode(request) for request in batch]
        prompts = [ids for ids, _ in asked]
        rooms = [room_behind(self.context, prompt) for prompt in prompts]
        replies: dict[int, Reply] = {row: Reply("", NO_ROOM) for row, room in enumerate(rooms) if room <= 0}
        # A row with less room than its limit is generated alone, so that it does not truncate the others.
        whole = [row for row, request in enumerate(batch) if rooms[row] >= request.max_tokens]
        groups = [whole] if whole else []
        groups += [[row] for row in range(len(batch)) if row not in whole and rooms[row] > 0]
        for group in groups:
            limit = min(max(batch[row].max_tokens for row in group), *(rooms[row] for row in group))
            written = self._generate([prompts[row] for row in group], [batch[row] for row in group], limit)
            replies |= dict(zip(group, written, strict=True))
        return [replace(replies[row], how=how) for row, (_, how) in enumerate(asked)]

    def encode(self, request: Request) -> tuple[list[int], str]:
        """The token ids of the conversation and of the answer's header, and how it is asked. Raises UserError."""
        messages = [dict(message) for message in request.messages]
        try:
            return self._ids(messages), ""
        except (UnrenderableError, LostPartError) as refusal:
            try:
                return self._ids(without_system(messages)), NO_SYSTEM
            except (UnrenderableError, LostPartError):
                raise UserError(
                    f"{self.name}: the chat template rejects a conversation of {len(messages)} messages: {refusal}; "
                    "give another with --chat-template"
                ) from refusal

    def _ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids up to the answer; control tokens inside messages are encoded as text, as in training."""
        try:
            return conversation_ids(self.fmt, messages, ask=True, location=self.name)
        except LostPartError:
            raise
        except UserError:
            # This tokenizer cannot encode a control token's text as text, and a judge's prompt cannot be changed.
            text = self.fmt.render(messages, ask=True)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _generate(self, prompts: Sequence[list[int]], requests: Sequence[Request], limit: int) -> list[Reply]:
        input_ids_BT, attention_mask_BT = left_padded(prompts)
        device = self.model.device
        draw = DrawPerRow([r.temperature for r in requests], [r.seed for r in requests], device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=limit, eos_token_id=list(self.end_ids), pad_token_id=self.end_ids[0]
        )
        with torch.inference_mode():
            output_BT = self.model.generate(
                input_ids=input_ids_BT.to(device),
                attention_mask=attention_mask_BT.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
        written = output_BT[:, input_ids_BT.shape[1] :].tolist()
        return [self._read(row[: request.max_tokens]) for row, request in zip(written, requests, strict=True)]

    def _read(self, ids: list[int]) -> Reply:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        # A truncated text may end within a character.
        return Reply(text.strip(), "stop") if end is not None else Reply(text.rstrip("\ufffd").strip(), LENGTH)


def room_behind(context: int | None, prompt: Sequence[int]) -> int:
    """The number of tokens that fit after a prompt."""
    return 1 << 30 if context is None else context - len(prompt)


def read_chat_format(model: Model, given: str | None) -> ChatFormat:
    """A model's chat format: `given` (`plain` or a .jinja file), else its tokenizer's own template.

    Raises:
        UserError: there is no tokenizer or no template, or the file cannot be read.
    """
    tokenizer = model.tokenizer_home.tokenizer()
    if given is not None:
        return chat_format(tokenizer, _read_template(given))
    if not tokenizer.chat_template:
        raise UserError(
            f"{model.path}: the tokenizer has no chat template; give one with --chat-template FILE.jinja, or `plain` "
            "for User: ... Assistant: ... (a judge must have its own)"
        )
    return chat_format(tokenizer, own_chat_template(model, tokenizer))


def _read_template(given: str) -> str:
    if given == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {given}: cannot be read ({error}); give `plain` or a .jinja file") from error


def template_sha256(fmt: ChatFormat) -> str:
    return hashlib.sha256(fmt.template.encode()).hexdigest()


def open_local_chat(model: Model, template: str | None, batch_size: int) -> LocalChat:
    """Open a checkpoint, or an adapter on its base: bfloat16 on a GPU, else float32.

    Raises:
        UserError: it cannot be opened, or has no chat template or end token.
    """
    torch.set_flush_denormal(True)  # denormal numbers slow some CPUs several times over
    fmt = read_chat_format(model, template)
    warn_of_losses(model, fmt.tokenizer)
    backbone = Backbone(model.backbone, load_model(model.backbone, load_settings()))
    if model.base is not None:
        add_frozen_adapter(backbone, model.source)
    loaded: Any = backbone.model
    ends = loaded.generation_config.eos_token_id
    end_ids = {fmt.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    end_ids |= {fmt.tokenizer.convert_tokens_to_ids(end) for end in fmt.end_tokens}
    known = tuple(sorted(end for end in end_ids if end is not None))
    if not known:
        raise UserError(
            f"{model.path}: no end token in the tokenizer or generation_config.json, so answers would not end; set "
            "eos_token in tokenizer_config.json"
        )
    # The model's own settings (top_p, repetition_penalty, ...) would apply where a call sets nothing.
    loaded.generation_config = GenerationConfig()
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    return LocalChat(model.path, loaded, fmt, known, context, batch_size)
