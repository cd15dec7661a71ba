"""The untrained student's loss on responses, with and without the prompt: nats per response token.

Shape legend: B rows, T positions, N response tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dae.rank_teachers.responses import Response
from dae.rank_teachers.rewards import right_padded
from kd.config.data_recipe import DataRecipe
from kd.data.drafts import Draft, Dropped, draft
from kd.data.examples import encode_drafts
from kd.data.token_rows import TokenRow
from kd.errors import UserError
from kd.losses.token_loss import TokenLoss, token_loss_sums
from kd.models.checkpoint import Checkpoint
from kd.models.compatibility import check_adapter
from kd.models.forward import final_hidden_states, head_of, learned_positions
from kd.models.roles import (
    Backbone,
    LoadSettings,
    Role,
    activate,
    add_frozen_adapter,
    check_head,
    load_model,
    vocabulary_rows,
)


def open_student(source: Checkpoint, settings: LoadSettings) -> Role:
    """The student, frozen, in eval mode: a checkpoint, or an adapter on its base. Raises UserError."""
    base, name = source.base, None
    if base is not None:
        check_adapter("student", source, base, settings.trust_remote_code)
    backbone = Backbone(base or source, load_model(base or source, settings))
    if base is not None:
        name = add_frozen_adapter(backbone, source)
    role = Role("student", backbone.model, name)
    check_head(role, vocabulary_rows([role]))
    return role


def encode_responses(
    responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase, max_length: int, student: Checkpoint
) -> tuple[list[TokenRow], int]:
    """Rows as the student would be trained on them, and how many were truncated to `max_length`.

    Raises:
        UserError: a row has no response token, or messages meet a tokenizer without a chat template.
    """
    settings, drafts = DataRecipe(max_length=max_length), []
    if not tokenizer.chat_template and (chat := [each for each in responses if not isinstance(each.prompt, str)]):
        raise UserError(
            f"{chat[0].location}: a conversation, but the student {student} has no chat template; "
            "set chat_template to `plain` or to a .jinja file"
        )
    for response in responses:
        drafted = draft(response.record, tokenizer, settings, response.location)
        drafts.append(drafted if isinstance(drafted, Draft) else refuse(response, drafted, max_length))
    rows, cut = [], 0
    for response, encoded in zip(responses, encode_drafts(drafts, tokenizer, max_length), strict=True):
        if isinstance(encoded, Dropped):
            refuse(response, encoded, max_length)
        else:
            rows.append(TokenRow(encoded.input_ids, encoded.response_mask.tolist()))
            cut += encoded.truncated
    return rows, cut


def refuse(response: Response, dropped: Dropped, max_length: int) -> Draft:
    """Raise UserError: candidates are paired by prompt, so no row may be dropped."""
    raise UserError(
        f"{response.location}: {dropped.reason}; raise max_length ({max_length}), or remove this prompt from every "
        "candidate's file"
    )


def without_prompt(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """The response tokens after BOS alone (or EOS, without BOS). Raises UserError if there is neither."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("student: its tokenizer has neither BOS nor EOS; one is required for losses without the prompt")
    response = [token for token, wanted in zip(row.input_ids, row.response_mask, strict=True) if wanted]
    return TokenRow([int(start), *response], [False, *[True] * len(response)])


def losses_of(
    role: Role, rows: Sequence[TokenRow], batch_size: int, tick: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Mean of -log p(token) over the response tokens of each row, in nats; batches change it by rounding only.

    tick: called with the number of rows of each finished batch.

    Raises:
        UserError: a row has a token or a position that the model lacks.
    """
    refuse_unfit(role, rows)
    losses = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        input_ids_BT, attention_mask_BT = right_padded([rows[index].input_ids for index in chosen], 0)
        inputs = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}
        inputs = {name: tensor.to(role.model.device) for name, tensor in inputs.items()}
        with activate(role) as model, torch.no_grad():
            hidden_BTD, head = final_hidden_states(model, inputs), head_of(model)
            for place, index in enumerate(chosen):
                mask_T = torch.tensor(rows[index].response_mask[1:], device=hidden_BTD.device)
                hidden_ND = hidden_BTD[place, : len(mask_T)][mask_T]
                labels_N = inputs["input_ids"][place, 1 : len(mask_T) + 1][mask_T]
                sums = token_loss_sums(hidden_ND, head, labels_N, TokenLoss(weight=0.0))
                losses[index] = float(sums.ntp) / len(labels_N)
        tick(len(chosen))
    return losses


def refuse_unfit(role: Role, rows: Sequence[TokenRow]) -> None:
    largest, known = max(max(row.input_ids) for row in rows), vocabulary_rows([role])
    if largest >= known:
        raise UserError(
            f"student: its tokenizer has token {largest}, but the model only {known}; use the model's own tokenizer"
        )
    positions, longest = learned_positions(role.model), max(len(row.input_ids) for row in rows)
    if positions is not None and longest > positions:
        raise UserError(
            f"student: a row has {longest} tokens, but the model only {positions} positions; set max_length={positions}"
        )
