"""The demo world's tokenizer: one token per word, two per made-up name, one per digit; bytes for any other text."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from dae.demo import vocabulary as words

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
