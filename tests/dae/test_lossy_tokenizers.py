"""A tokenizer that drops characters of the rows: told by `dae check` and a run's first lines, refused above a part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lossy_tokenizers import bpe, write_tokenizer
from pico import make_model
from processes import dae

WORDS = ("--base", "base", "--data", "rows.jsonl", "--output", "expert", "train.max_steps=2", "lora.rank=2")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A base whose tokenizer_config.json names a class that drops every `&`."""
    folder = tmp_path / "world"
    folder.mkdir()
    write_tokenizer(folder / "base", bpe(), "LlamaTokenizer")
    make_model().save_pretrained(folder / "base")
    return folder


def write_rows(folder: Path, lossy: int, rows: int) -> None:
    pairs = [
        {"prompt": "how big is it?", "completion": " two & a cup" if number < lossy else " two cups"}
        for number in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_a_tokenizer_that_drops_characters_of_many_rows_is_refused(world: Path) -> None:
    write_rows(world, lossy=20, rows=40)
    for command in (("check", "sft"), ("sft",)):
        refused = dae([*command, *WORDS], world, proof=False)
        assert refused.status == 2
        assert "base: its tokenizer, opened as LlamaTokenizer, drops characters in silence in 20 of 40" in refused.err
        assert '"tokenizer_class": "TokenizersBackend"' in refused.err
        assert "data.allow_lossy_tokenizer=true" in refused.err
        assert not (world / "expert").exists()
    allowed = dae(["sft", *WORDS, "data.allow_lossy_tokenizer=true"], world, proof=False)
    assert allowed.status == 0
    assert "drops characters in silence in 20 of 40 texts looked at (50.0 %): & (20)" in allowed.err


def test_few_such_rows_are_told(world: Path) -> None:
    write_rows(world, lossy=1, rows=120)
    looked = dae(["check", "sft", *WORDS], world, proof=False)
    assert looked.status == 0
    assert "warning: base: its tokenizer, opened as LlamaTokenizer, drops characters in silence in 1 of 120" in (
        looked.out.replace("\n", " ")
    )
    assert "in 1 of 120 texts looked at" in dae(["sft", *WORDS], world, proof=False).err
