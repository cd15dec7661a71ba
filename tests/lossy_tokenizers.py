"""Tokenizers that transformers 5 opens by a class that drops characters in silence."""

from __future__ import annotations

import json
from pathlib import Path

from pico import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TRAINED_ON = ["Fish and chips cost nine coins.", "question: how big is it? answer: two cups."] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def bpe() -> Tokenizer:
    """sentencepiece style without bytes: what is not in the vocabulary is `<unk>`."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(TRAINED_ON, trainer)
    return core


def unigram() -> Tokenizer:
    """The same with the other model of sentencepiece."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(TRAINED_ON, trainer)
    return core


def write_tokenizer(folder: Path, core: Tokenizer, tokenizer_class: str | None, model_type: str = "llama") -> Path:
    """tokenizer.json as it is, and a tokenizer_config.json that names the class."""
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES, **named}))
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def make_lossy_checkpoint(folder: Path, tokenizer_class: str = "LlamaTokenizer", template: str | None = None) -> Path:
    """A whole checkpoint whose tokenizer drops every `&`, unless opened as tokenizer.json is."""
    make_model("llama").save_pretrained(folder)
    write_tokenizer(folder, bpe(), tokenizer_class)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
