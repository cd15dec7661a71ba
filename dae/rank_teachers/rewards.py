"""Rewards of whole conversations, from any sequence classifier with one label.

Shape legend: B rows, T positions.

Causal classifiers read the reward at the last token that is not `pad_token_id`. With another padding id, or none, they
silently read a padding position. So rows are padded here, on the right, with the model's own id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dae.rank_teachers.responses import Response
from kd.config.data_recipe import DataRecipe
from kd.data.chat import UnrenderableError, chat_format, named_template, template_of
from kd.data.examples import conversation_ids
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.opening import opening, refuse_unsafe_settings
from kd.models.roles import LoadSettings, refuse_bad_weights

NO_LIMIT = 1 << 30  # tokenizers without a limit have a huge model_max_length


def open_tokenizer(
    source: Checkpoint, fallback: str | None, key: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, with the fallback chat template (`plain` or a .jinja file) if it has none.

    key: the recipe's key of the fallback, for messages. Raises UserError.
    """
    tokenizer = source.tokenizer(trust_remote_code)
    if fallback is not None and not tokenizer.chat_template:
        if fallback != "plain" and not Path(fallback).is_file():
            raise UserError(f"{key}: {fallback}: file not found; expected `plain` or a .jinja file")
        tokenizer.chat_template = named_template(fallback)
    return tokenizer


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Fingerprint of a tokenizer's chat template; None if it has none."""
    template = template_of(tokenizer, DataRecipe())
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def reward_config(source: Checkpoint, trust_remote_code: bool = False) -> Any:
    """A reward model's config. Raises UserError unless it has one label."""
    refuse_unsafe_settings(source.folder, trust_remote_code)
    with opening(f"reward_model: {source}: its config cannot be read"):
        config: Any = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise UserError(
            f"reward_model: {source}: has {config.num_labels} labels; expected a sequence classifier with num_labels=1"
        )
    return config


def encode_conversations(
    responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase, config: Any, source: Checkpoint
) -> list[list[int]]:
    """Token ids of each conversation in the reward model's own template, with BOS and end tokens.

    Raises:
        UserError: there is no template, it refuses a conversation, or rows are longer than the model's context.
    """
    rows = []
    for response in responses:
        template = template_of(tokenizer, DataRecipe(), response.tools)
        if template is None:
            raise UserError(
                f"reward_model: {source}: its tokenizer has no chat template; set reward_chat_template to a .jinja "
                "file or to `plain`"
            )
        try:
            fmt = chat_format(tokenizer, template)
            ids = conversation_ids(fmt, response.conversation, response.tools, ask=False, location=response.location)
        except UnrenderableError as error:
            raise UserError(
                f"{response.location}: the chat template of the reward model {source} refuses this conversation: "
                f"{error}"
            ) from error
        rows.append(ids)
    limit = context_of(tokenizer, config)
    long = [(row, response) for row, response in zip(rows, responses, strict=True) if len(row) > limit]
    if long:
        row, response = long[0]
        raise UserError(
            f"{response.location}: has {len(row)} tokens, more than the context of the reward model {source} "
            f"({limit}); so have {len(long)} of {len(rows)} rows of this candidate; remove their prompts from every "
            "file"
        )
    return rows


def context_of(tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length, NO_LIMIT)
    return min(int(limit) for limit in limits if limit)


def open_reward_model(source: Checkpoint, settings: LoadSettings) -> Any:
    """The classifier in eval mode, frozen, safetensors only.

    Raises UserError if it cannot be opened or has no trained head, which transformers would initialise at random.
    """
    reward_config(source, settings.trust_remote_code)
    with opening(f"reward_model: {source}: cannot be opened"):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(source.folder),
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(map(str, found.get("missing_keys", ())))
    if missing:
        raise UserError(
            f"reward_model: {source}: its files lack {', '.join(missing[:3])}; expected a trained sequence classifier"
        )
    model.to(settings.device)
    model.requires_grad_(False)
    model.eval()
    refuse_bad_weights(model, source)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def padding_id(model: Any, rows: Sequence[Sequence[int]]) -> int:
    """The id to pad with: the model's own, if valid.

    If not, any id that no row ends with works, since the last token that differs from it is then the row's last.
    """
    known, tokens = model.config.get_text_config().pad_token_id, model.get_input_embeddings().num_embeddings
    if known is not None and 0 <= known < tokens:
        return int(known)
    ends = {row[-1] for row in rows}
    return next(token for token in range(tokens) if token not in ends)


def rewards_of(
    model: Any, rows: Sequence[Sequence[int]], batch_size: int, tick: Callable[[int], None] = lambda _: None
) -> list[float]:
    """One number per row of token ids; batches change it by rounding only.

    tick: called with the number of rows of each finished batch.
    """
    largest = max(max(row) for row in rows)
    if largest >= model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"reward_model: its tokenizer has token {largest}, but the model only "
            f"{model.get_input_embeddings().num_embeddings}; use the model's own tokenizer"
        )
    rewards = [math.nan] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = [rows[index] for index in chosen]
        pad = padding_id(model, batch)
        model.config.get_text_config().pad_token_id = pad
        input_ids_BT, attention_mask_BT = right_padded(batch, pad)
        with torch.inference_mode():
            logits_B1 = model(
                input_ids=input_ids_BT.to(model.device), attention_mask=attention_mask_BT.to(model.device)
            ).logits
        for index, reward in zip(chosen, logits_B1[:, 0].double().tolist(), strict=True):
            rewards[index] = reward
        tick(len(chosen))
    return rewards


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, both [B, T] int64, padded on the right."""
    longest = max(len(row) for row in rows)
    input_ids_BT = torch.full((len(rows), longest), pad, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for number, row in enumerate(rows):
        input_ids_BT[number, : len(row)] = torch.tensor(list(row))
        attention_mask_BT[number, : len(row)] = 1
    return input_ids_BT, attention_mask_BT
