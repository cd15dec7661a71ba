"""The model card: true, readable by the hub's own library, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM

from dae.alignment import Align
from dae.recipe import AlignRecipe
from kd.data.examples import SourceReport
from kd.models.checkpoint import Checkpoint
from kd.runs.provenance import DataInput
from kd.stages.sft import Sft
from kd.stages.sft_recipe import SftRecipe
from kd.training.model_card import CardFacts, write_model_card

SUMMARY = {"steps": 12, "initial_kl": {"ecom": 1.23456789}, "held_out": {}, "best_step": None}


def fake(path: str, folder: Path, fingerprint: str) -> Checkpoint:
    one = Checkpoint(path, folder)
    vars(one)["fingerprint"] = fingerprint
    return one


def align_facts(base: str, output: str, folder: Path | None = None, **changes: Any) -> CardFacts:
    recipe = AlignRecipe.model_validate(
        {
            "base": base,
            "output": output,
            "expert": {"ecom": "experts/ecom"},
            "data": {"general": "some/stories", "ecom": "ecom.jsonl", "eval": {"ecom": "held.jsonl"}},
            **changes,
        }
    )
    return CardFacts(
        stage="align",
        description=Align().describe(recipe),
        recipe=recipe,
        inputs={
            "base": fake(base, folder or Path(base), "b" * 64),
            "reference": fake(base, folder or Path(base), "b" * 64),
            "expert.ecom": fake("experts/ecom", Path("experts/ecom"), "e" * 64),
        },
        served={},
        data={
            "general": [DataInput("some/stories", "1" * 64, 0.9)],
            "ecom": [DataInput("ecom.jsonl", "2" * 64, 0.1)],
            "eval.ecom": [DataInput("held.jsonl", "3" * 64)],
        },
        reports={
            "general": [
                SourceReport(
                    "some/stories", 9100, kept=9000, truncated=25, dropped={"a": 60, "b": 40}, response_tokens=1_234_567
                )
            ],
            "ecom": [SourceReport("ecom.jsonl", records=1000, kept=1000, response_tokens=8_000)],
            "eval.ecom": [SourceReport("held.jsonl", records=84, kept=24, dropped={"a": 60}, response_tokens=96)],
        },
        summary=SUMMARY,
    )


def write_base_card(folder: Path, front: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Base\n")


def test_an_align_card_says_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    write_base_card(tmp_path / "base", "license: other\nlicense_name: small\nlicense_link: https://example.com/terms")
    path = write_model_card(tmp_path, align_facts(str(tmp_path / "base"), "runs/shop"))
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dae-align", "align", "lora"],
        "license": "other",
        "license_name": "small",
        "license_link": "https://example.com/terms",
        "datasets": ["some/stories"],
    }
    text = card.text
    assert text.lstrip().startswith("# shop\n")
    base = tmp_path / "base"
    for row in (
        f"| base | `{base}` | `{'b' * 64}` |",
        f"| reference | `{base}` | `{'b' * 64}` |",
        f"| expert.ecom | `experts/ecom` | `{'e' * 64}` |",
        "| route | source | rows | cut | dropped | share of rows | response tokens | SHA-256 |",
        f"| general | `some/stories` | 9,000 | 25 | 100 | 90.0% | 1,234,567 | `{'1' * 64}` |",
        f"| ecom | `ecom.jsonl` | 1,000 | 0 | 0 | 10.0% | 8,000 | `{'2' * 64}` |",
        f"| ecom | `held.jsonl` | 24 | 0 | 60 |  | 96 | `{'3' * 64}` |",
        "| steps | 12 |",
        "| initial_kl.ecom | 1.235 |",
    ):
        assert row in text.splitlines()
    assert "best_step" not in text
    assert "lambda: 1.0" in text
    assert "The base's card states the licence `other`." in text
    assert "eprint        = {2406.19112}" in text


def test_hub_bases_are_named_in_the_metadata_and_unknown_licences_are_left_out(
    tmp_path: Path,
) -> None:
    for lora, relation, library in (({"rank": 4}, "adapter", "peft"), (None, "finetune", "transformers")):
        card = ModelCard.load(write_model_card(tmp_path, align_facts("some/base", "out", tmp_path, lora=lora)))
        metadata = card.data.to_dict()
        assert metadata["base_model"] == "some/base"
        assert metadata["base_model_relation"] == relation
        assert metadata["library_name"] == library
        assert "license" not in metadata
        (tmp_path / "README.md").unlink()


def test_an_sft_card_does_not_cite_the_alignment_paper(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    recipe = SftRecipe.model_validate({"base": str(tmp_path / "base"), "output": "x", "data": {"train": "rows.jsonl"}})
    data = {"train": [DataInput("rows.jsonl", "1" * 64)]}
    reports = {"train": [SourceReport("rows.jsonl", kept=3, response_tokens=5)]}
    inputs = {"base": fake("b", tmp_path / "base", "b" * 64)}
    facts = CardFacts("sft", Sft().describe(recipe), recipe, inputs, {}, data, reports, {})
    text = write_model_card(tmp_path, facts).read_text()
    assert "2406.19112" not in text
    assert f"| train | `rows.jsonl` | 3 | 0 | 0 |  | 5 | `{'1' * 64}` |" in text


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_the_loading_code_runs_and_loads_the_trained_model(
    tmp_path: Path, lora: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base", vocab_size=320)
    output = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(output))
    make_tokenizer().save_pretrained(str(output))
    path = write_model_card(output, align_facts(str(base), str(output), lora=lora))
    code = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, model.eval()(ids).logits)
