"""Recipes: layers, exact types, every mistake told at once with place and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kd.config import training_arguments
from kd.config.data_recipe import DataRecipe, SourceRecipe, default_shares
from kd.config.key_docs import key_docs
from kd.config.loading import load_recipe, resolved_yaml
from kd.config.stage_recipe import LoraRecipe
from kd.config.training_arguments import argument_types, training_argument_problems
from kd.errors import UserError
from kd.stages.sft_recipe import SftRecipe

MINIMAL = "base: ckpt\noutput: run\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str, *assignments: str, **flags: Any) -> SftRecipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(
            SftRecipe, path, {key.replace("__", "."): value for key, value in flags.items()}, assignments
        )

    return load_text


def message(load: Any, *arguments: Any, **flags: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **flags)
    return str(caught.value)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_yaml_gives_way_to_flags_and_flags_to_assignments(load: Any) -> None:
    text = MINIMAL + "seed: 1\n"
    assert load(text).seed == 1
    assert load(text, seed=2).seed == 2
    assert load(text, "seed=3", seed=2).seed == 3
    assert load(text, seed=None).seed == 1


def test_a_recipe_needs_no_file() -> None:
    recipe = load_recipe(SftRecipe, None, {"base": "b", "output": "o", "data.train": ["x.jsonl", "y.jsonl"]})
    assert [source.path for source in recipe.data.routes["train"]] == ["x.jsonl", "y.jsonl"]


def test_a_flag_for_rows_replaces_those_of_the_file(load: Any) -> None:
    recipe = load(MINIMAL, data__train=["other.jsonl"])
    assert recipe.data.routes == {"train": (SourceRecipe(path="other.jsonl"),)}


@pytest.mark.parametrize(
    "written",
    ["rows.jsonl", "{path: rows.jsonl}", "[rows.jsonl]", "[{path: rows.jsonl}]"],
)
def test_all_forms_of_a_source_mean_the_same(load: Any, written: str) -> None:
    recipe = load(f"base: b\noutput: o\ndata: {{train: {written}}}\n")
    assert recipe.data.routes == {"train": (SourceRecipe(path="rows.jsonl"),)}


def test_dotted_keys_reach_into_lists_and_short_forms(load: Any) -> None:
    recipe = load(MINIMAL, "data.train.0.repeat=true", "data.max_length=64", "lora.rank=4", "train.report_to=[none]")
    assert recipe.data.routes["train"][0] == SourceRecipe(path="rows.jsonl", repeat=True)
    assert (recipe.data.max_length, recipe.lora.rank, recipe.train) == (64, 4, {"report_to": ["none"]})


def test_lora_null_trains_all_weights_and_can_be_taken_back(load: Any) -> None:
    assert load(MINIMAL).lora == LoraRecipe()
    assert load(MINIMAL + "lora: null\n").lora is None
    assert load(MINIMAL, "lora=null").lora is None
    assert load(MINIMAL + "lora: null\n", "lora.rank=4").lora == LoraRecipe(rank=4)


@pytest.mark.parametrize(
    ("written", "value"), [("2e-5", 2e-5), ("1E+2", 100.0), (".5", 0.5), ("3", 3), ("1_000", 1000)]
)
def test_numbers_are_read_as_people_write_them(load: Any, written: str, value: float) -> None:
    assert load(MINIMAL + f"train: {{learning_rate: {written}}}\n").train["learning_rate"] == value
    assert load(MINIMAL, f"train.learning_rate={written}").train["learning_rate"] == value


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(load: Any) -> None:
    assert load(MINIMAL, "train.save_strategy=no").train == {"save_strategy": "no"}
    assert load(MINIMAL + "attn_implementation: on\n").attn_implementation == "on"


# -- round trip --------------------------------------------------------------------------------------------------------


def test_a_resolved_recipe_reads_back_the_same(load: Any) -> None:
    recipe = load(
        "base: '2e-5'\noutput: 'no'\ndata:\n  train: [{path: ü.jsonl, share: 0.25}, {path: b, share: 0.75}]\n"
        "  eval: {train: '007'}\nlora: {target_modules: [q_proj, v_proj]}\ntrain: {learning_rate: 2e-5}\n"
    )
    text = resolved_yaml(recipe)
    assert load(text) == recipe
    assert resolved_yaml(load(text)) == text


@given(
    st.builds(
        SftRecipe,
        base=st.text(min_size=1, alphabet=st.characters(codec="utf-8", exclude_categories=("C", "Z"))),
        output=st.sampled_from(["true", "1.0", "1e3", "null", "~", "[", "0x1f", "2020-01-01", "a: b", "#", "-"]),
        seed=st.integers(0, 2**32 - 1),
        data=st.builds(
            DataRecipe,
            max_length=st.integers(2, 10**9),
            append_eos=st.none() | st.booleans(),
            routes=st.just({"train": (SourceRecipe(path="a", split="1"),)}),
        ),
        lora=st.none()
        | st.builds(LoraRecipe, dropout=st.floats(0, 0.99, allow_subnormal=False), alpha=st.floats(1e-9, 1e9)),
        dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    )
)
def test_any_resolved_recipe_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, recipe: SftRecipe) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(resolved_yaml(recipe), encoding="utf-8")
    assert load_recipe(SftRecipe, path, {}) == recipe


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_with_their_places(load: Any) -> None:
    text = (
        "bse: x\n"
        "output: run\n"
        "lora:\n"
        "  rank: abc\n"
        "data:\n"
        "  max_lenght: 5\n"
        "  train: [{path: a, share: 0.5}, {path: b, share: 0.4}]\n"
        "dtype: bf16\n"
    )
    told = message(load, text, "seed=-1", "lora.alpha=x", output="")
    assert told.startswith("9 problems in the recipe:\n")
    for line in (
        "recipe.yaml:1: bse = 'x': unknown key; did you mean `base`?",
        "recipe.yaml: base: is missing",
        "--output: output = '': must not be empty",
        "recipe.yaml:4: lora.rank = 'abc': expected an integer",
        "recipe.yaml:6: data.max_lenght = 5: unknown key; did you mean `max_length`?",
        "recipe.yaml:7: data.train.0.share = 0.5: the shares sum to 0.9, not 1",
        "recipe.yaml:8: dtype = 'bf16': expected auto, float32 or bfloat16; did you mean `bfloat16`?",
        "seed=-1: must be at least 0",
    ):
        assert line in told
    assert "lora.alpha=x: expected a number" in told
    assert "pydantic" not in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "recipe.yaml:1: a recipe is `key: value` pairs, this is a list"),
        ("just words\n", "recipe.yaml:1: a recipe is `key: value` pairs, this is one value"),
        ("base: [a\noutput: b\n", "recipe.yaml:2: is not valid YAML"),
        ("base: a\n\tseed: 1\n", "recipe.yaml:2: is not valid YAML"),
        (MINIMAL + "seed: 1\nseed: 2\n", "recipe.yaml:5: seed: duplicate key on lines 4 and 5: remove one"),
        (MINIMAL + "1: 2\n", "recipe.yaml:4: 1: a key is text"),
        ("base: !!python/object:os.system x\n", "is not valid YAML"),
        ("a: &a [*a]\n", "an alias in this file contains itself"),
    ],
)
def test_files_that_are_no_recipe(load: Any, text: str, expected: str) -> None:
    assert expected in message(load, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"base: caf\xe9\n")
    for path, expected in [
        (tmp_path / "none.yaml", "recipe file not found"),
        (tmp_path, "is a folder"),
        (tmp_path / "latin.yaml", "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=expected):
            load_recipe(SftRecipe, path, {})


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("rank", "`rank`: is neither a flag nor key=value"),
        ("=3", "`=3`: is neither a flag nor key=value"),
        ("seed=[1", "seed=[1: cannot be read as a YAML value"),
        ("data.train.3.path=x", "data.train.3.path=x: `3` is no place in a list of 1"),
        ("merge=yes", "merge=yes: expected true or false"),
        ("seed=1.5", "seed=1.5: expected an integer"),
        ("seed=true", "seed=true: expected an integer"),
        ("base=7", "base=7: expected text: put it in quotes"),
        ("lora={rank: 4, rank: 8}", "lora={rank: 4, rank: 8}: lora.rank: duplicate key: remove one"),
        ("data.train=5", "data.train=5: expected a list"),
        ("lora=[1]", "expected a mapping"),
        ("lora.target_modules=[]", "expected all-linear, a regular expression, or a list of module names"),
        ("data.other=x.jsonl", "data.other=x.jsonl: unknown key or route; the routes are train"),
        ("data.chat_templat=plain", "did you mean `chat_template`?"),
        ("data.eval.trian=x", "unknown route; the routes are train; did you mean `train`?"),
        ("rank=8", "rank=8: belongs elsewhere: write `lora.rank`"),
        ("learning_rate=1e-4", "belongs elsewhere: write `train.learning_rate`"),
        ("early_stopping_patience=3", "needs an eval set: add `data.eval`"),
        ("train.eval_strategy=steps", "needs an eval set: add `data.eval`"),
        ("train.max_steps=0", "must be at least 1"),
        ("data.eval={train: {path: a, share: 0.5}}", "an eval set is read once, as a whole: remove it"),
    ],
)
def test_wrong_values(load: Any, assignment: str, expected: str) -> None:
    assert expected in message(load, MINIMAL, assignment)


def test_shares_are_given_for_all_sources_or_none(load: Any) -> None:
    text = "base: b\noutput: o\ndata: {train: [{path: a, share: 0.5}, b]}\n"
    assert "data.train.1.share: is missing" in message(load, text)


def test_merge_needs_an_adapter(load: Any) -> None:
    assert "the weights are written whole" in message(load, MINIMAL + "lora: null\nmerge: true\n")


# -- train -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("output_dir", "x", "`output`"),
        ("remove_unused_columns", True, "response mask"),
        ("seed", 1, "`seed`"),
        ("fp16", True, "`bf16: true`"),
        ("torch_compile_mode", "default", "KL"),
        ("use_cpu", True, "CUDA_VISIBLE_DEVICES"),
        ("push_to_hub", True, "hf upload"),
        ("warmup_ratio", 0.1, "`warmup_steps: 0.1`"),
        ("evaluation_strategy", "steps", "`eval_strategy`"),
        ("hub_revision", "main", "not supported"),
        ("learning_rat", 1e-3, "did you mean `learning_rate`?"),
        ("lr", 1e-3, "unknown training argument `lr`; did you mean `learning_rate`?"),
        ("batch_size", 8, "`per_device_train_batch_size`"),
        ("epochs", 3, "`num_train_epochs`"),
        ("learning_rate", "abc", "expected a number"),
        ("learning_rate", -1.0, "must be at least 0"),
        ("max_steps", 2.5, "expected a"),
        ("bf16", "yes", "expected true or false"),
        ("lr_scheduler_type", "cosin", "did you mean `cosine`?"),
        ("optim", "adam", "41 names"),
        ("save_strategy", "epoch", "`save_steps`"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant: false"),
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("report_to", "no_such_tracker", "is not installed"),
        ("logging_steps", 1.5, "must be an integer if bigger than 1"),
    ],
)
def test_training_arguments_that_are_refused(name: str, value: object, expected: str) -> None:
    (problem,) = training_argument_problems({name: value})
    assert expected in problem.message
    assert problem.key in (("train", name), ("train",))  # the last of them only shows when all are taken together


def test_ordinary_training_arguments_pass_on_any_machine() -> None:
    ordinary = {
        "learning_rate": 2e-5, "num_train_epochs": 2, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": True,
        "gradient_checkpointing": True, "save_strategy": "no", "save_total_limit": 1, "report_to": "none",
        "max_steps": 5, "optim": "adamw_torch", "weight_decay": 0, "logging_steps": 0.1,
    }  # fmt: skip
    assert training_argument_problems(ordinary) == []


def test_training_arguments_that_a_later_release_adds_or_drops_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    types = argument_types()
    later = {name: kind for name, kind in types.items() if name != "weight_decay"} | {"muon_rank": int}
    monkeypatch.setattr(training_arguments, "argument_types", lambda: later)
    added, dropped = training_argument_problems({"muon_rank": 4, "weight_decay": 0.1})
    assert added.key == ("train", "muon_rank")
    assert "not supported" in added.message
    assert dropped.key == ("train", "weight_decay")
    assert "does not have it" in dropped.message


def test_checking_training_arguments_places_nothing_on_a_device() -> None:
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    assert training_argument_problems({"learning_rate": 1e-4}) == []
    assert dict(PartialState._shared_state) == before


def test_an_empty_train_section_imports_no_transformers() -> None:
    code = (
        "import sys; from kd.config.training_arguments import training_argument_problems as p; assert p({}) == []; "
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lists_of_training_arguments_have_names_of_the_installed_transformers() -> None:
    names = set(argument_types())
    assert names >= training_arguments.ALLOWED
    assert names >= set(training_arguments.SET_BY_TOOLKIT)
    assert set(training_arguments.MINIMA) <= training_arguments.ALLOWED
    assert set(training_arguments._SYNONYMS.values()) <= training_arguments.ALLOWED
    assert not training_arguments.ALLOWED & set(training_arguments.SET_BY_TOOLKIT)
    assert not names & {*training_arguments.RENAMED, *training_arguments._SYNONYMS}


@pytest.mark.parametrize(
    "train",
    [{"save_strategy": "no"}, {"save_steps": 0.1, "eval_steps": 50}, {"save_steps": 15, "eval_steps": 10}],
)
def test_with_held_out_rows_saving_and_scoring_go_together(train: dict[str, object]) -> None:
    assert training_argument_problems(train) == []
    (problem,) = training_argument_problems(train, held_out=True)
    assert "keeping the best checkpoint (`data.eval`) requires" in problem.message
    assert "give eval_steps alone, or save_steps as a multiple of it" in problem.message


@pytest.mark.parametrize("train", [{"eval_steps": 50}, {"save_steps": 50}, {"save_steps": 20, "eval_steps": 10}, {}])
def test_held_out_rows_are_scored_where_a_checkpoint_is_saved(train: dict[str, object]) -> None:
    assert training_argument_problems(train, held_out=True) == []
    steps = training_arguments.default_steps(train, held_out=True) | train
    assert steps["save_steps"] == steps["eval_steps"] or train == {"save_steps": 20, "eval_steps": 10}
    assert training_arguments.default_steps(train, held_out=False) == {"save_steps": 0.1}


def test_held_out_rows_that_are_not_to_be_scored() -> None:
    assert training_argument_problems({"eval_strategy": "no"}) == []
    (problem,) = training_argument_problems({"eval_strategy": "no"}, held_out=True)
    assert problem.key == ("train",)
    assert "eval_strategy" in problem.message


def test_training_arguments_are_told_with_the_rest(load: Any) -> None:
    told = message(load, MINIMAL + "train:\n  warmup_ratio: 0.1\n  output_dir: x\nsed: 1\n")
    assert "recipe.yaml:5: train.warmup_ratio = 0.1: " in told
    assert "recipe.yaml:6: train.output_dir = 'x': " in told
    assert "recipe.yaml:7: sed = 1: unknown key" in told


# -- Python ------------------------------------------------------------------------------------------------------------


def test_recipes_from_python_take_paths_and_lists_and_cannot_be_changed(tmp_path: Path) -> None:
    recipe = SftRecipe(base=tmp_path, output=tmp_path / "o", data={"train": [tmp_path / "a.jsonl"]})  # type: ignore[arg-type]
    assert recipe.data.routes["train"][0].path == str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 10**6), min_size=1, max_size=4), min_size=1))
def test_default_shares_are_by_rows(rows: dict[str, list[int]]) -> None:
    shares = default_shares(rows)
    total = sum(map(sum, rows.values()))
    for route, counts in rows.items():
        assert shares[route] == pytest.approx([count / total for count in counts])


def test_default_shares_of_routes_are_split_by_rows() -> None:
    shares = default_shares({"general": [30, 10], "ecom": [7]}, {"general": 0.9, "ecom": 0.1})
    assert shares["general"] == pytest.approx([0.675, 0.225])
    assert shares["ecom"] == pytest.approx([0.1])


# -- keys --------------------------------------------------------------------------------------------------------------


def test_every_key_of_a_resolved_recipe_is_documented(load: Any) -> None:
    documented = {doc.key for doc in key_docs(SftRecipe)}
    assert all(doc.meaning and doc.type and doc.default for doc in key_docs(SftRecipe))

    def walk(value: Any, prefix: str) -> set[str]:
        if isinstance(value, list):
            return walk(value[0], f"{prefix}.0")
        if not isinstance(value, dict) or not value:
            return {prefix}
        return set().union(*(walk(inner, f"{prefix}.{key}".lstrip(".")) for key, inner in value.items()))

    written = yaml.safe_load(resolved_yaml(load(MINIMAL)))
    assert {key.replace("data.train", "data.ROUTE") for key in walk(written, "")} <= documented


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('lora: {target_modules: "q[proj"}\n', "lora.target_modules = 'q[proj': is not a regular expression"),
        ('attn_implementation: "a\\0b"\n', "holds the character U+0000: remove it"),
        ('train: {report_to: "x\\ud800y"}\n', "holds the character U+D800: remove it"),
    ],
)
def test_texts_that_no_run_could_use(load: Any, text: str, words: str) -> None:
    assert words in message(load, MINIMAL + text)


def test_paths_that_no_folder_could_have(load: Any) -> None:
    assert "output = 'ru\\x00n': holds the character U+0000" in message(load, MINIMAL, output="ru\0n")
