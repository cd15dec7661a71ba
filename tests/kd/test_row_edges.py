"""Edges of rows that nobody thinks of: each is honoured, refused, or counted."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import KEEPS, KINDS, TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_BY_PART, TOOLS_EITHER, with_template
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.drafts import CHANGED, CUT_OFF, EMPTY_TURNS, UNWEIGHTED
from kd.data.examples import PADDING, encode_record, load_rows
from kd.data.record_forms import record_of
from kd.data.records import read_records
from kd.data.special_text import special_ids
from kd.errors import UserError

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
# As in DeepSeek-R1's: the answer is what follows the thought.
DROPS_THOUGHTS = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def encode(record: Any, template: str = KEEPS, tokenizer: Any = None, **keys: Any) -> Any:
    chosen = with_template(tokenizer or KINDS["byte-level"], template)
    return encode_record(record, chosen, DataRecipe(**keys), "rows.jsonl:7")


def response(record: Any, template: str = KEEPS, **keys: Any) -> str:
    row = encode(record, template, **keys)
    ids = [token for token, counts in zip(row.input_ids, row.response_mask, strict=True) if counts]
    return KINDS["byte-level"].decode(ids)


def report_of(path: Any, records: list[Any] | None = None, template: str = KEEPS, **keys: Any) -> Any:
    if records is not None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer = with_template(KINDS["byte-level"], template)
    return load_rows([SourceRecipe(path=str(path))], tokenizer, DataRecipe(**keys))[1][0]


def called(arguments: Any, *more: Any) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": one}} for one in (arguments, *more)]
    return {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": calls}]}


def test_words_that_a_template_takes_out_of_the_last_turn_are_told(tmp_path):
    thinking = {"messages": [ASK, {"role": "assistant", "content": "<think>two plus</think>Nine."}]}
    assert report_of(tmp_path / "a.jsonl", [thinking], DROPS_THOUGHTS).notes == [f"1 row: {CHANGED}"]
    assert report_of(tmp_path / "a.jsonl", [thinking], KEEPS).notes == []


@pytest.mark.parametrize("content", [None, "", "b"])
def test_a_thought_that_no_template_renders_is_refused(content):
    turn = {"role": "assistant", "content": content, "reasoning_content": "think hard"}
    with pytest.raises(UserError, match=r"messages\[1\]\.reasoning_content: .* does not render it"):
        encode({"messages": [ASK, turn]})
    renders = KEEPS.replace("m['content']", "(m.reasoning_content or '') + m['content']")
    assert response({"messages": [ASK, turn]}, renders) == f"think hard{content or ''}<|im_end|>"


@pytest.mark.parametrize("last", [{"content": "Ten, an", "weight": 0}, {"content": ""}])
def test_only_the_turn_that_was_cut_off_loses_its_end_token(last, tmp_path):
    messages = [ASK, ANSWER, ASK, {"role": "assistant", **last}]
    assert response({"messages": messages, "finish_reason": "length"}) == "b<|im_end|>"
    notes = report_of(tmp_path / "a.jsonl", [{"messages": messages, "finish_reason": "length"}]).notes
    assert notes == [f"1 row: {UNWEIGHTED if 'weight' in last else EMPTY_TURNS}"]


@pytest.mark.parametrize("reason", ["max_tokens", "LENGTH", "content_filter", "FINISH_REASON_MAX_TOKENS"])
def test_what_servers_say_of_a_cut_answer(reason, tmp_path):
    record = {"messages": [ASK, ANSWER], "finish_reason": reason}
    assert response(record) == "b"
    assert report_of(tmp_path / "a.jsonl", [record]).notes == [f"1 row: {CUT_OFF}"]
    text = {"text": "ab", "finish_reason": reason}
    assert report_of(tmp_path / "a.jsonl", [text], append_eos=True).notes == [f"1 row: {CUT_OFF}"]
    assert response({**record, "finish_reason": "end_turn"}) == "b<|im_end|>"
    with pytest.raises(UserError, match="finish_reason: 'odd': not known; write length"):
        encode({**record, "finish_reason": "odd"})


def test_control_tokens_across_the_border_of_content_and_template_are_text(tmp_path):
    row = response(called({"s": "12", "b": "now 9"}), TOOLS_BY_PART)
    assert row == "<call>f<s>12</s><b>now 9</b></call><|im_end|>"
    tokenizer = with_template(KINDS["byte-level"], TOOLS_BY_PART)
    ids = encode(called({"s": "12", "b": "now 9"}), TOOLS_BY_PART).input_ids
    names = [tokenizer.convert_ids_to_tokens(token) for token in ids if token in special_ids(tokenizer)]
    assert names == ["<|im_start|>", "<|im_end|>"] * 2
    wraps = KEEPS.replace("m['content']", "'<' + m['content'] + '>'")
    assert response({"messages": [ASK, {**ANSWER, "content": "/s"}]}, wraps) == "</s><|im_end|>"
    notes = report_of(tmp_path / "a.jsonl", [called({"s": "12"})], TOOLS_BY_PART).notes
    assert notes == ["1 row: messages spell `<s>`, `</s>`: encoded as text"]


def test_a_normaliser_that_makes_control_tokens_of_text_is_refused():
    core = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte-level"].backend_tokenizer).backend_tokenizer
    core = type(core).from_str(core.to_str())
    core.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<|x|>", special=True, normalized=True)])
    tokenizer.chat_template = KEEPS
    assert encode_record({"messages": [ASK, ANSWER]}, tokenizer, DataRecipe(), "r:1")
    with pytest.raises(UserError, match="r:1: the tokenizer's normaliser"):
        encode_record({"messages": [ASK, {**ANSWER, "content": "A <|X|> b"}]}, tokenizer, DataRecipe(), "r:1")


def test_nulls_that_are_kept_as_json_are_values(tmp_path):
    record = called({"item": "kettle", "note": None})
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"messages": [ASK, ANSWER]}) + "\n")
    wanted = [row for _, row in read_records(SourceRecipe(path=str(tmp_path / "rows.jsonl")))]
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.save_to_disk(str(tmp_path / "saved"))
    loaded.to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("saved", "rows.parquet"):
        assert [row for _, row in read_records(SourceRecipe(path=str(tmp_path / name)))] == wanted, name


def test_nulls_taken_for_padding_are_counted(tmp_path):
    records = [called({"item": "kettle"}), called({"city": "Bern"})]
    pq.write_table(datasets.Dataset.from_list(records).data.table.replace_schema_metadata(None), tmp_path / "a.parquet")
    report = report_of(tmp_path / "a.parquet", template=TOOLS_AS_OBJECT)
    assert report.notes == [f"2 rows: {PADDING}"]


@pytest.mark.parametrize("template", [TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_EITHER, TOOLS_BY_PART])
@pytest.mark.parametrize("nothing", ["", " ", None, {}, "{}"])
def test_no_arguments_are_an_empty_object(template, nothing):
    shown = response(called(nothing), template)
    assert shown == ("<call>f</call><|im_end|>" if template is TOOLS_BY_PART else "<call>f {}</call><|im_end|>")
    both = response(called(nothing, {"a": "b"}), template)
    assert both.startswith(shown.removesuffix("<|im_end|>"))


@pytest.mark.parametrize("template", [TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_EITHER])
@pytest.mark.parametrize("broken", ["{broken", "[1]", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_arguments_are_checked_whatever_the_template_wants(template, broken):
    with pytest.raises(UserError, match=r"rows\.jsonl:7: messages\[1\]\.tool_calls\[0\]\.arguments: "):
        encode(called(broken), template)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"messages": [{**ASK, "train": True}, ANSWER]},
            r"messages\[0\]\.train: True: only assistant turns carry loss",
        ),
        ({"messages": [{**ASK, "weight": 0.5}, ANSWER]}, r"messages\[0\]\.weight: 0\.5: expected 0"),
        (
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "b", "train": False}]}]},
            r"content\[0\]\.train: unknown key of a text part",
        ),
        ({"conversations": [{"from": "gpt", "value": "y", "content": "z"}]}, r"\[0\]: has `from` and `content`"),
        ({"conversations": [{"from": "gpt"}]}, r"\[0\]\.value: expected a string, not null"),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": "f", "parameters": {"a": 1}}}]}]},
            r"tool_calls\[0\]\.parameters: a call has `arguments`",
        ),
    ],
)
def test_keys_with_a_meaning_in_the_wrong_place_are_refused(record, words):
    with pytest.raises(UserError, match=words):
        encode(record)


def test_padded_turns_and_lists_as_json_text():
    padded = {"conversations": [{"from": "human", "value": "a", "role": None, "content": None}]}
    assert record_of(padded, "r:1").row == {"messages": [ASK]}
    assert record_of({"messages": json.dumps([ASK, ANSWER])}, "r:1").row == {"messages": [ASK, ANSWER]}
    alpaca = {"instruction": "a", "output": "b", "history": json.dumps([["c", "d"]])}
    assert len(record_of(alpaca, "r:1").row["messages"]) == 4


def test_parts_of_tools_that_are_not_rendered_are_counted(tmp_path):
    tool = {"name": "f", "description": "d", "strict": True, "parameters": {"properties": {"a": {"type": "string"}}}}
    names_only = TOOLS_AS_OBJECT.replace(
        "tool | tojson", "tool.name + ' ' + (tool.parameters.properties | list | join)"
    )
    record = {"messages": [ASK, ANSWER], "tools": [tool]}
    unread = report_of(tmp_path / "a.jsonl", [record], names_only).unread
    assert unread == {"tools[].description": 1, "tools[].strict": 1, "tools[].parameters: types and descriptions": 1}
    assert report_of(tmp_path / "a.jsonl", [record], TOOLS_AS_OBJECT).unread == {}
    schema = {"messages": [ASK, ANSWER], "tools": [{"name": "f", "input_schema": tool["parameters"]}]}
    with pytest.raises(UserError, match=r"tools\[0\]\.input_schema: .* does not render it"):
        encode(schema, TOOLS_AS_OBJECT.replace("tool | tojson", "tool.name"))


# -- folders -----------------------------------------------------------------------------------------------------------


def write(folder: Any, **files: str) -> Any:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def texts(folder: Any, **keys: Any) -> list[str]:
    return [row["text"] for _, row in read_records(SourceRecipe(path=str(folder), **keys))]


A, B = '{"text": "a"}\n', '{"text": "b"}\n'


def test_folders_whose_files_tell_their_split(tmp_path):
    one = write(tmp_path / "one", train_dot_jsonl=A)
    assert texts(one) == ["a"]
    two = write(tmp_path / "two", en__train_dot_jsonl=A, en__test_dot_ndjson=B)
    assert (texts(two), texts(two, split="test")) == (["a"], ["b"])
    with pytest.raises(UserError, match=r"more\.jsonl belongs to no split by its name; give the files themselves"):
        texts(write(tmp_path / "three", train_dot_jsonl=A, more_dot_jsonl=B))
    with pytest.raises(UserError, match=r"has \.csv and \.jsonl files; give the files themselves"):
        texts(write(tmp_path / "four", train_dot_jsonl=A, train_dot_csv="text\na\n"))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n# Rows\n"
    with pytest.raises(UserError, match=r"README\.md declares which files belong to which split"):
        texts(write(tmp_path / "five", a_dot_jsonl=A, b_dot_jsonl=B, README_dot_md=card))
    assert texts(write(tmp_path / "six", a_dot_jsonl=A, README_dot_md="---\nlicense: mit\n---\n# Rows\n")) == ["a"]


def test_files_of_a_folder_that_are_not_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"b\.jsonl\.zst: this kind of file is not read"):
        texts(write(tmp_path / "rows", a_dot_jsonl=A, b_dot_jsonl_dot_zst="x"))


def test_a_folder_below_a_hidden_one_is_read(tmp_path, monkeypatch):
    write(tmp_path / ".cache" / "rows", a_dot_jsonl=A, _dot_git__b_dot_jsonl=B)
    assert texts(tmp_path / ".cache" / "rows") == ["a"]
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert texts("../../.cache/rows") == ["a"]
