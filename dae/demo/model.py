"""The demo's starting point: a small Llama with random weights, and the world's tokenizer beside it."""

from __future__ import annotations

from pathlib import Path


def save_untrained(folder: Path, seed: int) -> None:
    """Write a Llama of 0.6 million random fp32 weights and the tokenizer of the embedded world to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dae.demo.tokenizer import CONTEXT, build_tokenizer

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        # About 1 / sqrt(width). At the usual 0.02 the names' embeddings hardly differ, and an adapter, for which they
        # are frozen, cannot learn facts about them.
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
