"""A batch of rows: which positions predict response tokens, and which row and route each belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


def predicting_positions(batch: Batch) -> Tensor:
    """[B, T] bool -> [B, T - 1] bool: the positions whose next token is a response token."""
    return batch["response_mask"][:, 1:]


def response_token_counts(batch: Batch, routes: int) -> Tensor:
    """[R] int64: the response tokens of each route in the batch, exactly the positions that carry loss."""
    counts_N = route_of_tokens(batch)[predicting_positions(batch)]
    return torch.bincount(counts_N, minlength=routes)


def route_of_tokens(batch: Batch) -> Tensor:
    """[B, T - 1] int64: the route of each position's row. In a packed batch a row starts where position_ids is 0."""
    mask_BT = batch["response_mask"][:, 1:]
    if "position_ids" in batch:
        row_of_token_T = (batch["position_ids"][0] == 0).cumsum(0) - 1
        return batch["route_ids"][row_of_token_T][None, :-1]
    return batch["route_ids"][:, None].expand(mask_BT.shape)


def rows_of_routes(batch: Batch, routes: Sequence[int]) -> dict[str, Tensor]:
    """The rows of these routes as a batch of their own, cut to their own longest row (the whole batch as it is)."""
    wanted_B = torch.isin(batch["route_ids"], torch.tensor(routes, device=batch["route_ids"].device))
    if bool(wanted_B.all()):
        return dict(batch)
    if "position_ids" in batch:
        row_of_token_T = (batch["position_ids"][0] == 0).cumsum(0) - 1
        keep_T = wanted_B[row_of_token_T]
        chosen = {key: batch[key][:, keep_T] for key in ("input_ids", "position_ids", "response_mask")}
    else:
        longest = int(batch["attention_mask"][wanted_B].sum(1).max())
        chosen = {key: batch[key][wanted_B, :longest] for key in ("input_ids", "attention_mask", "response_mask")}
    return {**chosen, "route_ids": batch["route_ids"][wanted_B]}


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both [B, T] int64, with every prompt at the right end."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask_BT[row, longest - len(prompt) :] = 1
    return input_ids_BT, attention_mask_BT
