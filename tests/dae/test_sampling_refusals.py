"""What `dae sample` leaves behind where it is refused: nothing that stands in the way of the corrected command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pico import make_checkpoint
from worlds import make_adapter

from dae.sampling.generation import END_TOKEN, Continuation, Writer, open_writer
from dae.sampling.recipe import SampleRecipe
from dae.sampling.sample import IDLE_BATCHES, sample
from kd.errors import UserError
from kd.models.checkpoint import checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def recipe_for(model: Path, **changes: Any) -> SampleRecipe:
    output = model.parent / "out" / "rows.jsonl"
    settings = {"model": str(model), "output": str(output), "rows": 2, "max_new_tokens": 4, "batch_size": 16}
    return SampleRecipe.model_validate(settings | changes)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def test_a_failure_before_the_first_row_leaves_nothing(base: Path) -> None:
    adapter = make_adapter(base.parent / "adapter", base)
    bare = shutil.copytree(base, base.parent / "bare")
    without_tokenizer(bare)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(bare)}))
    before = sorted(base.parent.iterdir())
    with pytest.raises(UserError) as caught:
        sample(recipe_for(adapter))
    told = f"{adapter}: tokenizer not found, nor in its base {bare}: "
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(base.parent.iterdir()) == before
    sample(recipe_for(base))


def test_a_partial_file_without_a_row_is_in_nobodys_way(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Continuation(1, END_TOKEN, fault="no text")
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "continuations", lambda _, prompts, *__: [nothing] * len(prompts))
        with pytest.raises(UserError, match="--prompts FILE"):
            sample(recipe_for(base))
    partial = base.parent / "out" / "rows.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 1 + IDLE_BATCHES
    prompts = base.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "red green"}\n')
    path = sample(recipe_for(base, prompts=str(prompts)))
    assert all("prompt" in json.loads(line) for line in path.read_text().splitlines())
    assert not partial.exists()


def test_batches_without_a_row_are_not_drawn_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, drawn = Continuation(1, END_TOKEN, fault="no text"), []

    def continuations(_: Writer, prompts: Any, *__: Any) -> list[Continuation]:
        drawn.append(len(prompts))
        return [nothing] * len(prompts)

    monkeypatch.setattr(Writer, "continuations", continuations)
    for _ in range(2):
        with pytest.raises(UserError, match="20 batches"):
            sample(recipe_for(base))
    assert len(drawn) == IDLE_BATCHES


def test_an_adapter_without_a_tokenizer_uses_its_bases(base: Path) -> None:
    adapter = make_adapter(base.parent / "adapter", base)
    writer = open_writer(checkpoint(adapter), trust_remote_code=False)
    assert writer.tokenizer.get_vocab() == open_writer(checkpoint(base), trust_remote_code=False).tokenizer.get_vocab()
