"""The audit of tokenizers: text that vanishes in silence, and classes of transformers 5 that make it vanish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_tokenizers import KINDS, words_only
from lossy_tokenizers import bpe, unigram, write_tokenizer
from pico import make_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, CTRLTokenizer, PreTrainedTokenizerFast

from kd.data.tokenizer_audit import TokenizerAudit, audit, refuse_lossy
from kd.errors import UserError

TEXTS = ["Fish & chips cost nine coins.", "how big is it?", "two cups & nine coins", "answer: two"]


def audited(folder: Path, texts: list[str]) -> TokenizerAudit:
    return audit(AutoTokenizer.from_pretrained(str(folder)), folder, texts)


@pytest.mark.parametrize(
    ("core", "tokenizer_class"),
    [(bpe, "LlamaTokenizer"), (bpe, "LlamaTokenizerFast"), (unigram, "LlamaTokenizer"), (unigram, "T5Tokenizer")],
)
def test_a_rebuilt_tokenizer_that_drops_characters_is_found_and_the_remedy_cures_it(
    tmp_path: Path, core: object, tokenizer_class: str
) -> None:
    assert callable(core)
    folder = write_tokenizer(tmp_path / "model", core(), tokenizer_class)
    opened = AutoTokenizer.from_pretrained(str(folder))
    ids = opened("Fish & chips", add_special_tokens=False).input_ids
    assert opened.unk_token_id not in ids and "&" not in opened.decode(ids)  # the fault itself

    found = audited(folder, TEXTS)
    assert (found.texts, found.lossy, found.lossy_as_is, found.with_unk) == (4, 2, 0, 0)
    assert found.lost == (("&", 2),)
    with pytest.raises(UserError) as refused:
        refuse_lossy(found, "model", allowed=False)
    for part in (
        f"model: its tokenizer, opened as {tokenizer_class.removesuffix('Fast')}",
        "in 2 of 4 texts looked at (50.0 %): & (2)",
        'set "tokenizer_class": "TokenizersBackend" in its tokenizer_config.json',
        "data.allow_lossy_tokenizer=true",
    ):
        assert part in str(refused.value)
    refuse_lossy(found, "model", allowed=True)

    for remedy in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        cured = audited(write_tokenizer(folder, core(), remedy), TEXTS)
        assert (cured.lossy, cured.differing, cured.with_unk, cured.unknown) == (0, 0, 2, (("&", 2),))
        with pytest.raises(UserError, match=r"2 of 4 texts looked at .* unknown token: & \(2\); replace them"):
            refuse_lossy(cured, "model", allowed=False)
        (line,) = cured.lines("model")
        assert line.startswith("model: 2 of 4 texts looked at hold characters") and line.endswith(
            "unknown token: & (2)"
        )


def test_words_that_run_together_are_a_loss(tmp_path: Path) -> None:
    found = audited(write_tokenizer(tmp_path / "model", bpe(), "GPT2Tokenizer"), ["two cups", "nine"])
    assert (found.lossy, found.lost) == (1, ((" ", 1),))
    assert "space (1)" in str(found.loss("model"))


def test_a_class_that_the_model_type_forces_has_another_remedy(tmp_path: Path) -> None:
    found = audited(write_tokenizer(tmp_path / "model", bpe(), "TokenizersBackend", "qwen2"), TEXTS)
    assert found.lossy and not found.as_is_helps
    assert "opens this model's type as Qwen2Tokenizer whatever tokenizer_config.json says" in str(found.loss("model"))


def test_other_tokens_than_tokenizer_json_gives_are_told_but_are_no_loss(tmp_path: Path) -> None:
    found = audited(write_tokenizer(tmp_path / "model", bpe(), "GemmaTokenizer"), ["two cups", "nine coins"])
    assert (found.lossy, found.differing) == (0, 2)
    assert "cuts 2 of 2 texts looked at into other tokens" in str(found.loss("model"))
    refuse_lossy(found, "model", allowed=False)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_that_keep_everything_pass(kind: str, tmp_path: Path) -> None:
    texts = ["  Fish & chips\n\n\tcost 9.50 €", "naïve 价格 🙂", "a </s> b", ""]
    assert audit(KINDS[kind], tmp_path, texts).lines("model") == []


def test_a_tokenizer_that_drops_white_space_only_passes(tmp_path: Path) -> None:
    assert audit(words_only(), tmp_path, ["Question:  red?\n assistant:"]).lines("model") == []


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Lowercase(), "Two CUPS"),
        (normalizers.NFKC(), "ｔｗｏ cups"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "twó cups"),
        (normalizers.Replace("\N{ZERO WIDTH SPACE}", ""), "two\N{ZERO WIDTH SPACE} cups"),
    ],
)
def test_what_a_normaliser_changes_is_no_loss(normalizer: object, text: str, tmp_path: Path) -> None:
    core = make_tokenizer().backend_tokenizer
    core.normalizer = normalizer
    found = audit(PreTrainedTokenizerFast(tokenizer_object=core), tmp_path, [text, "two cups"])
    assert (found.lossy, found.changed, found.with_unk) == (0, 1, 0)
    assert found.lines("model") == ["model: 1 of 2 texts looked at are changed by the tokenizer's normaliser"]


def test_a_loss_beside_a_normaliser_is_told_apart(tmp_path: Path) -> None:
    core = bpe()
    core.normalizer = normalizers.Lowercase()
    core.model.unk_token = None
    found = audit(PreTrainedTokenizerFast(tokenizer_object=core), tmp_path, ["TWO & two", "TWO"])
    assert (found.lossy, found.changed, found.lost) == (1, 2, (("&", 1),))


def test_a_loss_in_one_text_of_a_hundred_is_told_but_not_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", bpe(), "LlamaTokenizer")
    few = audited(folder, ["Fish & chips", *["two cups"] * 99])
    assert few.lossy == 1 and "1 of 100" in few.lines("model")[0]
    refuse_lossy(few, "model", allowed=False)


def test_texts_are_taken_from_all_over_the_rows(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", bpe(), "LlamaTokenizer")
    found = audited(folder, [*["two cups"] * 2500, *["Fish & chips"] * 500])
    assert found.texts == 1000
    assert 0.15 < found.lossy / found.texts < 0.18


def test_a_tokenizer_made_from_sentencepiece_passes(shared: Path) -> None:
    folder = shared / "tokenizers" / "mistral-v1"
    found = audit(AutoTokenizer.from_pretrained(str(folder)), folder, ["Fish & chips", "价格 🙂"])
    assert (found.texts, found.lossy, found.lines("model")) == (2, 0, [])


def test_a_tokenizer_without_offsets_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"two": 0, "cups": 1, "<unk>": 2, "o": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt w\ntw o</w>\nc u\np s</w>\ncu ps</w>\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert not tokenizer.is_fast
    found = audit(tokenizer, tmp_path, ["two cups", "two &"])
    assert (found.texts, found.lossy, found.with_unk, found.unknown) == (2, 0, 1, (("&", 1),))
