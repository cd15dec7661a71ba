"""The fingerprint of a tokenizer: it changes with every file that decides ids or templates, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from pico import make_tokenizer

from kd.models.tokenizer_files import tokenizer_files, tokenizer_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_templates_are_part_of_it(folder: Path) -> None:
    assert tokenizer_files(folder) == [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "spiece.model"),
        *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    ],
)
def test_each_file_that_decides_something_changes_it(folder: Path, name: str) -> None:
    before = tokenizer_sha256(folder)
    (folder / name).write_text("something else", encoding="utf-8")
    assert tokenizer_sha256(folder) != before


def test_other_files_do_not(folder: Path) -> None:
    before = tokenizer_sha256(folder)
    for name in ("config.json", "README.md", "model.safetensors", "generation_config.json"):
        (folder / name).write_text("something else", encoding="utf-8")
    assert tokenizer_sha256(folder) == before


def test_a_copy_elsewhere_has_the_same(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = folder.rename(tmp_path_factory.mktemp("elsewhere") / "copy")
    before = tokenizer_sha256(copy)
    assert tokenizer_sha256(copy.rename(copy.with_name("again"))) == before
