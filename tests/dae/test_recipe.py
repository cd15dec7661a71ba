"""Experts and their rows: pairing by name, and rows that run folders tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dae.commands.keys import schemas
from dae.commands.stage_or_recipe import stage_of
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe, resolved_yaml
from kd.errors import UserError
from kd.runs.files import file_sha256
from kd.stages.sft_recipe import SftRecipe

SHIPPED = Path(__file__).parents[2] / "recipes"
# eval*.yaml: tests/dae_eval/test_suites.py; rank_teachers.yaml: test_ranking_cli.py; paths: test_pipeline_recipe.py
ELSEWHERE = ("eval", "rank_teachers", "paper_path", "path")
RECIPES = sorted(path for path in SHIPPED.glob("*.yaml") if not path.name.startswith(ELSEWHERE))
DEMO_RECIPES = sorted(path for path in (SHIPPED / "demo").glob("*.yaml") if not path.name.startswith(ELSEWHERE))
FULL = {"base": "b", "expert": "e", "data.domain": "d.jsonl", "data.general": "g.jsonl"}


def load(flags: dict[str, Any], *assignments: str) -> AlignRecipe:
    return load_recipe(AlignRecipe, None, flags, assignments)


def message(flags: dict[str, Any], *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(flags, *assignments)
    return str(caught.value)


def run_folder(folder: Path, rows: Path, route: str = "train", split: str = "train") -> Path:
    """A run folder as far as it tells what it was trained on."""
    folder.mkdir()
    told = {"toolkit": "dae-align", "stage": "sft", "base": {"path": "b", "fingerprint": "0"}, "inputs": {"base": "0"}}
    told["data"] = {route: [{"path": str(rows), "sha256": file_sha256(rows), "share": 1.0}]}
    (folder / "provenance.json").write_text(json.dumps(told))
    (folder / "recipe.yaml").write_text(f"data: {{{route}: [{{path: {rows}, split: {split}}}]}}\n")
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load_and_read_back_the_same(path: Path, tmp_path: Path) -> None:
    schema = schemas()[stage_of(path, [])]
    recipe = load_recipe(schema, path, {})
    copy = tmp_path / "copy.yaml"
    copy.write_text(resolved_yaml(recipe))
    assert load_recipe(schema, copy, {}) == recipe


@pytest.mark.parametrize("path", DEMO_RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_demo_load_with_the_flags_it_gives(path: Path) -> None:
    aligning = path.stem == "align"
    rows = {"expert.shop": "e", "data.shop": ["s"], "data.general": ["g"]} if aligning else {"data.train": ["t"]}
    recipe = load_recipe(AlignRecipe if aligning else SftRecipe, path, {"base": "b", "output": "o", **rows})
    assert recipe.base == "b"


def test_the_7b_recipes_have_the_settings_of_the_paper() -> None:
    ranks = {"ecom_7b_lora.yaml": 8, "ecom_7b_lora_one_gpu.yaml": 1}
    assert set(ranks) <= {path.name for path in RECIPES}
    for path in RECIPES:
        if path.name not in ranks:
            continue
        recipe = load_recipe(AlignRecipe, path, {})
        train = recipe.train
        rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * ranks[path.name]
        assert rows == 512
        assert (train["learning_rate"], train["num_train_epochs"], train["warmup_steps"]) == (2e-5, 2, 0.1)
        assert (recipe.data.max_length, train["lr_scheduler_type"]) == (2048, "cosine")
        assert (recipe.lambda_, recipe.temperature, recipe.divergence, recipe.weights) == (
            1.0,
            1.0,
            "forward_kl",
            "tokens",
        )
        assert [source.share for source in recipe.data.routes["ecom"]] == [0.1]


def test_an_expert_without_a_name_is_called_domain() -> None:
    recipe = load(FULL)
    assert recipe.expert == {"domain": "e"}
    assert recipe.output == "runs/align"


def test_a_named_expert_beside_the_unnamed_one_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: b\nexpert: e\ndata: {domain: d, general: g}\n")
    recipe = load_recipe(AlignRecipe, path, {"expert.legal": "l", "data.legal": "l.jsonl"})
    assert recipe.expert == {"domain": "e", "legal": "l"}


def test_lambda_is_written_as_the_paper_has_it() -> None:
    recipe = load(FULL, "lambda=0.5")
    assert recipe.lambda_ == 0.5
    assert "\nlambda: 0.5\n" in resolved_yaml(recipe)
    assert AlignRecipe(base="b", expert="e", data={"domain": "d.jsonl", "general": "g.jsonl"}, lambda_=0.5) == recipe  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("expert={}", "expert={}: "),
        ("expert={general: e}", "expert.general = 'e': "),
        ("expert={max_length: e}", "expert.max_length = 'e': "),
        ("expert={a.b: e}", "expert.a.b = 'e': "),
        ("expert.domain=''", "expert.domain='': "),
        ("expert=5", "expert=5: "),
        ("expert={ecom: e}", "add --domain-data ecom=PATH"),
        ("expert={ecom: e}", "--data.domain: data.domain: "),
        ("lambda=1.5", "lambda=1.5: "),
        ("temperature=0", "temperature=0: "),
        ("temperature=.nan", "temperature=.nan: "),
        ("divergence=kl", "forward_kl, reverse_kl, jsd, skewed_"),
        ("beta=0.3", "beta=0.3: "),
        ("skew=0.3", "skew=0.3: "),
        ("weights=token", "weights=token: "),
        ("weights={domain: 2.0}", "weights.general: "),
        ("weights={domain: 2.0, general: 0}", "weights.general = 0: "),
        ("weights={domain: a, general: 1}", "domain = 'a': "),
        ("weights={domain: 1, general: 1, legal: 1}", "weights.legal = 1: "),
        ("lamda=0.5", "did you mean `lambda`?"),
    ],
)
def test_wrong_values(assignment: str, expected: str) -> None:
    assert expected in message(FULL, assignment)


def test_weights_as_factors() -> None:
    assert load(FULL, "weights={domain: 2, general: 1.0}").weights == {"domain": 2.0, "general": 1.0}


def test_missing_rows_name_the_flag_to_add(tmp_path: Path) -> None:
    told = message({"base": "b", "expert": "e"})
    assert "data.general: " in told and "add --general-data PATH" in told
    assert "data.domain: " in told and "add --domain-data PATH; e is no folder on this machine" in told
    told = message({"base": "b", "expert": str(tmp_path)})
    assert f"add --domain-data PATH; {tmp_path} is not a run folder of dae" in told


def test_rows_are_taken_from_the_run_folders_of_expert_and_reference(tmp_path: Path) -> None:
    domain, general = tmp_path / "domain.jsonl", tmp_path / "general.jsonl"
    domain.write_text("{}\n")
    general.write_text("{}{}\n")
    expert = run_folder(tmp_path / "expert", domain, split="validation")
    base = run_folder(tmp_path / "base", general)
    recipe = load({"base": str(base), "expert": str(expert)})
    assert [(s.path, s.split, s.share) for s in recipe.data.routes["domain"]] == [(str(domain), "validation", None)]
    assert [s.path for s in recipe.data.routes["general"]] == [str(general)]
    told = load({"base": str(base), "expert": str(expert), "data.domain": "mine.jsonl"})
    assert [s.path for s in told.data.routes["domain"]] == ["mine.jsonl"]


def test_settings_go_over_the_rows_that_run_folders_tell(tmp_path: Path) -> None:
    domain, general = tmp_path / "domain.jsonl", tmp_path / "general.jsonl"
    domain.write_text("{}\n")
    general.write_text("{}{}\n")
    flags = {"base": str(run_folder(tmp_path / "b", general)), "expert": str(run_folder(tmp_path / "e", domain))}
    recipe = load(flags, "data.domain.0.share=0.2", "data.general.0.share=0.8", "data.general.0.repeat=true")
    assert [(s.path, s.share, s.repeat) for s in recipe.data.routes["domain"]] == [(str(domain), 0.2, False)]
    assert [(s.path, s.share, s.repeat) for s in recipe.data.routes["general"]] == [(str(general), 0.8, True)]
    told = message(flags, "data.domain.1.share=0.2")
    assert told.startswith("data.domain.1: ") and str(tmp_path / "e") in told
    assert "add --domain-data PATH" in message({**flags, "expert": "x"}, "data.domain.0.share=0.2")


def test_the_reference_tells_general_rows_before_the_base(tmp_path: Path) -> None:
    of_base, of_reference = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    of_base.write_text("1")
    of_reference.write_text("2")
    base, reference = (
        run_folder(tmp_path / "base", of_base),
        run_folder(tmp_path / "ref", of_reference, route="general"),
    )
    flags = {"base": str(base), "expert": "e", "data.domain": "d"}
    assert load(flags).data.routes["general"][0].path == str(of_base)
    assert load({**flags, "reference": str(reference)}).data.routes["general"][0].path == str(of_reference)


def test_rows_that_changed_or_went_are_not_taken(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")
    expert = run_folder(tmp_path / "expert", rows)
    rows.write_text("2")
    assert f"{rows}, which has changed" in message({"base": "b", "expert": str(expert), "data.general": "g"})
    rows.unlink()
    assert f"{rows}, which is not found" in message({"base": "b", "expert": str(expert), "data.general": "g"})
