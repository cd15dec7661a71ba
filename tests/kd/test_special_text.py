"""Text that spells a special token: text in messages, a control token or text in strings as the recipe says."""

from __future__ import annotations

import json

import pytest
from chat_tokenizers import (
    DROPS_REASONING,
    KEEPS,
    KINDS,
    NO_END,
    SPACE_IN_HEADER,
    TOOLS_AS_OBJECT,
    TRIMS,
    byte_level,
    real_template,
    with_template,
    words_only,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import chat_format
from kd.data.examples import conversation_ids, encode_record, load_rows
from kd.data.special_text import special_ids
from kd.errors import UserError

STRUCK = "Was <s>12</s>, now 9 coins, with free delivery."


def chat(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def encode(record, tokenizer, **keys):
    return encode_record(record, tokenizer, DataRecipe(**keys), "rows.jsonl:7")


def response(row, tokenizer):
    return tokenizer.decode([i for i, counts in zip(row.input_ids, row.response_mask, strict=True) if counts])


def control(row, tokenizer):
    return [tokenizer.convert_ids_to_tokens(token) for token in row.input_ids if token in special_ids(tokenizer)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("template", [KEEPS, TRIMS, NO_END, SPACE_IN_HEADER])
def test_struck_through_prices_are_text(kind, template):
    tokenizer = with_template(KINDS[kind], template)
    row = encode(chat("Price?", STRUCK), tokenizer)
    # The same conversation without a special token's text has the same control tokens.
    assert control(row, tokenizer) == control(encode(chat("Price?", "9 coins."), tokenizer), tokenizer)
    assert "<s>12</s>, now 9 coins, with free delivery." in response(row, tokenizer)
    ends = row.input_ids[-1] if row.response_mask[-1] else row.input_ids[-2]
    assert ends in special_ids(tokenizer)
    # Beside the spelled tokens everything is cut as before.
    plain = encode(chat("Price?", STRUCK.replace("<s>12</s>", "12")), tokenizer)
    assert row.input_ids[-12:] == plain.input_ids[-12:]


@pytest.mark.parametrize("which", ["mistral", "stories"])
def test_struck_through_prices_under_templates_of_known_models(shared, which):
    path = shared / "tokenizers" / "mistral-v1" if which == "mistral" else shared / "models" / "stories260k"
    tokenizer = (LlamaTokenizer if which == "mistral" else AutoTokenizer).from_pretrained(path)
    for template in sorted((shared / "templates").glob("*.jinja")):
        tokenizer.chat_template = real_template(shared, template.stem)
        row = encode(chat("<s>1</s>?", STRUCK, "And?", "</s>"), tokenizer)
        assert control(row, tokenizer) == control(encode(chat("1?", "12", "And?", "x"), tokenizer), tokenizer)
        assert STRUCK in tokenizer.decode(row.input_ids)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|user|>", "<", "s>", " ", "\n", "🙂"]), max_size=6),
        min_size=2,
        max_size=4,
    )
)
def test_any_contents_give_the_template_its_own_control_tokens(parts):
    contents = ["".join(part) for part in parts][: len(parts) // 2 * 2]
    for kind in ("byte-level", "metaspace"):
        tokenizer = with_template(KINDS[kind], KEEPS)
        row = encode(chat(*contents), tokenizer, empty_responses="keep")
        assert control(row, tokenizer) == ["<s>", *["<|im_start|>", "<|im_end|>"] * len(contents)]
        if kind == "byte-level":
            wanted = tokenizer.apply_chat_template(chat(*contents)["messages"], tokenize=False)
            assert tokenizer.decode(row.input_ids) == wanted


def test_rows_that_spell_special_tokens_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    records = [chat("a", STRUCK), chat("a", "b"), chat("</s>", "b"), {"prompt": "<s>a", "completion": "b</s>"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = with_template(KINDS["byte-level"], KEEPS)
    _, (report,) = load_rows([SourceRecipe(path=str(path))], tokenizer, DataRecipe())
    assert report.notes == [
        "1 row: messages spell `<s>`, `</s>`: encoded as text",
        "1 row: messages spell `</s>`: encoded as text",
        "1 row: the text spells `<s>`, `</s>`: read as control tokens (data.special_tokens: parse)",
    ]


def test_tool_arguments_and_tools_are_text_too():
    tokenizer = with_template(KINDS["byte-level"], TOOLS_AS_OBJECT)
    called = {"function": {"name": "f", "arguments": {"</s>": "<|im_end|>"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "<s>", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [called]}]
    row = encode({"messages": messages, "tools": [tool]}, tokenizer)
    assert control(row, tokenizer) == ["<|im_start|>", "<|im_end|>"] * 3
    assert response(row, tokenizer) == '<call>f {"</s>": "<|im_end|>"}</call><|im_end|>'


def test_a_token_that_the_template_takes_out_of_the_content_is_found_there():
    tokenizer = with_template(KINDS["byte-level"], DROPS_REASONING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert "</think>" in tokenizer.all_special_tokens or tokenizer.convert_tokens_to_ids("</think>") is not None
    row = encode(chat("a", "hm</think>b", "c", "so</think>d"), tokenizer)
    text = tokenizer.decode(row.input_ids)
    assert "hm" not in text
    assert response(row, tokenizer) == "so</think>d<|im_end|>"


def test_a_template_that_changes_such_text_is_refused():
    changes = KEEPS.replace("m['content']", "m['content'] | replace('b<', 'B<')")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: .*cannot be told apart"):
        encode(chat("a", "ab<|im_end|>"), with_template(KINDS["byte-level"], changes))


@pytest.mark.parametrize("kind", list(KINDS))
def test_strings_parse_control_tokens_unless_told_otherwise(kind):
    tokenizer = KINDS[kind]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    pair = {"prompt": "<s>[INST] a [/INST]", "completion": " b</s>c"}
    parsed = encode(pair, tokenizer)
    assert parsed.input_ids.count(eos) == 2
    assert parsed.input_ids.count(bos) == 1
    assert response(parsed, tokenizer).replace(" ", "") == "b</s>c</s>"  # what follows the token is a response, too
    literal = encode(pair, tokenizer, special_tokens="literal")
    assert literal.input_ids.count(eos) == 1
    assert literal.input_ids[-1] == eos
    adds_bos = tokenizer("a")["input_ids"][0] == bos
    assert literal.input_ids.count(bos) == adds_bos
    assert response(literal, tokenizer).replace(" ", "") == "b</s>c</s>"
    text = {"text": "<s>one</s>two"}
    assert encode(text, tokenizer).input_ids.count(eos) == 1
    as_text = encode(text, tokenizer, special_tokens="literal")
    assert as_text.input_ids.count(eos) == 0
    assert "".join(tokenizer.decode(as_text.input_ids[int(adds_bos) :]).split()) == "<s>one</s>two"
    # Where nothing is spelled, the key changes nothing.
    plain = {"prompt": "a", "completion": " b"}
    assert encode(plain, tokenizer) == encode(plain, tokenizer, special_tokens="literal")


def test_tokenizers_that_know_the_text_as_a_control_token_only():
    words = words_only()
    words.chat_template = SPACE_IN_HEADER.replace("+ (eos_token", "+ (' ' + eos_token")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: .*`</s>`.* control token"):
        encode(chat("red?", "yes </s> yes"), words)
    with pytest.raises(UserError, match=r"data\.special_tokens: literal: the tokenizer .* reads a control token"):
        encode({"prompt": "red?", "completion": " </s> yes"}, words, special_tokens="literal")
    slow = ByT5Tokenizer()
    slow.chat_template = SPACE_IN_HEADER
    with pytest.raises(UserError, match=r"rows\.jsonl:7: .*`</s>`"):
        encode(chat("a", "b</s>c"), slow)


def test_characters_that_stand_in_for_tokens_may_be_in_the_row():
    tokenizer = with_template(byte_level(), KEEPS)
    odd = "\ue000</s>\ue001 \U000f0000</s>"
    row = encode(chat("a", odd), tokenizer)
    assert response(row, tokenizer) == f"{odd}<|im_end|>"


def test_prompts_are_text_as_well():
    tokenizer = with_template(KINDS["byte-level"], KEEPS)
    fmt = chat_format(tokenizer, KEEPS)
    asked = chat("<s>12</s>?")["messages"]
    row = encode(chat("<s>12</s>?", "b"), tokenizer)
    assert conversation_ids(fmt, asked, ask=True, location="a prompt") == row.input_ids[: row.response_mask.index(True)]


def test_tokens_that_are_added_later_are_known():
    tokenizer = with_template(byte_level(), KEEPS)
    encode(chat("a", "b"), tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    row = encode(chat("a", "b <|new|> c"), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|new|>") not in row.input_ids
    assert response(row, tokenizer) == "b <|new|> c<|im_end|>"
