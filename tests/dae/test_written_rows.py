"""Rows of `dae sample` encode to the very ids that the model read and wrote, or they are not written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CORPUS, KEEPS, NO_END, OPENS_REASONING, SPACE_IN_HEADER, TRIMS, byte_level, metaspace
from lossy_tokenizers import make_lossy_checkpoint
from pico import make_checkpoint, make_tokenizer

import dae.sampling.sample
from dae.sampling.generation import END_TOKEN, LENGTH, SPECIAL_TOKEN, Continuation, Writer
from dae.sampling.recipe import SampleRecipe
from dae.sampling.sample import ROWS_AS, SampleFile, sample
from dae.sampling.written_rows import NOT_RENDERED, OTHER_END, OTHER_TOKENS, RowMaker
from kd.config.data_recipe import DataRecipe
from kd.data.chat import chat_format
from kd.data.examples import conversation_ids, encode_record
from kd.data.token_rows import TokenRow
from kd.errors import UserError

ASKED = [{"role": "user", "content": "red?"}]
IM_END = "<|im_end|>"
# A question opens the model's thought; what the model wrote is rendered as it is.
OPENS_A_THOUGHT = KEEPS.replace("assistant\n'", "assistant\n<think>\n'")
# As in Qwen3: the last answer is taken apart and always shown with its thought, earlier ones without.
TAKES_APART = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set thought = m['content'].split('</think>')[0] %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{% if '</think>' in m['content'] %}"
    "{{ '<think>\n' + thought.split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}{% else %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def written(tokenizer: Any, text: str, end: str | None = IM_END, stop: str | None = None) -> Continuation:
    """A continuation as a tokenizer of its own would write it; without an end token it was cut by the length."""
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    ended = None if end is None else int(tokenizer.convert_tokens_to_ids(end))
    return Continuation(len(ids) + 1, stop or (LENGTH if end is None else END_TOKEN), text=text, ids=ids, end=ended)


def made(template: str, continuation: Any, tokenizer: Any = None, asked: Any = None) -> tuple[Any, list[int]]:
    """The row (or why there is none) under a chat template, and the ids of the question."""
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = template
    fmt = chat_format(tokenizer, template)
    asked = asked or ASKED
    ids = conversation_ids(fmt, asked, ask=True, location="prompt")
    return RowMaker(tokenizer, fmt).row(asked, ids, continuation), ids


def encoded(row: Any, tokenizer: Any) -> TokenRow:
    found = encode_record(row, tokenizer, DataRecipe(max_length=10_000), "row")
    assert isinstance(found, TokenRow)
    return found


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("end", [IM_END, None])
@pytest.mark.parametrize(
    ("template", "text", "content"),
    [
        (KEEPS, "yes, a red cup", "yes, a red cup"),
        (KEEPS, "\nyes", "\nyes"),
        (OPENS_A_THOUGHT, "it is red", "<think>\nit is red"),
        (OPENS_A_THOUGHT, "it is red\n</think>\n\nyes", "<think>\nit is red\n</think>\n\nyes"),
        (TAKES_APART, "it is red\n</think>\n\nyes", "<think>\nit is red\n</think>\n\nyes"),
    ],
)
def test_a_row_encodes_to_what_was_read_and_written(
    make: Any, template: str, text: str, content: str, end: str | None
) -> None:
    tokenizer = make()
    continuation = written(tokenizer, text, end)
    row, question = made(template, continuation, tokenizer)
    if isinstance(row, str):  # metaspace writes a space before its first word, which no template has there
        assert make is metaspace and row in (OTHER_TOKENS, NOT_RENDERED)
        return
    assert row["messages"] == [*ASKED, {"role": "assistant", "content": content}]
    assert row.get("finish_reason") == (None if end else "length")
    found = encoded(row, tokenizer)
    ending = [] if end is None else [continuation.end]
    said = [*question, *continuation.ids, *ending]
    assert found.input_ids[: len(said)] == said
    assert found.response_mask == [len(question) <= t < len(said) for t in range(len(found.input_ids))]
    assert end or len(found.input_ids) == len(said)


def test_a_template_that_marks_its_header_as_response_has_rows() -> None:
    turn = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    assert turn in KEEPS
    marked = "{% if m['role'] == 'assistant' %}{% generation %}" + turn + "{% endgeneration %}{% else %}" + turn
    tokenizer = byte_level()
    continuation = written(tokenizer, "yes")
    row, question = made(KEEPS.replace(turn, marked + "{% endif %}"), continuation, tokenizer)
    found = encoded(row, tokenizer)
    said = [*question, *continuation.ids, continuation.end]
    assert found.input_ids[: len(said)] == said
    assert sum(found.response_mask) > len(said) - len(question)


@pytest.mark.parametrize(
    ("template", "text", "end", "reason"),
    [
        (OPENS_REASONING, "it is red</think>yes", IM_END, NOT_RENDERED),  # the thought would be lost
        (TAKES_APART, "it is", None, NOT_RENDERED),  # a thought cut off would become the answer
        (TRIMS, "\nyes", IM_END, NOT_RENDERED),
        (TRIMS, "yes\n", IM_END, NOT_RENDERED),
        (KEEPS, "yes", "</s>", OTHER_END),
    ],
)
def test_what_no_row_says_is_dropped_with_its_reason(template: str, text: str, end: str | None, reason: str) -> None:
    tokenizer = byte_level()
    assert made(template, written(tokenizer, text, end), tokenizer)[0] == reason


def test_tokens_that_the_tokenizer_would_not_choose_are_dropped() -> None:
    tokenizer = byte_level()
    whole = tokenizer("hello", add_special_tokens=False).input_ids
    letters = tuple(int(tokenizer.convert_tokens_to_ids(letter)) for letter in "hello")
    assert len(whole) < len(letters) and any("hello" in text for text in CORPUS)
    end = tokenizer.convert_tokens_to_ids(IM_END)
    row, _ = made(KEEPS, Continuation(6, END_TOKEN, text="hello", ids=letters, end=end), tokenizer)
    assert row == OTHER_TOKENS


def test_an_answer_that_another_special_token_broke_off_has_no_end() -> None:
    tokenizer = byte_level()
    row, question = made(KEEPS, written(tokenizer, "yes", None, SPECIAL_TOKEN), tokenizer)
    assert row["finish_reason"] == "length"
    assert encoded(row, tokenizer).input_ids[-1] != tokenizer.convert_tokens_to_ids(IM_END)
    assert len(encoded(row, tokenizer).input_ids) > len(question)


@pytest.mark.parametrize(("text", "reason"), [(" yes\n", None), (" yes", OTHER_END)])
def test_a_template_without_end_tokens_is_followed_by_eos(text: str, reason: str | None) -> None:
    tokenizer = byte_level()
    continuation = written(tokenizer, text, "</s>")
    row, question = made(NO_END, continuation, tokenizer)
    if reason is None:
        assert encoded(row, tokenizer).input_ids == [*question, *continuation.ids, continuation.end]
    else:
        assert row == reason  # a line break follows the answer, which the model did not write


def test_a_prompt_that_spells_a_special_token_stays_text() -> None:
    tokenizer = byte_level()
    asked = [{"role": "user", "content": "was <s>12</s>?"}]
    continuation = written(tokenizer, "yes")
    row, question = made(KEEPS, continuation, tokenizer, asked)
    assert not {1, 2} & set(question[1:])
    said = [*question, *continuation.ids, continuation.end]
    assert encoded(row, tokenizer).input_ids[: len(said)] == said


@pytest.mark.parametrize("end", ["</s>", None])
def test_pairs_and_texts(end: str | None) -> None:
    tokenizer = make_tokenizer()
    maker = RowMaker(tokenizer, None)
    prompt, continuation = tokenizer("red green").input_ids, written(tokenizer, " blue cup", end)
    cut = {} if end else {"finish_reason": "length"}
    row = maker.row("red green", prompt, continuation)
    assert row == {"prompt": "red green", "completion": " blue cup", **cut}
    assert encoded(row, tokenizer).input_ids == [*prompt, *continuation.ids, *([2] if end else [])]
    begun = maker.row(None, [1], continuation)
    assert begun == {"text": " blue cup", **cut}
    assert encoded(begun, tokenizer).input_ids == list(continuation.ids)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    """A checkpoint whose question opens a thought."""
    folder = make_checkpoint(tmp_path / "model", vocab_size=292)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", IM_END]})
    tokenizer.chat_template = TAKES_APART
    tokenizer.save_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": ASKED}) + "\n")
    return folder


def recipe_for(model: Path, **changes: Any) -> SampleRecipe:
    place = model.parent
    settings = {"model": str(model), "output": str(place / "rows.jsonl"), "rows": 2, "batch_size": 2}
    return SampleRecipe.model_validate({**settings, "prompts": str(place / "prompts.jsonl"), **changes})


def test_a_thought_that_was_cut_off_is_no_answer(
    thinker: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the template would show as an answer with an end token behind it was reasoning, and had none."""

    def generate(self: Writer, prompts: Any, *_: Any) -> list[list[int]]:
        texts = ["the kettle is", "the kettle is red\n</think>\n\nyes<|im_end|>"]
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    monkeypatch.setattr(Writer, "_generate", generate)
    with caplog.at_level(logging.INFO, logger="dae"):
        path = sample(recipe_for(thinker))
    answer = {"role": "assistant", "content": "<think>\nthe kettle is red\n</think>\n\nyes"}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"messages": [*ASKED, answer]}] * 2
    facts = json.loads(Path(f"{path}.meta.json").read_text())
    assert facts["gave no row"] == {NOT_RENDERED: 2}
    assert facts["settings"]["promise of rows"] == ROWS_AS
    assert f"2 dropped ({NOT_RENDERED}: 2)" in caplog.text


def test_a_question_that_ends_in_a_space_leaves_it_to_the_answer(
    thinker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the row encodes to what the model went on with: in training a word has its space with it."""
    asked: list[str] = []

    def generate(self: Writer, prompts: Any, *_: Any) -> list[list[int]]:
        asked.extend(self.tokenizer.decode(prompt) for prompt in prompts)
        return [self.tokenizer(" green</s>", add_special_tokens=False).input_ids] * len(prompts)

    monkeypatch.setattr(Writer, "_generate", generate)
    (thinker / "chat_template.jinja").write_text(SPACE_IN_HEADER)
    (row,) = map(json.loads, sample(recipe_for(thinker, rows=1, batch_size=1)).read_text().splitlines())
    assert row["messages"][-1]["content"] == "green"
    assert asked == ["user: red?\nassistant:"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_tokenizer_or_template_is_another_setting(
    thinker: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SampleFile, "finish", lambda *_: None)
    recipe = recipe_for(thinker, prompts=None, max_new_tokens=4, rows=1, batch_size=64)
    monkeypatch.setattr(
        dae.sampling.sample, "converse", lambda *_: dae.sampling.sample.Batch([{"text": "a"}], [LENGTH], [1])
    )
    sample(recipe)
    changed = thinker / file
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(UserError, match="content of tokenizer and chat template"):
        sample(recipe)


def test_rows_of_an_earlier_promise_are_not_mixed_with_new_ones(thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleFile, "finish", lambda *_: None)
    monkeypatch.setattr(
        dae.sampling.sample, "converse", lambda *_: dae.sampling.sample.Batch([{"text": "a"}], [LENGTH], [1])
    )
    recipe = recipe_for(thinker, prompts=None, rows=1)
    sample(recipe)
    partial = Path(recipe.output + ".partial")
    first, *others = partial.read_text().splitlines()
    settings = json.loads(first)
    del settings["promise of rows"]
    partial.write_text("\n".join([json.dumps(settings), *others]) + "\n")
    with pytest.raises(UserError, match="promise of rows"):
        sample(recipe)


def test_a_tokenizer_that_drops_text_of_the_prompts_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_lossy_checkpoint(tmp_path / "lossy")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Fish & chips"}\n')
    sample(recipe_for(model, rows=1, max_new_tokens=3, batch_size=64))
    (line,) = [record.message for record in caplog.records if "in silence" in record.message]
    assert "1 of 1 texts looked at (100.0 %): & (1)" in line
