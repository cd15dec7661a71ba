"""Tables of positions: every model that has one says how long a row may be, whatever its table is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from kd.models.forward import learned_positions

LIMIT = 24
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "d_model": 16, "n_embd": 16, "intermediate_size": 32, "ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_hidden_layers": 1, "n_layer": 1, "decoder_layers": 1, "num_attention_heads": 2,
    "n_head": 2, "decoder_attention_heads": 2, "attention_heads": 2, "num_heads": 2, "word_embed_proj_dim": 16,
    "attention_types": [[["global"], 1]], "num_layers": 1, "n_layers": 1, "n_heads": 2, "rotary_dim": 4,
    "max_position_embeddings": LIMIT, "n_positions": LIMIT, "max_seq_len": LIMIT, "is_decoder": True,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "gpt2": LIMIT, "gpt_neo": LIMIT, "gpt_bigcode": LIMIT, "openai-gpt": LIMIT, "opt": LIMIT, "biogpt": LIMIT,
    "bart": LIMIT, "mbart": LIMIT, "blenderbot": LIMIT, "bert": LIMIT, "roberta": LIMIT - 2, "gptj": LIMIT,
    "ctrl": LIMIT, "mpt": LIMIT,
}  # fmt: skip


def make(family: str) -> Any:
    known = AutoConfig.for_model(family).to_dict()
    settings = {key: value for key, value in SMALL.items() if key in known}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def runs(model: Any, tokens: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, tokens), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row_is_the_one_that_runs(family: str) -> None:
    model = make(family)
    assert learned_positions(model) == FAMILIES[family]
    assert runs(model, FAMILIES[family])
    assert not runs(model, FAMILIES[family] + 1)


@pytest.mark.parametrize("family", ["xglm"])
def test_a_table_that_grows_is_no_limit(family: str) -> None:
    model = make(family)
    assert learned_positions(model) is None
    assert runs(model, LIMIT + 8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_computed_positions_are_no_limit(family: str) -> None:
    assert learned_positions(make_model(family, max_position_embeddings=288)) is None  # as many as the vocabulary
