"""Rows that were valid in release 0.1.0 encode to the same token ids and masks: the golden file is older than the code.

`python tests/kd/test_golden_rows.py` writes the file anew; only a deliberate change of what a row is may do that.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from chat_tokenizers import KINDS, MARKERS, NO_END, SPACE_IN_HEADER, TRIMS, real_template, with_template
from transformers import AutoTokenizer, LlamaTokenizer

from kd.config.data_recipe import DataRecipe
from kd.data.drafts import Dropped
from kd.data.examples import encode_record

GOLDEN = Path(__file__).parents[1] / "golden" / "rows.json"
SHARED = Path(__file__).resolve().parents[3] / "shared"


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, REPLY = message("user", "What is it?"), message("assistant", "A red cup.")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, REPLY]},
    "system": {"messages": [message("system", "Be brief."), USER, REPLY]},
    "spaces": {"messages": [message("user", " \n hello  "), message("assistant", "\n\n  yes,\tno \n")]},
    "other scripts": {"messages": [message("user", "naïve 🙂 日本語?"), message("assistant", "价格 €99 — ок 🙂")]},
    "markers as text": {"messages": [message("user", "a [/INST] b"), message("assistant", "### hi <b>x</b> [INST]")]},
    "four turns": {"messages": [USER, REPLY, message("user", "Then?"), message("assistant", "Nothing.\n\nReally.")]},
    "no last reply": {"messages": [USER, REPLY, message("user", "Sure?")]},
    "chat pair": {"prompt": [USER, REPLY, message("user", "And?")], "completion": [message("assistant", "No.")]},
    "long": {"messages": [message("user", "word " * 40), message("assistant", "reply " * 60)]},
}
STRINGS: dict[str, dict[str, Any]] = {
    "pair": {"prompt": "Question: red?\nAnswer:", "completion": " yes, a cup."},
    "pair, space at the edge": {"prompt": "Answer: ", "completion": "yes"},
    "pair without a prompt": {"prompt": "", "completion": "Yes."},
    "pair with control tokens": {"prompt": "<s>[INST] hi [/INST]", "completion": " yes</s>"},
    "text": {"text": "hello world, naïve 🙂"},
    "text with control tokens": {"text": "<s>one</s>two</s>"},
}
OWN_TEMPLATES = {"trims": TRIMS, "no end": NO_END, "space in header": SPACE_IN_HEADER}


def digest(row: Any) -> str:
    """Tokens, response tokens, and the start of a SHA-256 over ids and mask; for a dropped row, why."""
    if isinstance(row, Dropped):
        return row.reason
    ids, mask = row.input_ids, [int(flag) for flag in row.response_mask]
    return f"{len(ids)} {sum(mask)} {hashlib.sha256(json.dumps([ids, mask]).encode()).hexdigest()[:16]}"


def encoded(records: dict[str, dict[str, Any]], tokenizer: Any) -> dict[str, str]:
    """Each record's digest, with a row limit that cuts the long one."""
    settings = DataRecipe(max_length=200)
    return {name: digest(encode_record(record, tokenizer, settings, name)) for name, record in records.items()}


def own_rows() -> dict[str, Any]:
    found: dict[str, Any] = {f"{kind}, strings": encoded(STRINGS, KINDS[kind]) for kind in KINDS}
    for kind in KINDS:
        for name, template in OWN_TEMPLATES.items():
            found[f"{kind}, {name}"] = encoded(CONVERSATIONS, with_template(KINDS[kind], template))
    return found


def shared_rows(shared: Path) -> dict[str, Any]:
    """All templates, each under our tokenizers and two real ones."""
    real = {
        "mistral": LlamaTokenizer.from_pretrained(shared / "tokenizers" / "mistral-v1", add_bos_token=True),
        "stories": AutoTokenizer.from_pretrained(shared / "models" / "stories260k"),
    }
    found: dict[str, Any] = {f"{kind}, strings": encoded(STRINGS, tokenizer) for kind, tokenizer in real.items()}
    for tokenizer in real.values():
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    for name in sorted(path.stem for path in (shared / "templates").glob("*.jinja")):
        for kind in ("byte-level", "metaspace"):
            found[f"{kind}, {name}"] = encoded(CONVERSATIONS, with_template(KINDS[kind], real_template(shared, name)))
        for kind, tokenizer in real.items():
            tokenizer.chat_template = real_template(shared, name)
            found[f"{kind}, {name}"] = encoded(CONVERSATIONS, tokenizer)
    return found


def golden() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return stored


def test_rows_under_own_templates_are_those_of_the_first_release():
    assert own_rows() == golden()["own"]


def test_rows_under_templates_of_known_models_are_those_of_the_first_release(shared):
    found, wanted = shared_rows(shared), golden()["shared"]
    assert len(wanted) == 18 * 4 + 2
    assert found == wanted


if __name__ == "__main__":
    pytest.importorskip("torch")
    GOLDEN.write_text(json.dumps({"own": own_rows(), "shared": shared_rows(SHARED)}, indent=1) + "\n", encoding="utf-8")
