"""`dae sample`: prompts from files, conversations under a chat template, adapters, a real model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM

from dae.sampling.generation import (
    END_TOKEN,
    LENGTH,
    SPECIAL_TOKEN,
    Continuation,
    open_writer,
)
from dae.sampling.prompts import instruction_of, read_prompts, user_opening
from dae.sampling.recipe import SampleRecipe
from dae.sampling.sample import sample
from kd.data.chat import chat_format
from kd.errors import UserError
from kd.models.checkpoint import checkpoint

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", vocab_size=292)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(model: Path, **changes: Any) -> SampleRecipe:
    settings = {"model": str(model), "output": str(model.parent / "out" / "rows.jsonl"), "rows": 10}
    return SampleRecipe.model_validate(settings | {"max_new_tokens": 6, "batch_size": 16} | changes)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_prompts_are_answered_in_turn_and_the_pair_is_the_whole_text(model: Path) -> None:
    prompts = model.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "red green "}\n{"prompt": "The kettle:", "completion": "left away"}\n')
    recipe = recipe_for(model, prompts=str(prompts), rows=6, batch_size=3, max_new_tokens=4)
    rows = rows_of(sample(recipe))
    assert {row["prompt"] for row in rows} == {"red green", "The kettle:"}
    assert all(row.keys() - {"finish_reason"} == {"prompt", "completion"} for row in rows)
    assert all(row["completion"].strip() for row in rows)


def test_messages_are_answered_under_the_template(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = chat_model.parent / "prompts.jsonl"
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "red?"}]
    prompts.write_text(json.dumps({"messages": [*asked, {"role": "assistant", "content": "an old answer"}]}) + "\n")
    seen: list[str] = []
    monkeypatch.setattr("dae.sampling.generation.Writer.continuations", scripted({"be brief": "blue"}, seen))
    rows = rows_of(sample(recipe_for(chat_model, prompts=str(prompts), rows=1, batch_size=1)))
    assert rows == [{"messages": [*asked, {"role": "assistant", "content": "blue"}]}]
    assert seen == ["<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"]


def scripted(script: dict[str, str], seen: list[str]) -> Any:
    """A writer that continues by what stands in the prompt."""

    def continuations(self: Any, prompts: Sequence[Sequence[int]], *_: Any) -> list[Continuation]:
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        seen.extend(texts)
        answers = [next(answer for part, answer in script.items() if part in text) for text in texts]
        ids = [tuple(self.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return [Continuation(3, END_TOKEN, text=text, ids=i, end=end) for text, i in zip(answers, ids, strict=True)]

    return continuations


def test_a_chat_model_writes_question_and_answer(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    script = {"assistant\n": "a blue one", "user\n": "\nwhich kettle?"}
    monkeypatch.setattr("dae.sampling.generation.Writer.continuations", scripted(script, seen))
    rows = rows_of(sample(recipe_for(chat_model, rows=1, batch_size=1)))
    question, reply = {"role": "user", "content": "which kettle?"}, {"role": "assistant", "content": "a blue one"}
    assert rows == [{"messages": [question, reply]}]
    assert seen == [
        "<|im_start|>user\n",
        "<|im_start|>user\nwhich kettle?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_real_chat_model_end_to_end(chat_model: Path) -> None:
    writer = open_writer(checkpoint(chat_model), trust_remote_code=False)
    assert writer.tokenizer.convert_tokens_to_ids("<|im_end|>") in writer.end_ids
    rows = rows_of(sample(recipe_for(chat_model, rows=2, batch_size=256, max_new_tokens=12)))
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
        assert not any("<|" in message["content"] for message in row["messages"])


@pytest.mark.parametrize(
    ("text", "stop", "after", "words", "fault"),
    [
        (" which one? ", END_TOKEN, "<|im_end|>\n<|im_start|>assistant\n", "which one?", None),
        (" which one? ", SPECIAL_TOKEN, "<|im_end|>\n", "which one?", None),
        ("which one? [/INST] a blue one", LENGTH, " [/INST]", "which one?", None),
        ("which one", LENGTH, " [/INST]", None, "no end"),
        ("which one", LENGTH, "", None, "no end"),
        (" [/INST] a blue one", END_TOKEN, " [/INST]", None, "no text"),
        (None, END_TOKEN, " [/INST]", None, "not UTF-8"),
    ],
)
def test_where_an_instruction_ends(
    text: str | None, stop: str, after: str, words: str | None, fault: str | None
) -> None:
    written = Continuation(5, stop, text=text, fault="not UTF-8" if text is None else None)
    assert instruction_of(written, after) == (words, fault)


def test_the_users_opening_is_read_off_the_template() -> None:
    tokenizer = make_tokenizer()
    assert user_opening(chat_format(tokenizer, INST), "m") == ("<s>[INST]", " [/INST]")
    assert user_opening(chat_format(tokenizer, CHATML), "m") == (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    for template in ("{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "nothing of the user's"):
        with pytest.raises(UserError, match=r"m: .*--prompts FILE"):
            user_opening(chat_format(tokenizer, template), "m")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "no prompt"}', ": has no prompt"),
        ('{"prompt": "  "}', ": prompt: "),
        ('{"prompt": 3}', ": messages: "),
        ('{"prompt": "a", "tools": [{"name": "f"}]}', ": tools: "),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}', ": tools: "),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', ": messages: .*user turn"),
        ('{"messages": [{"role": "wizard", "content": "hello"}]}', ": messages.*wizard"),
        ("{", ": .*JSON"),
    ],
)
def test_bad_prompts_name_their_row(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"{path}:2.*{reason}"):
        read_prompts(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match=f"{path}: has no rows"):
        read_prompts(str(path))


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": "a"}], "system": "s", "completion": [{"role": "user"}]}\n'
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
        '{"prompt": "a ", "completion": "b"}\n'
    )
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    assert read_prompts(str(path)) == [[system, user], [user], "a"]


def test_messages_for_a_model_without_a_template_are_refused(model: Path) -> None:
    prompts = model.parent / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "red?"}]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl: .* has no chat template"):
        sample(recipe_for(model, prompts=str(prompts)))


def test_an_adapter_writes_on_its_base(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    writer = open_writer(checkpoint(tmp_path / "adapter"), trust_remote_code=False)
    ids = torch.tensor([[1, 60, 61]])
    with torch.no_grad():
        torch.testing.assert_close(writer.model(ids).logits, adapted.eval()(ids).logits)
    path = sample(recipe_for(tmp_path / "adapter", rows=2))
    settings = json.loads(Path(f"{path}.meta.json").read_text())["settings"]
    assert settings["content of its base"] != settings["content of model"]


@pytest.mark.slow
def test_a_real_model_writes_stories(shared: Path, tmp_path: Path) -> None:
    recipe = SampleRecipe(
        model=str(shared / "models" / "stories260k"), output=str(tmp_path / "rows.jsonl"), rows=16, max_new_tokens=40
    )
    rows = rows_of(sample(recipe))
    words = Counter(word for row in rows for word in row["text"].lower().split())
    assert {"a", "the", "and"} <= words.keys()
    assert sum(row["text"].startswith(("Once upon a time", "One day")) for row in rows) >= 4
