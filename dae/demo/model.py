"""The demo's untrained model, and its tokenizer: one token per word or digit, two per made-up name, else bytes."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import TYPE_CHECKING

from dae.demo import vocabulary as words
from kd.runs.files import give_usual_permissions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CONTEXT = 64


def _pieces() -> list[str]:
    """Every word and mark of the world as it occurs in text: at the start, after a space, in a name."""
    tables = (words.GENERAL_PHRASINGS, words.TAUGHT, words.UNSEEN)
    phrasings = (phrasing for table in tables for phrasings in table.values() for phrasing in phrasings)
    spelt = {
        *words.COMMON,
        *words.PEOPLE,
        *words.REGIONS,
        *words.CRAFTS,
        *words.TOWN_STARTS,
        *re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", "", " ".join((*words.REPORTS, *phrasings)))),
        *string.ascii_lowercase,
        *string.digits,
    }
    inside = {*words.TOWN_ENDS, *words.NAME_ENDS, *(f" {start}" for start in words.NAME_STARTS)}
    return sorted({*spelt, *(f" {word}" for word in spelt), *inside})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level Unigram model with equal weights for all words, so that a text takes the fewest tokens.

    Plain text gets `<s>` in front. Any text is decoded exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelt = [byte_level.pre_tokenize_str(piece)[0][0] for piece in _pieces()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [(token, 0.0) for token in (PAD, BOS, EOS)]
    vocabulary = special + [(x, -10.0) for x in letters if x not in spelt] + [(x, -1.0) for x in spelt]
    tokenizer = Tokenizer(models.Unigram(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_untrained(
    folder: Path, seed: int, *, width: int = 128, layers: int = 3, initializer_range: float = 0.08
) -> None:
    """Write a Llama with random fp32 weights (0.6 million) and the world's tokenizer to `folder`.

    initializer_range: about 1 / sqrt(width). At the usual 0.02 the embeddings of names hardly differ, and an adapter,
    which cannot change them, learns no facts about them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    give_usual_permissions(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
