"""Rows of any shape: each gives a row, is dropped with a reason, or is refused as the user's mistake; nothing else.

`DAE_FUZZ=20 pytest tests/kd/test_fuzz_rows.py` tries twenty times as many.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from typing import Any

import pytest
from chat_tokenizers import (
    DROPS_REASONING,
    KEEPS,
    KINDS,
    OPENS_REASONING,
    TOOLS_AS_OBJECT,
    TOOLS_AS_TEXT,
    TOOLS_BY_PART,
    with_template,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import PLAIN_TEMPLATE
from kd.data.drafts import Dropped
from kd.data.examples import encode_record, load_rows
from kd.data.token_rows import TokenRow
from kd.errors import UserError

EXAMPLES = 400 * int(os.environ.get("DAE_FUZZ", "1"))
TEMPLATES = [
    KEEPS, PLAIN_TEMPLATE, TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_BY_PART, DROPS_REASONING, OPENS_REASONING,
    "{{ messages[0].tool_calls[0].function.name }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | trim | tojson }}{{ m.name.first }}{% endfor %}",
]  # fmt: skip
TOKENIZERS = [with_template(KINDS[kind], template) for kind in ("byte-level", "metaspace") for template in TEMPLATES]

CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": [1, None, {"b": "</s>"}]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
ASK, ANSWER = {"role": "user", "content": "a <s>b</s>?"}, {"role": "assistant", "content": "yes"}
SEEDS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, ASK, {**ANSWER, "weight": 0}, ASK, ANSWER], "id": 3},
    {"messages": [ASK, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ANSWER], "tools": [TOOL]},
    {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "finish_reason": "length"},
    {
        "prompt": [ASK],
        "completion": [{**ANSWER, "reasoning_content": "hm"}],
        "system": "s",
        "tools": json.dumps([TOOL]),
    },
    {"prompt": "a ", "completion": "b</s>"},
    {"prompt": "a", "response": "b"},
    {"text": "<s>a</s>"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": [TOOL]},
]
ODD: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), "", " ", "x", "</s>", "<|im_end|>", "\ud83d", "\ue000", "\x00", "[]", "{}",
    '{"a": 1}', "[" * 50, [], [None], [[]], {}, {"": None}, {"role": "assistant"}, {"type": "image_url"}, 10**30,
    ["a", 1], "role", "assistant", "developer", "tool", "length",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, part in items for place in places(part, (*path, key))]


@st.composite
def mutated_rows(draw: Any) -> Any:
    """A row with up to three parts replaced, removed, doubled, renamed or moved."""
    row = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 3))):
        every = places(row)
        if not every:
            break
        *parents, last = draw(st.sampled_from(every))
        owner = row
        for key in parents:
            owner = owner[key]
        how = draw(st.sampled_from(["replace", "remove", "wrap", "rename", "double", "swap"]))
        if how == "replace":
            owner[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "remove":
            del owner[last]
        elif how == "wrap":
            owner[last] = [owner[last]]
        elif how == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["content", "role", "weight", "train", "tools", "prompt", "text", "odd"]))] = (
                owner.pop(last)
            )
        elif how == "double" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        else:
            owner[last] = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    return row


def outcome(row: Any, tokenizer: Any, recipe: DataRecipe) -> tuple[Any, str | None]:
    """What became of a row, or why it was refused."""
    try:
        return encode_record(row, tokenizer, recipe, "rows.jsonl:7"), None
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("special_tokens", ["parse", "literal"])
def test_any_row_is_encoded_dropped_or_refused(special_tokens):
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(mutated_rows(), st.integers(0, len(TOKENIZERS) - 1), st.sampled_from(["drop", "keep"]))
    def encode(row, which, empty):
        recipe = DataRecipe(max_length=300, special_tokens=special_tokens, empty_responses=empty)
        found, words = outcome(row, TOKENIZERS[which], recipe)
        if words is not None:
            assert words.startswith(("rows.jsonl:7", "data.special_tokens", "the tokenizer"))
            seen["refused"] += 1
            return
        if isinstance(found, Dropped):
            assert found.reason
            seen["dropped"] += 1
            return
        assert isinstance(found, TokenRow)
        assert len(found.input_ids) == len(found.response_mask) <= 300
        assert any(found.response_mask)
        assert not found.response_mask[0]
        seen["encoded"] += 1

    encode()
    print(dict(seen))  # noqa: T201 - the counts of a long run
    assert min(seen["encoded"], seen["refused"]) > EXAMPLES // 10


ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz")


@settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.sampled_from(ENDINGS), st.data())
def test_any_bytes_are_read_or_refused(tmp_path_factory, noise, ending, data):
    sound = b'prompt,completion\n"a","b"\n'
    if "json" in ending:
        sound = b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n'
    cut = data.draw(st.integers(0, len(sound)))
    path = tmp_path_factory.mktemp("rows") / f"rows.{ending}"
    path.write_bytes(sound[:cut] + noise + sound[cut:])
    try:
        load_rows([SourceRecipe(path=str(path))], TOKENIZERS[0], DataRecipe())
        words = str(path)
    except UserError as error:
        words = str(error)
    assert str(path) in words
