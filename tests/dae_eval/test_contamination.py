"""Texts that occur in training rows, against the definition; and the rows that a run was trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
from dae_eval.contamination import ContaminatedTexts, contaminated_texts, row_text, training_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.config.data_recipe import SourceRecipe
from kd.data.fingerprint import data_sha256


def plainly(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold()).strip()


def by_definition(text: str, rows: list[str]) -> bool:
    """Word for word: nothing that belongs to a word stands right before or after it."""
    text = plainly(text)
    if not re.search(r"\S", text):
        return False
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.match(r"\w", text[-1]) else ""
    return any(re.search(before + re.escape(text) + after, plainly(row)) for row in rows)


# few words, so that texts often occur in rows, and often only nearly
words = st.lists(st.sampled_from(["a", "B", "b.", "ab", "é", "?", "\n", "  ", "c-d"]), max_size=12).map(" ".join)
glued = st.lists(st.sampled_from(["a", "B", ".", "ab", " "]), max_size=10).map("".join)


@given(st.lists(words | glued, max_size=6), st.lists(words | glued, max_size=6))
@settings(max_examples=400, deadline=None)
def test_a_match_is_word_for_word(texts: list[str], rows: list[str]) -> None:
    seen = ContaminatedTexts(texts)
    for row in rows:
        seen.add_row(row)
    assert [text in seen for text in texts] == [by_definition(text, rows) for text in texts]


def test_case_and_white_space_make_no_difference_and_halves_of_words_do() -> None:
    seen = ContaminatedTexts(["Two  CUPS", "two cup", "cups of", "wo cups", "(two)"])
    seen.add_row("holds two\n cups. Of course (TWO)")
    assert "two cups" in seen and "(two)" in seen
    assert "two cup" not in seen and "wo cups" not in seen and "cups of" not in seen


def test_texts_with_one_long_beginning_are_told_apart() -> None:
    beginning = "Below is an instruction that describes a task. Write a response to it: "
    texts = [f"{beginning}{number} apples" for number in range(300)]
    seen = ContaminatedTexts(texts)
    seen.add_row(f"{beginning}7 apples and {beginning}299 apples")
    assert [number for number, text in enumerate(texts) if text in seen] == [7, 299]


def test_all_parts_of_a_row_count() -> None:
    chat = [{"role": "user", "content": "how big"}, {"role": "assistant", "content": ""}]
    assert row_text({"prompt": "how big?", "completion": " two cups", "id": "x"}) == "how big?  two cups"
    assert row_text({"messages": [*chat, {"role": "assistant", "content": "two cups"}]}) == "how big  two cups"
    assert row_text({"text": "a kettle"}) == "a kettle"
    seen = ContaminatedTexts(["how big? two cups"])
    seen.add_row(row_text({"prompt": "Tell me: how big?", "completion": " two cups"}))
    assert "how big? two cups" in seen


def make_run(folder: Path, rows: dict[str, list[Path]], **recipe: Any) -> Path:
    """A run folder as far as it tells what it was trained on."""
    folder.mkdir()
    sources = {
        route: [{"path": str(path), "sha256": data_sha256(path), "share": None} for path in paths]
        for route, paths in rows.items()
    }
    told = {"toolkit": "dae-align", "stage": "sft", "base": {"path": "b", "fingerprint": "0"}, "inputs": {"base": "0"}}
    (folder / "provenance.json").write_text(json.dumps({**told, "data": sources}))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def rows_file(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_rows_of_teachers_and_of_the_base_count_but_not_held_out_ones(tmp_path: Path) -> None:
    files = {name: rows_file(tmp_path / f"{name}.jsonl", name) for name in ("old", "shop", "mixed", "held")}
    base = make_run(tmp_path / "base", {"train": [files["old"]]}, base="somewhere")
    expert = make_run(tmp_path / "expert", {"train": [files["shop"]]}, base=str(base))
    student = make_run(
        tmp_path / "student",
        {"general": [files["old"]], "shop": [files["mixed"]], "eval.shop": [files["held"]]},
        base=str(base), reference=str(base), expert={"shop": str(expert)},
    )  # fmt: skip
    found = training_rows([str(student)])
    assert [(Path(rows.path).stem, rows.problem) for rows, _ in found] == [("old", ""), ("mixed", ""), ("shop", "")]
    assert [source.path for _, source in found if source] == [rows.path for rows, _ in found]
    assert training_rows([str(tmp_path)]) == []


def test_missing_and_changed_rows_are_reported_and_not_read(tmp_path: Path) -> None:
    gone, changed = rows_file(tmp_path / "gone.jsonl", "a"), rows_file(tmp_path / "changed.jsonl", "b")
    run = make_run(tmp_path / "run", {"train": [gone, changed]})
    gone.unlink()
    rows_file(changed, "c")
    (one, no_source), (other, none_either) = training_rows([str(run)])
    assert no_source is None and none_either is None
    assert "not found" in one.problem and "has changed" in other.problem and str(run) in one.problem


def test_a_missing_teacher_is_reported_and_a_hub_model_is_not(tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", "a")
    run = make_run(tmp_path / "run", {"train": [rows]}, base="owner/model", reference=str(tmp_path / "gone"))
    found = [(one.path, bool(one.problem)) for one, _ in training_rows([str(run)])]
    assert found == [(str(rows), False), (str(tmp_path / "gone"), True)]


def test_the_split_that_was_trained_on_is_read(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": text}]) for name, text in (("train", "one"), ("test", "two"))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "rows"))
    recipe = {"data": {"train": [{"path": str(tmp_path / "rows"), "split": "test"}]}}
    run = make_run(tmp_path / "run", {"train": [tmp_path / "rows"]}, **recipe)
    ((_, source),) = training_rows([str(run)])
    assert source is not None
    seen = contaminated_texts(["one", "two"], source)
    assert "two" in seen and "one" not in seen


def test_evidence_of_real_questions_in_real_training_rows(shared: Path) -> None:
    """243 held-out questions have the evidence of a training row, as shared/README.md says; more occur inside rows."""

    def evidence(record: dict[str, Any]) -> str:
        return record["prompt"].partition("\nEvidence: ")[2].rpartition("\nAnswer:")[0]

    folder = shared / "data" / "ecom"
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (folder / "heldout_hetpqa.jsonl").read_text().splitlines()]
    seen = contaminated_texts(map(evidence, held_out), SourceRecipe(path=str(folder / "train.jsonl")))
    trained_on = {evidence(row) for row in train} - {""}
    equal = [evidence(row) for row in held_out if evidence(row) in trained_on]
    assert (len(held_out), len(equal)) == (2289, 243)
    assert all(text in seen for text in equal)
    rows = [plainly(row_text(row)) for row in train]
    everything = "\0".join(rows)

    def stands_there(text: str) -> bool:
        near = [row for row in rows if plainly(text) in row] if plainly(text) in everything else []
        return by_definition(text, near)

    some = [evidence(row) for row in held_out[::10]]
    assert [text in seen for text in some] == [stands_there(text) for text in some]
