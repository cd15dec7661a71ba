"""Files of rows, rows, and chat templates."""

from __future__ import annotations

import functools
import gzip
from typing import Any

from chat_tokenizers import (
    DROPS_REASONING,
    KEEPS,
    KINDS,
    OPENS_REASONING,
    REFUSES_SYSTEM,
    TOOLS_AS_OBJECT,
    TOOLS_AS_TEXT,
    TOOLS_BY_PART,
    with_template,
)
from fuzzing.mutations import Choose, json_document, json_lines, mutated_bytes, one_of, text_document
from fuzzing.targets import Target, written

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import PLAIN_TEMPLATE
from kd.data.drafts import Dropped
from kd.data.examples import encode_record
from kd.data.records import parse_line, read_records
from kd.data.token_rows import TokenRow
from kd.errors import UserError

CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": [1, None, {"b": "</s>"}]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
ASK, ANSWER = {"role": "user", "content": "a <s>b</s>?"}, {"role": "assistant", "content": "yes"}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, ASK, {**ANSWER, "weight": 0}, ASK, ANSWER], "id": 3},
    {"messages": [ASK, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ANSWER], "tools": [TOOL]},
    {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "finish_reason": "length"},
    {"prompt": [ASK], "completion": [{**ANSWER, "reasoning_content": "hm"}], "system": "s", "tools": "[]"},
    {"prompt": "a ", "completion": "b</s>"},
    {"prompt": "a", "response": "b"},
    {"text": "<s>a</s>"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": [TOOL]},
]
MARKS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
GROWS = "{% set ns = namespace(s='ab') %}{% for m in messages %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
RECURS = "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}{{ [1, 2]|join(', ') }}"
WIDE = "{{ 'x'|center(80) }}{{ '%5d' % 3 }}{{ 'a' * 9 }}{{ [messages]|tojson(indent=2) }}{{ messages|length ** 3 }}"
TEMPLATES = [
    KEEPS, PLAIN_TEMPLATE, TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_BY_PART, DROPS_REASONING, OPENS_REASONING,
    REFUSES_SYSTEM, MARKS, GROWS, RECURS, WIDE,
]  # fmt: skip
ENDINGS = ("jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz", "parquet")
FILES = [
    b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n', b'[{"prompt": "a", "completion": "b"}]',
    b'prompt,completion\n"a","b ""c"""\n', b"prompt\tcompletion\na\tb\n",
]  # fmt: skip


@functools.cache
def _tokenizers() -> list[Any]:
    return [with_template(KINDS[kind], template) for kind in ("byte-level", "metaspace") for template in TEMPLATES]


def _file(choose: Choose) -> bytes:
    ending = choose(len(ENDINGS))
    content = json_lines(ROWS, choose) if choose(3) else mutated_bytes(one_of(FILES, choose), choose)
    return bytes([ending]) + (gzip.compress(content) if ENDINGS[ending].endswith("gz") and choose(4) else content)


def _read_file(content: bytes) -> None:
    path = written(f"rows.{ENDINGS[content[0] % len(ENDINGS)] if content else 'jsonl'}", content[1:])
    for _ in read_records(SourceRecipe(path=str(path))):
        pass


def _row(choose: Choose) -> bytes:
    return bytes([choose(2 * len(TEMPLATES)), choose(4)]) + json_document(ROWS, choose)


def _read_row(content: bytes) -> None:
    which, how = (*content[:2], 0, 0)[:2]
    recipe = DataRecipe(
        max_length=300,
        special_tokens="literal" if how & 1 else "parse",
        empty_responses="keep" if how & 2 else "drop",
    )
    row = parse_line(content[2:], "rows.jsonl:7")
    found = encode_record(row, _tokenizers()[which % len(_tokenizers())], recipe, "rows.jsonl:7")
    if isinstance(found, Dropped):
        assert found.reason
        return
    assert isinstance(found, TokenRow)
    assert len(found.input_ids) == len(found.response_mask) <= 300
    assert any(found.response_mask) and not found.response_mask[0]


def _template(choose: Choose) -> bytes:
    return bytes([choose(4)]) + text_document(TEMPLATES, choose)


def _read_template(content: bytes) -> None:
    try:
        template = content[1:].decode()
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8") from error  # refused where it is read
    if not template:
        return
    tokenizer = with_template(KINDS["byte-level"], template)
    encode_record(ROWS[content[0] % 4], tokenizer, DataRecipe(max_length=300), "rows.jsonl:7")


TARGETS = [
    Target("files of rows", _file, _read_file),
    Target("rows", _row, _read_row),
    Target("templates", _template, _read_template),
]
