"""Tokens that were added to one tokenizer of two: harmless where no row needs them, else told with what helps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pico import make_checkpoint, make_model, make_tokenizer
from processes import dae
from transformers import AddedToken, PreTrainedTokenizerFast
from worlds import align_command, make_world

from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.compatibility import check_tokenizers


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int = 288) -> str:
    make_model(vocab_size=rows, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_pad() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == 289
    return tokenizer


def test_a_teacher_with_a_padding_token_of_its_own_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, teacher = str(make_checkpoint(tmp_path / "base")), with_tokenizer(tmp_path / "teacher", with_pad())
    with caplog.at_level(logging.WARNING, logger="dae"):
        check_tokenizers(checkpoint(base), {"expert": checkpoint(teacher)})
    (record,) = caplog.records
    assert f"expert {teacher}: its tokenizer has tokens that {base} lacks ('[PAD]')" in record.getMessage()


def test_a_base_with_a_padding_token_of_its_own(tmp_path: Path) -> None:
    base, teacher = with_tokenizer(tmp_path / "base", with_pad()), str(make_checkpoint(tmp_path / "teacher"))
    check_tokenizers(checkpoint(base), {"expert": checkpoint(teacher)})


def test_other_tokens_that_a_teacher_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    base, teacher = with_tokenizer(tmp_path / "base", tokenizer), str(make_checkpoint(tmp_path / "teacher"))
    told = r"288 tokens against 290; it lacks '<\|im_end\|>', '<\|im_start\|>'.*before these tokens were added"
    with pytest.raises(UserError, match=told):
        check_tokenizers(checkpoint(base), {"expert": checkpoint(teacher)})


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = str(make_checkpoint(tmp_path / "base"))
    teacher = with_tokenizer(tmp_path / "teacher", make_tokenizer(300))
    with pytest.raises(UserError, match=r"A teacher must share the student's tokenizer.*dae distill"):
        check_tokenizers(checkpoint(base), {"expert": checkpoint(teacher)})


@pytest.mark.parametrize("rows", [288, 289, 320])
def test_an_expert_with_a_padding_token_of_its_own_teaches(rows: int, tmp_path: Path) -> None:
    """Not resized, resized by one, and to a multiple of 64 or so."""
    world = make_world(tmp_path / "world")
    with_tokenizer(world / "full", with_pad(), rows)
    command = [word.replace("expert", "full") if word == "expert" else word for word in align_command()]
    ended = dae([*command, "train.max_steps=1"], world, proof=False)
    assert ended.status == 0, ended.err
    assert ended.err.count("[PAD]") == 1
    (world / "r.yaml").write_text(
        "base: base\nexpert: full\noutput: other\ndata: {general: general.jsonl, domain: shop.jsonl}\n"
    )
    assert dae(["check", "r.yaml"], world).status == 0


def test_an_adapter_with_a_padding_token_of_its_own_teaches(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    with_pad().save_pretrained(world / "expert")
    ended = dae([*align_command(), "train.max_steps=1"], world, proof=False)
    assert ended.status == 0, ended.err
    assert ended.err.count("[PAD]") == 1
