"""The shapes and files that rows come in: each encodes as the same row given as JSONL does."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import KINDS, TOOLS_AS_OBJECT, with_template

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.examples import load_rows
from kd.data.record_forms import record_of
from kd.data.records import Reading, read_records
from kd.errors import UserError

TOKENIZER = with_template(KINDS["byte-level"], TOOLS_AS_OBJECT)
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def rows_of(path, **keys):
    (rows,), (report,) = load_rows([SourceRecipe(path=str(path), **keys)], TOKENIZER, DataRecipe())
    return [rows[i] for i in range(len(rows))], report


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLING = [
    {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call("price", item="kettle")]}],
        "tools": [tool("price", item={"type": "string"}), tool("shop", city={"type": "string", "enum": ["x"]})],
    },
    {
        "messages": [
            ASK,
            {"role": "assistant", "content": "c", "tool_calls": [call("shop", city="Bern"), call("all")]},
        ],
        "tools": [tool("shop", city={"type": "string"})],
    },
    {"messages": [{"role": "system", "content": "s", "name": "n"}, ASK, {**ANSWER, "weight": 1}]},
]


def test_rows_of_a_datasets_folder_and_of_parquet_encode_as_their_jsonl_does(tmp_path):
    wanted, _ = rows_of(write_jsonl(tmp_path / "rows.jsonl", CALLING))
    # All structs in one column: every tool and call gets every other's keys, as null.
    table = pa.Table.from_pylist(CALLING)
    padded = table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert padded == {"item": "kettle", "city": None}
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(CALLING).save_to_disk(str(tmp_path / "listed"))
    for name in ("rows.parquet", "saved", "listed"):
        assert rows_of(tmp_path / name)[0] == wanted, name
    assert "null" not in TOKENIZER.decode(wanted[0].input_ids)


def test_nulls_of_a_jsonl_row_stay_where_they_were_written(tmp_path):
    written = {"messages": [ASK, {**ANSWER, "tool_calls": [call("shop", city=None)], "name": None}]}
    rows, report = rows_of(write_jsonl(tmp_path / "rows.jsonl", [written]))
    assert '{"city": null}' in TOKENIZER.decode(rows[0].input_ids)
    assert report.unread == {}


SHAPES = {
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "messages": {"messages": [ASK, ANSWER]},
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_known_shapes_are_found_by_their_keys(tmp_path, name):
    wanted, _ = rows_of(write_jsonl(tmp_path / "plain.jsonl", [SHAPES["messages"]]))
    rows, report = rows_of(write_jsonl(tmp_path / "rows.jsonl", [SHAPES[name]]))
    assert rows == wanted
    assert report.formats == {name: 1}
    assert rows_of(tmp_path / "rows.jsonl", format=name)[0] == wanted


def test_what_the_shapes_hold_besides(tmp_path):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "price", "arguments": {"item": "kettle"}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "b", "weight": 0},
    ]
    row = record_of({"conversations": turns, "tools": json.dumps(CALLING[0]["tools"])}, "r:1").row
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["tool_calls"] == [{"name": "price", "arguments": {"item": "kettle"}}]
    assert row["messages"][4]["weight"] == 0
    assert row["tools"] == CALLING[0]["tools"]
    alpaca = {"instruction": "Sum up.", "input": "Tea.", "output": "b", "history": [["q", "r"]], "system": "s"}
    said = [message["content"] for message in record_of(alpaca, "r:1").row["messages"]]
    assert said == ["s", "q", "r", "Sum up.\nTea.", "b"]
    assert record_of({"prompt": "a", "response": " b"}, "r:1").row == {"prompt": "a", "completion": " b"}
    assert record_of({"prompt": [ASK], "response": [ANSWER]}, "r:1").row == {"prompt": [ASK], "completion": [ANSWER]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert record_of({"messages": [ASK, {**ANSWER, "content": parts}]}, "r:1").row["messages"][1]["content"] == "ab"
    calls = json.dumps([call("f")])
    assert record_of({"messages": [{**ANSWER, "tool_calls": calls}]}, "r:1").row["messages"][0]["tool_calls"] == [
        call("f")
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "a", "answer": "b"}, r"its keys are question, answer; a row is \{\"messages\""),
        ({"instruction": "a", "output": "b", "text": "c"}, r"ambiguous; set the source's format to text or alpaca"),
        ({"messages": [ASK], "completion": "b"}, "ambiguous; set the source's format"),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            r"conversations\[0\]\.from: 'narrator': unknown speak",
        ),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, r"\[0\]\.value: not valid JSON"),
        ({"instruction": 3, "output": "b"}, "instruction: expected a string, not a number"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\]: has no name; expected"),
        ({"messages": [{**ASK, "tool_calls": [call("f")]}, ANSWER]}, r"messages\[0\]\.tool_calls: only an assistant"),
        ({"messages": [ASK, ANSWER], "tools": "price()"}, "tools: not valid JSON"),
        ({"messages": [ASK, ANSWER], "tools": [{"function": None}]}, r"tools\[0\]: has no name; expected"),
        ({"messages": [ASK, ANSWER], "tools": ["f"]}, r"tools\[0\]: expected an object, not a string"),
        ({"messages": [ASK, ANSWER], "finish_reason": 3}, "finish_reason: expected a string"),
    ],
)
def test_rows_of_no_known_shape_are_refused_with_the_shape_that_is_wanted(record, words):
    with pytest.raises(UserError, match=rf"r:1: .*{words}"):
        record_of(record, "r:1")


def test_a_declared_format_is_read_and_nothing_else():
    both = {"instruction": "a", "output": "b", "text": "c"}
    record = record_of(both, "r:1", "alpaca")
    assert record.unread == ("text",)
    assert record_of(both, "r:1", "text").unread == ("instruction", "output")
    with pytest.raises(UserError, match=r"r:1: format sharegpt: `conversations` is missing; .* expected \{\"conver"):
        record_of(both, "r:1", "sharegpt")


PAIRS = [{"prompt": "Price, please?", "completion": ' "007"\n'}, {"prompt": "NA", "completion": " 1.50"}]


def test_files_of_all_kinds_hold_the_same_rows(tmp_path):
    wanted, _ = rows_of(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
    packed = gzip.compress((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    (tmp_path / "unpacked-name.jsonl").write_bytes(packed)
    (tmp_path / "list.json").write_text(json.dumps(PAIRS))
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "rows.parquet")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(PAIRS)
    names = ("rows.jsonl.gz", "unpacked-name.jsonl", "list.json", "lines.json", "rows.parquet", "rows.csv", "rows.tsv")
    for name in names:
        assert rows_of(tmp_path / name)[0] == wanted, name


def test_folders_of_files_by_split(tmp_path):
    for split, records in (("train", PAIRS[:1]), ("test", PAIRS[1:])):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert [row for _, row in read_records(SourceRecipe(path=str(tmp_path / "hub")))] == PAIRS[:1]
    assert [row for _, row in read_records(SourceRecipe(path=str(tmp_path / "hub"), split="test"))] == PAIRS[1:]
    with pytest.raises(UserError, match=r"hub: split: 'dev': not there; it has train, test"):
        list(read_records(SourceRecipe(path=str(tmp_path / "hub"), split="dev")))
    for number, record in enumerate(PAIRS):
        write_jsonl(tmp_path / "parts" / f"part{number}.jsonl", [record])
    write_jsonl(tmp_path / "parts" / ".hidden" / "part9.jsonl", PAIRS)
    assert [row for _, row in read_records(SourceRecipe(path=str(tmp_path / "parts")))] == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b'prompt,completion\n"a,b\n', "rows.csv:2: not valid CSV"),
        ("rows.csv", b"prompt,completion\na\n", "rows.csv:2: has 1 cells, the header has 2"),
        ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", "rows.csv:3: has 3 cells, the header has 2"),
        ("rows.csv", b"prompt,prompt\na,b\n", "duplicate column 'prompt'"),
        ("rows.csv", b"prompt,completion\n\xff,b\n", "not valid CSV in UTF-8"),
        ("rows.csv", b"", "has no rows"),
        ("rows.parquet", b"PAR1", "cannot be read as parquet"),
        ("rows.jsonl.gz", b"\x1f\x8bnothing", "cannot be read"),
        ("rows.jsonl.zst", b"x", "this kind of file is not read; convert it to JSONL"),
        ("rows.json", b"[{]", "not valid JSON"),
        ("rows.json", b"[]", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_records(SourceRecipe(path=str(tmp_path / name))))


def test_a_truncated_gzip_file_is_no_shorter_data_set(tmp_path):
    packed = gzip.compress("".join(json.dumps(PAIRS[0]) + "\n" for _ in range(2000)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: cannot be read"):
        list(read_records(SourceRecipe(path=str(tmp_path / "rows.jsonl.gz"))))


def test_what_was_seen_of_the_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**PAIRS[0], "id": 1}, {"text": "a", "id": 2}, PAIRS[1]])
    reading = Reading()
    list(read_records(SourceRecipe(path=str(path)), reading))
    assert reading.formats == {"prompt-completion": 2, "text": 1}
    assert reading.unread == {"id": 2}
