"""`dae sample`: the model's own distribution, text that reads back, and the same rows wherever it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import make_checkpoint, make_tokenizer
from scipy.stats import chisquare
from transformers import GenerationConfig

import dae.sampling.sample
from dae.sampling.generation import (
    END_TOKEN,
    LENGTH,
    SPECIAL_TOKEN,
    Continuation,
    derived_seed,
    open_writer,
)
from dae.sampling.recipe import SampleRecipe
from dae.sampling.sample import SampleFile, sample
from kd.data.batches import left_padded
from kd.errors import UserError
from kd.models.checkpoint import checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def recipe_for(model: Path, **changes: Any) -> SampleRecipe:
    settings = {"model": str(model), "output": str(model.parent / "out" / "rows.jsonl"), "rows": 10}
    return SampleRecipe.model_validate(settings | {"max_new_tokens": 6, "batch_size": 16} | changes)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the distribution --------------------------------------------------------------------------------------------------


def test_first_tokens_follow_the_models_own_distribution_whatever_its_generation_config_says(model: Path) -> None:
    narrow = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.1, repetition_penalty=5.0, eos_token_id=2
    )
    narrow.save_pretrained(model)
    writer = open_writer(checkpoint(model), trust_remote_code=False)
    prompt = [1, 60, 61]
    with torch.no_grad():
        probabilities_V = writer.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    draws = 8000
    # _generate: texts cannot be counted, for a lone byte of a longer character is none.
    counts_V = torch.bincount(
        torch.tensor([ids[0] for ids in writer._generate([prompt] * draws, 1, 1.0, seed=3)]), minlength=288
    ).double()
    frequent = probabilities_V * draws >= 5
    assert frequent.sum() > 20
    observed = [*counts_V[frequent].tolist(), float(counts_V[~frequent].sum())]
    expected = [*(probabilities_V[frequent] * draws).tolist(), float(probabilities_V[~frequent].sum() * draws)]
    assert chisquare(observed, expected).pvalue > 1e-3


def test_temperature_and_left_padding(model: Path) -> None:
    """Nearly greedy continuations of prompts of different lengths are those of each prompt alone."""
    writer = open_writer(checkpoint(model), trust_remote_code=False)
    prompts = [[1, 60], [1, 61, 62, 63, 64, 65], [1, 70, 71]]
    together = writer._generate(prompts, 6, 1e-4, seed=0)
    for prompt, written in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(len(written)):
                ids.append(int(writer.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert written == ids[len(prompt) :]


def test_left_padding_puts_prompts_at_the_right_end() -> None:
    input_ids, attention_mask = left_padded([[5], [6, 7, 8]])
    assert input_ids[attention_mask.bool()].tolist() == [5, 6, 7, 8]
    assert attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_global_random_state_is_left_alone(model: Path) -> None:
    writer = open_writer(checkpoint(model), trust_remote_code=False)
    before = torch.random.get_rng_state()
    writer.continuations([[1]], 3, 1.0, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_derived_seeds_differ_and_fit_torch() -> None:
    seeds = {derived_seed(seed, batch, phase) for seed in range(5) for batch in range(50) for phase in range(2)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_rows_are_text_without_special_tokens_that_reads_back(model: Path) -> None:
    path = sample(recipe_for(model, rows=40))
    rows = rows_of(path)
    assert len(rows) == 40
    tokenizer = make_tokenizer()
    for row in rows:
        assert row.keys() - {"finish_reason"} == {"text"}
        assert row["text"].strip()
        assert "\ufffd" not in row["text"]
        ids = tokenizer(row["text"], add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == row["text"]
        assert not set(ids) & set(tokenizer.all_special_ids)
    facts = json.loads((path.parent / "rows.jsonl.meta.json").read_text())
    assert sum(facts["stopped by"].values()) == 40
    assert facts["settings"]["model"] == str(model)
    # A random byte-level model writes much that is no UTF-8: it is counted, not written.
    assert facts["gave no row"]["not UTF-8"] > 0


@pytest.mark.parametrize(
    ("ids", "text", "fault", "stop"),
    [
        ("red green", "red green", None, LENGTH),
        ("red</s>", "red", None, END_TOKEN),
        ("red<s>", "red", None, SPECIAL_TOKEN),
        ("red \n", "red", None, LENGTH),
        ("red \n</s>", "red \n", None, END_TOKEN),
        ("red</s>blue<pad>", "red", None, END_TOKEN),
        ("</s>", None, "no text", END_TOKEN),
        (" \n</s>", None, "no text", END_TOKEN),
        (b"caf\xc3", "caf", None, LENGTH),
        (b"caf\xc3</s>", None, "not UTF-8", END_TOKEN),
        (b"\xff red", None, "not UTF-8", LENGTH),
        (b"< / s >", "< / s >", None, LENGTH),
        (list("</s>"), None, "spells a special token", LENGTH),
    ],
)
def test_what_becomes_text_and_what_does_not(
    model: Path, ids: Any, text: str | None, fault: str | None, stop: str
) -> None:
    writer = open_writer(checkpoint(model), trust_remote_code=False)
    tokenizer = writer.tokenizer
    if isinstance(ids, str):
        written = tokenizer(ids, add_special_tokens=False).input_ids
    elif isinstance(ids, bytes):
        ended = ids.endswith(b"</s>")
        byte_ids = make_byte_ids(ids.removesuffix(b"</s>"))
        written = byte_ids + [2] * ended
    else:
        written = [tokenizer.convert_tokens_to_ids(character) for character in ids]
    written = writer._up_to_special(written)
    found = writer._as_text([1], written)
    assert (found.tokens, found.stop, found.text, found.fault) == (len(written), stop, text, fault)
    assert found.end == (2 if stop == END_TOKEN and fault is None else None)
    assert tokenizer.decode(found.ids) == (text or "")
    assert list(found.ids) == written[: len(found.ids)]


def make_byte_ids(data: bytes) -> list[int]:
    """The tokens of single bytes, in the byte-level alphabet of GPT-2."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer, alphabet = make_tokenizer(), bytes_to_unicode()
    return [tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in data]


def test_the_context_caps_the_length_and_full_prompts_give_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=8)
    writer = open_writer(checkpoint(folder), trust_remote_code=False)
    short, full = writer.continuations([[1, 60, 61], [1] * 8], 100, 1.0, seed=0)
    assert short.tokens <= 5
    assert full == Continuation(0, LENGTH, fault="no room in the context")
    assert writer.continuations([[1] * 9], 100, 1.0, seed=0)[0].fault == "no room in the context"


# -- going on after a stop ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def test_a_stop_after_any_batch_changes_no_row(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(recipe_for(model, rows=25, output=str(model.parent / "whole.jsonl"))).read_text()
    recipe = recipe_for(model, rows=25)
    partial = Path(recipe.output + ".partial")
    append = SampleFile.append

    def append_and_die(self: SampleFile, batch: Any) -> None:
        append(self, batch)
        with self.partial.open("a") as file:
            file.write('{"rows": [{"text": "to')  # the next batch, torn
        raise Killed

    stops = 0
    while not Path(recipe.output).exists():
        assert len(partial.read_text().splitlines()) == stops + 2 if stops else not partial.exists()
        monkeypatch.setattr(SampleFile, "append", append_and_die)
        try:
            sample(recipe)
        except Killed:
            stops += 1
        if stops >= 3:
            monkeypatch.setattr(SampleFile, "append", append)
            sample(recipe)
    assert stops == 3
    assert Path(recipe.output).read_text() == expected
    assert sorted(entry.name for entry in Path(recipe.output).parent.iterdir()) == [
        "rows.jsonl",
        "rows.jsonl.meta.json",
    ]


@pytest.mark.parametrize("after", ["rows.jsonl", "rows.jsonl.meta.json"])
def test_a_stop_while_finishing_is_made_good(model: Path, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(model)
    write = dae.sampling.sample.write_text_durably

    def write_and_die(path: Path, text: str) -> None:
        write(path, text)
        if path.name == after:
            raise Killed

    monkeypatch.setattr(dae.sampling.sample, "write_text_durably", write_and_die)
    with pytest.raises(Killed):
        sample(recipe)
    before = Path(recipe.output).read_text()
    monkeypatch.setattr(dae.sampling.sample, "write_text_durably", write)
    assert sample(recipe).read_text() == before
    assert not Path(recipe.output + ".partial").exists()


def test_a_finished_file_is_left_alone_without_opening_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample(recipe_for(model))
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(dae.sampling.sample, "open_writer", lambda *_: pytest.fail("the model was opened"))
    assert sample(recipe_for(model)) == path
    assert path.stat().st_mtime_ns == before
    path.write_text("other rows\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: .*rows\.jsonl\.meta\.json"):
        sample(recipe_for(model))


def test_seeds_and_batches_give_different_rows(model: Path) -> None:
    rows = [row["text"] for row in rows_of(sample(recipe_for(model, rows=20, max_new_tokens=4)))]
    assert Counter(rows).most_common(1)[0][1] <= 2
    others = [
        row["text"]
        for row in rows_of(sample(recipe_for(model, rows=20, max_new_tokens=4, seed=1, output=str(model / "2.jsonl"))))
    ]
    assert rows != others


def test_a_model_that_writes_nothing_is_told_instead_of_waited_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Continuation(1, END_TOKEN, fault="no text")
    monkeypatch.setattr(
        "dae.sampling.generation.Writer.continuations", lambda _, prompts, *__: [nothing] * len(prompts)
    )
    with pytest.raises(UserError, match=r"20 batches .*\(no text: 320\).*--prompts FILE"):
        sample(recipe_for(model))
