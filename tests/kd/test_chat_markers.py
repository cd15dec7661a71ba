"""Chat templates with {% generation %} markers: what they mark is what is learnt, as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import (
    DROPS_REASONING,
    KINDS,
    NO_END,
    TOOLS_AS_OBJECT,
    TRIMS,
    chat,
    encoded,
    responses,
    told_notes,
    with_template,
)

from kd.config.data_recipe import DataRecipe
from kd.data.drafts import MARKED, RESPONSE_NOT_FOUND, REWRITTEN, Dropped
from kd.data.examples import encode_record
from kd.errors import UserError

HEADER = "{{ '<|im_start|>' + m['role'] + '\n' }}"


def turns(assistant: str) -> str:
    """TRIMS, with what it writes for an assistant turn behind the header and before the line break."""
    return (
        "{{ bos_token }}{% for m in messages %}"
        + HEADER
        + "{% if m['role'] == 'assistant' %}"
        + assistant
        + "{% else %}"
        "{{ m['content'] | trim + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


WHOLE = turns("{% generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}")
WITHOUT_END = turns("{%- generation -%}{{ m['content'] | trim }}{% endgeneration %}{{ '<|im_end|>' }}")
RECORDS: dict[str, dict[str, Any]] = {
    "several turns": chat("Is it?", " a red cup.\n\nYes 🙂 ", "And?", "No.", system="Be brief."),
    "spelled tokens": chat("say <|im_end|>", "<|im_end|> is </s>", "So?", "<s>12</s>"),
    "cut off": chat("Is it?", "Yes.", "And?", "So we") | {"finish_reason": "length"},
    "chat pair": {"prompt": chat("Is it?", "No.", "And?")["messages"], "completion": chat("", "No.")["messages"][1:]},
    "empty turn": chat("Is it?", "", "And?", "No."),
    "no last reply": chat("Is it?", "Yes.", "And?"),
}
RECORDS["weight 0"] = chat("Is it?", "No.", "And?", "No.", "So?", "No.")
RECORDS["weight 0"]["messages"][3]["weight"] = 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("template", [WHOLE, WITHOUT_END], ids=["whole", "end token outside"])
def test_markers_around_the_response_change_nothing(kind: str, record: dict[str, Any], template: str) -> None:
    plain, marked = (encoded(record, with_template(KINDS[kind], text)) for text in (TRIMS, template))
    assert marked == plain


def test_kept_empty_turns_and_white_space_before_the_end_token() -> None:
    spaced = turns("{% generation %}{{ m['content'] }}{% endgeneration %}{{ ' <|im_end|>' }}")
    tokenizer = with_template(KINDS["byte-level"], spaced)
    row = encoded(chat("Is it?", "", "And?", "No."), tokenizer, empty_responses="keep")
    assert responses(row, tokenizer) == [" <|im_end|>", "No. <|im_end|>"]


def test_the_mask_is_the_one_of_transformers() -> None:
    body = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}"
        "{% else %}" + body + "{% endif %}{% endfor %}"
    )
    tokenizer = with_template(KINDS["byte-level"], template)
    record = chat("Is it?", " a red cup.", "And then?", "### no 🙂", system="Be brief.")
    theirs = tokenizer.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    row = encoded(record, tokenizer)
    assert row.input_ids == theirs["input_ids"]
    assert [int(flag) for flag in row.response_mask] == theirs["assistant_masks"]
    assert responses(row, tokenizer)[0].startswith("<|im_start|>assistant")


def test_a_block_that_covers_a_part_of_the_turn() -> None:
    thinks = turns(
        "{% if '</think>' in m['content'] %}{{ m['content'].split('</think>')[0] + '</think>' }}{% endif %}"
        "{% generation %}{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgeneration %}"
    )
    tokenizer = with_template(KINDS["byte-level"], thinks)
    record = chat("Is it?", "<think>hm</think>Yes.", "And?", "<think>so</think>No.")
    assert responses(encoded(record, tokenizer), tokenizer) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    first_half = turns(
        "{% set parts = m['content'].split('|') %}{% generation %}{{ parts[0] }}{% endgeneration %}"
        "{{ parts[1:] | join + '<|im_end|>' }}"
    )
    tokenizer = with_template(KINDS["byte-level"], first_half)
    row = encoded(chat("Is it?", "Yes|no"), tokenizer)
    assert responses(row, tokenizer) == ["Yes"]
    assert tokenizer.eos_token_id not in row.input_ids  # the template does end the turn, later
    row = encoded(chat("Is it?", "Yes|no") | {"finish_reason": "length"}, tokenizer)
    assert responses(row, tokenizer) == ["Yes"]
    assert tokenizer.decode(row.input_ids).endswith("Yesno")


def test_earlier_turns_that_the_template_rewrites_are_learnt_as_it_writes_them(tmp_path) -> None:
    content = "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}"
    assert content in DROPS_REASONING
    template = DROPS_REASONING.replace(
        content, HEADER + "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    ).replace("{% generation %}", "{% if m['role'] == 'assistant' %}{% generation %}", 1)
    template = template.replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ content + '<|im_end|>' }}{% endif %}", 1
    )
    tokenizer = with_template(KINDS["byte-level"], template)
    record = chat("Is it?", "<think>hm</think>Yes.", "And?", "<think>so</think>No.")
    assert responses(encoded(record, tokenizer), tokenizer) == ["Yes.<|im_end|>", "<think>so</think>No.<|im_end|>"]
    notes = told_notes(tmp_path / "a.jsonl", [record], tokenizer)[1].notes
    assert f"1 row: {MARKED}" in notes
    assert f"1 row: {REWRITTEN}" not in notes


def test_tools_calls_and_several_blocks_in_a_turn() -> None:
    template = TOOLS_AS_OBJECT.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}",
    ).replace(
        "{{ '<call>' + f.name + ' ' + (f.arguments | tojson) + '</call>' }}",
        "{{ '<call>' }}{% generation %}{{ f.name + ' ' + (f.arguments | tojson) }}{% endgeneration %}{{ '</call>' }}",
    )
    tokenizer = with_template(KINDS["byte-level"], template)
    call = {"type": "function", "function": {"name": "price", "arguments": {"item": "cup"}}}
    messages = [
        {"role": "user", "content": "Price?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "12."},
    ]
    tools = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}]
    row = encoded({"messages": messages, "tools": tools}, tokenizer)
    called = 'price {"item": "cup"}'
    assert responses(row, tokenizer) == ["Let me see.", called, called, "12.<|im_end|>"]
    messages[1] = messages[1] | {"weight": 0}
    row = encoded({"messages": messages, "tools": tools}, tokenizer)
    assert responses(row, tokenizer) == ["12.<|im_end|>"]


def test_without_an_end_token_eos_follows_the_block() -> None:
    template = NO_END.replace(
        "{{ m['role'] | capitalize + ': ' + m['content'] | trim + '\n' }}",
        "{{ m['role'] | capitalize + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}",
    )
    tokenizer = with_template(KINDS["byte-level"], template)
    row = encoded(chat("Is it?", "Yes.", "And </s>?", "No."), tokenizer)
    assert [text.strip() for text in responses(row, tokenizer)] == ["Yes.", "No.</s>"]
    assert tokenizer.decode(row.input_ids).endswith("No.</s>")


def test_nothing_marked_gives_no_row() -> None:
    template = turns(
        "{{ m['content'] + '<|im_end|>' }}{% if m['other'] %}{% generation %}x{% endgeneration %}{% endif %}"
    )
    tokenizer = with_template(KINDS["byte-level"], template)
    assert encode_record(chat("Is it?", "Yes."), tokenizer, DataRecipe(), "r:1") == Dropped(RESPONSE_NOT_FOUND)


CONTENT = "{% generation %}{{ m['content'] }}{% endgeneration %}"


@pytest.mark.parametrize(
    "template",
    [
        turns("{% generation %}" + CONTENT + "{% endgeneration %}"),
        turns("{% set text %}" + CONTENT + "{% endset %}{{ text }}"),
        turns("{% filter trim %}" + CONTENT + "{% endfilter %}"),
        "{% macro reply(m) %}x" + CONTENT + "{% endmacro %}" + turns("{{ reply(m) }}"),
        "{% for m in messages recursive %}" + CONTENT + "{% endfor %}",
        turns("{% generation %}{{ m['content'] }}"),
    ],
    ids=["nested", "set", "filter", "macro", "recursive loop", "not closed"],
)
def test_markers_whose_place_is_unknown_are_one_clear_error(template: str) -> None:
    with pytest.raises(UserError, match=r"line \d+: .*generation") as caught:
        encode_record(chat("Is it?", "Yes."), with_template(KINDS["byte-level"], template), DataRecipe(), "r:1")
    assert "\n" not in str(caught.value)
