"""The demo's untrained model: a small Llama with random weights, with the world's tokenizer."""

from __future__ import annotations

from pathlib import Path


def save_untrained(
    folder: Path, seed: int, *, width: int = 128, layers: int = 3, initializer_range: float = 0.08
) -> None:
    """Write a Llama with random fp32 weights (0.6 million) and the world's tokenizer to `folder`.

    initializer_range: about 1 / sqrt(width). At the usual 0.02 the embeddings of names hardly differ, and an adapter,
    which cannot change them, learns no facts about them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dae.demo.tokenizer import CONTEXT, build_tokenizer

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
