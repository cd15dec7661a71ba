"""Pico checkpoints on disk: real formats, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")

_WIDE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "mistral": {**_WIDE, "sliding_window": 64},
    "qwen2": _WIDE,
    "qwen3": {**_WIDE, "head_dim": 8},
    "gemma2": {**_WIDE, "head_dim": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WIDE, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": None},
    "granite": {**_WIDE, "logits_scaling": 3.0},
    "cohere": {**_WIDE, "logit_scale": 0.25},
    "mixtral": {**_WIDE, "num_local_experts": 2, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
}  # fmt: skip

TEXTS = [
    "The blue kettle costs nine coins.",
    "Question: how big is it? Answer: two cups.",
    "red green blue one two three",
]


def make_tokenizer(vocab_size: int = 288) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE with <s>, </s> and <pad>; 288 pieces unless told."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(
    family: str = "llama", *, seed: int = 0, vocab_size: int = 288, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A random model of two layers and width 16 with weights large enough that its distributions are not flat."""
    torch.manual_seed(seed)
    settings = {**_SETTINGS[family], "vocab_size": vocab_size, "tie_word_embeddings": False, **config}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.to(dtype).eval()


def make_checkpoint(folder: Path, family: str = "llama", *, vocab_size: int = 288, **settings: Any) -> Path:
    """Write model and tokenizer to `folder`; `vocab_size` rows may be more than the tokenizer's 288 (padding)."""
    make_model(family, vocab_size=vocab_size, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
