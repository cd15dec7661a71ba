"""The files that make up a tokenizer and its chat templates, and their fingerprint."""

from __future__ import annotations

from pathlib import Path

from kd.runs.files import files_sha256, joint_sha256

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja",
)  # fmt: skip
# sentencepiece and tiktoken files have names of their own; more templates stand in a folder of their own.
_PATTERNS = ("*.model", "*.tiktoken", "additional_chat_templates/*.jinja")


def tokenizer_files(folder: Path) -> list[str]:
    """Names, below `folder`, of the files that decide how text becomes ids and messages become text; sorted."""
    found = {name for name in _NAMES if (folder / name).is_file()}
    for pattern in _PATTERNS:
        found |= {place.relative_to(folder).as_posix() for place in folder.glob(pattern) if place.is_file()}
    return sorted(found)


def tokenizer_sha256(folder: Path) -> str:
    """Joint SHA-256 over names and contents of `tokenizer_files`.

    folder: a Checkpoint's (for an adapter without a tokenizer, its base's).
    """
    return joint_sha256(files_sha256(folder, tokenizer_files(folder)))
