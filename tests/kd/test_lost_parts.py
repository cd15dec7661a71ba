"""What a chat template would lose is refused; tool arguments reach it in the form that it wants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_tokenizers import (
    KEEPS,
    KINDS,
    TOOLS_AS_OBJECT,
    TOOLS_AS_TEXT,
    TOOLS_BY_PART,
    TOOLS_EITHER,
    TRIMS,
    real_template,
    with_template,
)

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.chat import PLAIN_TEMPLATE
from kd.data.chat_fitting import DEVELOPER, READ_AS_OBJECT, READ_AS_TEXT
from kd.data.drafts import NO_WEIGHT, TRAILING, UNWEIGHTED, Dropped
from kd.data.examples import encode_record, load_rows
from kd.errors import UserError

ASK = {"role": "user", "content": "Price?"}
ARGUMENTS = {"item": "kettle"}
TOOL = {
    "type": "function",
    "function": {
        "name": "price",
        "description": "what it costs",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
    },
}


def call(arguments: Any = ARGUMENTS, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "price", "arguments": arguments}, **keys}


def calling(arguments: Any = ARGUMENTS) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}]}


def encode(record: dict[str, Any], template: str, **settings: Any) -> Any:
    return encode_record(record, with_template(KINDS["byte-level"], template), DataRecipe(**settings), "rows.jsonl:7")


def response(record: dict[str, Any], template: str, **settings: Any) -> str:
    row = encode(record, template, **settings)
    ids = [token for token, counts in zip(row.input_ids, row.response_mask, strict=True) if counts]
    return KINDS["byte-level"].decode(ids)


def report_of(path, records, template):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer = with_template(KINDS["byte-level"], template)
    return load_rows([SourceRecipe(path=str(path))], tokenizer, DataRecipe())[1][0]


ANSWERED = [
    *calling()["messages"],
    {"role": "tool", "content": "9", "tool_call_id": "a"},
    {"role": "assistant", "content": "9 coins"},
]
ONLY_FIRST_CALL = TOOLS_AS_OBJECT.replace("for call in m.tool_calls or []", "for call in (m.tool_calls or [])[:1]")
CALLS_HIDE_CONTENT = TOOLS_AS_OBJECT.replace("m['content'] }}", "('' if m.tool_calls else m['content']) }}")
NO_SYSTEM = KEEPS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
NO_RESULTS = TOOLS_AS_OBJECT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
LAST_QUESTION = KEEPS.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
SCHEMALESS = TOOLS_AS_OBJECT.replace("tool | tojson", "tool.function.name")
NO_ARGUMENTS = TOOLS_AS_OBJECT.replace(" + ' ' + (f.arguments | tojson)", "")
TWO_CALLS = {"messages": [ASK, {"role": "assistant", "content": "Hm", "tool_calls": [call(), call({"item": "cup"})]}]}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "9"}


@pytest.mark.parametrize(
    ("template", "record", "part"),
    [
        (PLAIN_TEMPLATE, calling(), r"messages\[1\]\.tool_calls\[0\]"),
        (KEEPS, calling(), r"messages\[1\]\.tool_calls\[0\]"),
        (KEEPS, {"messages": [ASK, ANSWER], "tools": [TOOL]}, r"tools\[0\]"),
        (KEEPS, {"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, r"tools\[0\]"),
        (SCHEMALESS, {"messages": [ASK, ANSWER], "tools": [TOOL]}, r"tools\[0\]\.parameters"),
        (ONLY_FIRST_CALL, TWO_CALLS, r"messages\[1\]\.tool_calls\[1\]"),
        (CALLS_HIDE_CONTENT, TWO_CALLS, r"messages\[1\]\.content"),
        (NO_ARGUMENTS, calling(), r"messages\[1\]\.tool_calls\[0\]\.arguments"),
        (NO_SYSTEM, {"messages": [SYSTEM, ASK, ANSWER]}, r"the system turn messages\[0\]"),
        (NO_SYSTEM, {"messages": [ASK, ANSWER], "system": "Be brief."}, r"the system turn messages\[0\]"),
        (NO_RESULTS, {"messages": ANSWERED}, r"the tool turn messages\[2\]"),
        (LAST_QUESTION, {"messages": [ASK, ANSWER, ASK, ANSWER]}, r"the user turn messages\[0\]"),
        (LAST_QUESTION, {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, r"the user turn messages\[0\]"),
    ],
)
def test_a_part_that_the_template_loses_is_refused_by_name(template, record, part):
    with pytest.raises(UserError, match=rf"rows\.jsonl:7: {part}: the chat template .* does not render it"):
        encode(record, template)


def test_calls_are_refused_or_trained_under_templates_of_known_models(shared):
    rendered = []
    for path in sorted((shared / "templates").glob("*.jinja")):
        template = real_template(shared, path.stem)
        try:
            answer = response(calling(), template)
        except UserError:
            continue
        rendered.append(path.stem)
        assert '{"name": "price", "arguments": {"item": "kettle"}}' in answer
        assert response(calling(json.dumps(ARGUMENTS)), template) == answer
    assert rendered == ["qwen2.5-instruct"]


def test_a_part_that_is_rendered_is_taken_whatever_it_says():
    for content in ("x", "", "None", "content0", "9"):
        assert response({"messages": [{"role": "system", "content": content}, ASK, ANSWER]}, TRIMS) == "9<|im_end|>"
    assert response({"messages": ANSWERED, "tools": [TOOL]}, TOOLS_AS_OBJECT).endswith("9 coins<|im_end|>")


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS), ' {"item" : "kettle"} '])
@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (TOOLS_AS_OBJECT, '<call>price {"item": "kettle"}</call><|im_end|>'),
        (TOOLS_BY_PART, "<call>price<item>kettle</item></call><|im_end|>"),
    ],
)
def test_arguments_as_text_are_rendered_once(template, wanted, given):
    assert response(calling(given), template) == wanted


def test_arguments_reach_a_template_as_it_wants_them(tmp_path):
    wanted = '<call>price {"item": "kettle"}</call><|im_end|>'
    assert response(calling(), TOOLS_AS_TEXT) == wanted
    assert response(calling(json.dumps(ARGUMENTS)), TOOLS_AS_TEXT) == wanted
    assert response(calling(json.dumps(ARGUMENTS)), TOOLS_EITHER) == response(calling(), TOOLS_EITHER) == wanted
    as_text = [calling(json.dumps(ARGUMENTS))] * 2
    assert report_of(tmp_path / "a.jsonl", as_text, TOOLS_AS_OBJECT).notes == [f"2 rows: {READ_AS_OBJECT}"]
    assert report_of(tmp_path / "a.jsonl", [calling()], TOOLS_AS_TEXT).notes == [f"1 row: {READ_AS_TEXT}"]
    assert report_of(tmp_path / "a.jsonl", [*as_text, calling()], TOOLS_EITHER).notes == []


@pytest.mark.parametrize("arguments", ["{item: kettle}", "[1]", "kettle"])
def test_arguments_that_are_no_json_object_are_refused(arguments):
    with pytest.raises(UserError, match=r"rows\.jsonl:7: messages\[1\]\.tool_calls\[0\]\.arguments: "):
        encode(calling(arguments), TOOLS_AS_OBJECT)


def test_keys_that_a_template_does_not_render_are_counted(tmp_path):
    record = {"messages": [{**ASK, "name": "Ada"}, {**ANSWER, "annotator": 7}], "id": 3, "topic": "tea"}
    report = report_of(tmp_path / "a.jsonl", [record, {**record, "id": None}], TOOLS_AS_OBJECT)
    assert report.unread == {"id": 1, "topic": 2, "messages[].name": 2, "messages[].annotator": 2}
    named = KEEPS.replace("m['content']", "(m.name or '') + m['content']")
    assert "messages[].name" not in report_of(tmp_path / "a.jsonl", [record], named).unread


def test_turns_of_weight_0_carry_no_loss(tmp_path):
    for key, off in (("weight", 0), ("weight", 0.0), ("train", False)):
        record = {"messages": [ASK, {**ANSWER, key: off}, ASK, {"role": "assistant", "content": "8", "weight": 1}]}
        row, whole = encode(record, KEEPS), encode({"messages": [ASK, ANSWER, ASK, {**ANSWER, "content": "8"}]}, KEEPS)
        assert row.input_ids == whole.input_ids
        assert response(record, KEEPS) == "8<|im_end|>"
    assert report_of(tmp_path / "a.jsonl", [record], KEEPS).notes == [f"1 row: {UNWEIGHTED}"]
    nothing = {"messages": [ASK, {**ANSWER, "weight": 0}]}
    assert encode(nothing, KEEPS) == Dropped(NO_WEIGHT)
    for weight in (0.5, 2, "no"):
        with pytest.raises(UserError, match=r"rows\.jsonl:7: messages\[1\]\.weight: .*expected 0 .* or 1"):
            encode({"messages": [ASK, {**ANSWER, "weight": weight}]}, KEEPS)


def test_system_beside_messages_is_their_first_turn():
    beside, within = {"messages": [ASK, ANSWER], "system": "Be brief."}, {"messages": [SYSTEM, ASK, ANSWER]}
    assert encode(beside, KEEPS) == encode(within, KEEPS) == encode({**within, "system": "Be brief."}, KEEPS)
    assert encode({"prompt": [ASK], "completion": [ANSWER], "system": "Be brief."}, KEEPS) == encode(within, KEEPS)
    with pytest.raises(UserError, match=r"rows\.jsonl:7: system: .* keep one of the two"):
        encode({**within, "system": "Be long."}, KEEPS)
    for key, value in (("system", "Be brief."), ("tools", [TOOL])):
        with pytest.raises(UserError, match=rf"rows\.jsonl:7: {key}: plain strings use no chat template"):
            encode({"prompt": "Price?", "completion": " 9", key: value}, KEEPS)


def test_messages_after_the_last_answer_are_told(tmp_path):
    record = {"messages": [ASK, ANSWER, ASK]}
    assert encode(record, KEEPS) == encode({"messages": [ASK, ANSWER]}, KEEPS)
    assert report_of(tmp_path / "a.jsonl", [record], KEEPS).notes == [f"1 row: {TRAILING}"]


def test_developer_turns(tmp_path):
    record = {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]}
    assert encode(record, PLAIN_TEMPLATE) == encode({"messages": [SYSTEM, ASK, ANSWER]}, PLAIN_TEMPLATE)
    assert report_of(tmp_path / "a.jsonl", [record], PLAIN_TEMPLATE).notes == [f"1 row: {DEVELOPER}"]
    knows = KEEPS + "{# developer #}"
    assert "developer" in KINDS["byte-level"].decode(encode(record, knows).input_ids)


def test_calls_of_the_former_shape_are_refused():
    old = {"role": "assistant", "content": "", "function_call": {"name": "price", "arguments": "{}"}}
    with pytest.raises(UserError, match=r"messages\[1\]\.function_call: the former shape of `tool_calls`"):
        encode({"messages": [ASK, old]}, TOOLS_AS_OBJECT)
    with pytest.raises(UserError, match=r"functions: the former shape of `tools`"):
        encode({"messages": [ASK, ANSWER], "functions": [TOOL["function"]]}, TOOLS_AS_OBJECT)


def test_a_response_that_was_cut_off_has_no_end_token(tmp_path):
    for template in (KEEPS, TRIMS, PLAIN_TEMPLATE):
        assert response({"messages": [ASK, ANSWER], "finish_reason": "length"}, template).strip() == "9"
        assert response({"messages": [ASK, ANSWER], "finish_reason": "stop"}, template).strip() != "9"
    cut = {"prompt": "Price?", "completion": " 9", "finish_reason": "length"}
    assert response(cut, KEEPS) == " 9"
    assert response({**cut, "finish_reason": "stop"}, KEEPS) == " 9</s>"
