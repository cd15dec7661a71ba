"""Reading rows: what is accepted, and that every mistake names its file and row."""

from __future__ import annotations

import json

import datasets
import pytest

from kd.config.data_recipe import SourceRecipe
from kd.data.records import read_records
from kd.errors import UserError

PAIR = {"prompt": "a", "completion": "b"}


def read(path, **keys):
    return list(read_records(SourceRecipe(path=str(path), **keys)))


def test_jsonl_rows_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**PAIR, "id": 3}).encode() + b'\r\n\n{"text": "na\xc3\xafve"}')
    assert read(path) == [(f"{path}:1", PAIR), (f"{path}:3", {"text": "naïve"})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["a"]', "expected a JSON object, not a list"),
        (b'{"prompt": "a", "complettion": "b"}', "its keys are prompt, complettion; a row is"),
        (b'{"prompt": "a", "completion": "b", "text": "c"}', "`completion`, `prompt`, `text` together are ambiguous"),
        (b'{"conversations": []}', "conversations: expected a list of at least one message"),
        (b"{}", r"its keys are \(none\)"),
        (b'{"text": 3}', "text: expected a string, not a number"),
        (b'{"text": null}', r"its keys are \(none\)"),
        (b'{"text": "a", "text": "b"}', "text: duplicate key"),
        (b'{"text": "\\ud83d"}', "text: half of a surrogate pair"),
        (
            b'{"prompt": "a", "completion": [{"role": "user", "content": "a"}]}',
            "prompt is a string, completion is a list",
        ),
        (b'{"messages": []}', "messages: expected a list of at least one message"),
        (b'{"messages": "hello"}', "messages: not valid JSON"),
        (b'{"messages": ["hello"]}', r"messages\[0\]: expected an object, not a string"),
        (
            b'{"messages": [{"role": "gpt", "content": "a"}]}',
            r"messages\[0\]\.role: 'gpt': unknown role; expected one of system",
        ),
        (b'{"messages": [{"from": "gpt", "value": "a"}]}', r"messages\[0\]\.role: None: unknown role"),
        (b'{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]\.content: expected a string, not null"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"messages\[0\]\.content\[0\]: expected .*, not type 'image_url'; these models read text only",
        ),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_rows_are_named(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"{path}:3: {words}|{path}:3: .*{words}"):
        read(path)


def test_roles_and_tool_calls_that_are_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": role, "content": "a"} for role in ("system", "user", "tool", "assistant")]
    messages.append(
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    )
    path.write_text(json.dumps({"messages": messages, "prompt": "an id, as hub data sets have"}))
    assert read(path)[0][1] == {"messages": [*messages[:4], {**messages[4], "content": ""}]}


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_file(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl: has no rows"):
        read(tmp_path / "rows.jsonl")


def test_missing_file_and_folders_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file or folder; give a file or folder of rows"):
        read(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"data/rows\.jsonl: no such file or folder; give"):
        read("data/rows.jsonl")
    with pytest.raises(UserError, match="a folder without data files"):
        read(tmp_path)


def test_saved_datasets(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "many"))
    assert [location for location, _ in read(tmp_path / "one")] == [f"{tmp_path}/one[train][{i}]" for i in (0, 1)]
    assert read(tmp_path / "one")[1][1] == rows[1]
    assert len(read(tmp_path / "many")) == 2
    assert len(read(tmp_path / "many", split="test")) == 1
    with pytest.raises(UserError, match=r"many: split: 'tset': not there; it has train, test"):
        read(tmp_path / "many", split="tset")


def test_hub_data_sets(monkeypatch):
    def load_dataset(path, split):
        if path != "owner/name":
            raise FileNotFoundError("nothing there")
        return datasets.Dataset.from_list([{"text": split}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", split="test")[0] == ("owner/name[test][0]", {"text": "test"})
    with pytest.raises(UserError, match=r"owner/other: no such file or folder, nor .* hub data set .*nothing there"):
        read("owner/other")
