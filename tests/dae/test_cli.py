"""The command line: flags to recipes, `dae check` and `dae keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dae import cli
from dae.commands.keys import schemas
from dae.recipe import AlignRecipe
from kd.config.loading import load_recipe
from kd.errors import UserError
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> list[AlignRecipe]:
    """Recipes that `dae align` would have run."""
    import kd.stages.run_stage

    recipes: list[AlignRecipe] = []

    class Result:
        path = Path("runs/align")
        summary = {"steps": 3, "rows": {}, "initial_kl": {}, "last": {"loss": 0.5}, "held_out": {}}  # noqa: RUF012

    def record(_stage: Any, recipe: AlignRecipe) -> Result:
        recipes.append(recipe)
        return Result()

    monkeypatch.setattr(kd.stages.run_stage, "run_stage", record)
    return recipes


ENOUGH = ["align", "--base", "b", "--expert", "e", "--domain-data", "d.jsonl", "--general-data", "g.jsonl"]


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flags_make_the_recipe(aligned: list[AlignRecipe], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "align", "--base", "b", "--reference", "r", "--output", "o", "--merge",
        "--expert", "ecom=runs/lr=1/e", "--expert", "legal=l",
        "--domain-data", "ecom=d1", "--domain-data", "legal=d2", "--domain-data", "ecom=d3",
        "--general-data", "g1", "--general-data", "g2", "lambda=0.5", "train.learning_rate=2e-5",
    ]  # fmt: skip
    assert cli.run(arguments) == 0
    (recipe,) = aligned
    assert (recipe.base, recipe.reference, recipe.output, recipe.merge) == ("b", "r", "o", True)
    assert recipe.expert == {"ecom": "runs/lr=1/e", "legal": "l"}
    sources = {name: [source.path for source in sources] for name, sources in recipe.data.routes.items()}
    assert sources == {"general": ["g1", "g2"], "ecom": ["d1", "d3"], "legal": ["d2"]}
    assert (recipe.lambda_, recipe.train) == (0.5, {"learning_rate": 2e-5})
    assert capsys.readouterr().out == "runs/align: finished, 3 steps\n"


def test_without_names_both_mean_domain(aligned: list[AlignRecipe]) -> None:
    assert cli.run(["align", "--base", "b", "--expert", "runs/lr=2/e", *ENOUGH[5:]]) == 0
    assert aligned[0].expert == {"domain": "runs/lr=2/e"}


def test_flags_go_over_the_recipe_file(aligned: list[AlignRecipe], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: b\nexpert: e\noutput: o\nseed: 1\nmerge: true\ndata: {domain: d, general: g}\n")
    assert cli.run(["align", "--recipe", str(path), "--base", "other", "seed=2"]) == 0
    (recipe,) = aligned
    assert (recipe.base, recipe.output, recipe.seed, recipe.merge) == ("other", "o", 2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--expert", "a", "--expert", "b"], "--expert b: several experts"),
        (["--expert", "x=a", "--expert", "x=b"], "--expert b: duplicate name `x`"),
        (["--expert", "a", "--expert", "x=b"], "--expert a: several experts"),
        (["--expert", "general=a"], "--expert: expert.general = 'a': "),
        (["--domain-data", "general=a"], "--domain-data general=a: "),
        (["--expert", "x=a", "--domain-data", "y=d"], "--domain-data: data.y: "),
        (["--expert", "ecom=a"], "add --domain-data ecom=PATH"),
        (["--general-data", "g"], "add --base"),
        (["--nonsense"], "--nonsense"),
        (["--base"], "--base"),
        (["--recipe", "missing.yaml"], "missing.yaml: "),
    ],
)
def test_mistakes_in_flags(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["align", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("text", "more", "schema"),
    [
        ("base: b\nexpert: e\ndata: {domain: d, general: g}\n", [], AlignRecipe),
        ("base: b\ndata: {domain: d, general: g}\n", ["expert=e"], AlignRecipe),
        ("base: b\noutput: o\ndata: {train: d}\n", [], SftRecipe),
        ("base: b\noutput: o\ndata: {train: d}\n", ["--stage", "sft"], SftRecipe),
    ],
)
def test_check_knows_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, more: list[str], schema: type[Any]
) -> None:
    import dae.checking.check

    checked: list[Any] = []
    monkeypatch.setattr(dae.checking.check, "check", lambda _stage, recipe, **_: checked.append(recipe))
    (tmp_path / "r.yaml").write_text(text)
    assert cli.run(["check", str(tmp_path / "r.yaml"), *more]) == 0
    assert [type(recipe) for recipe in checked] == [schema]


CHECKED: list[tuple[list[str], type[Any]]] = [
    (ENOUGH, AlignRecipe),
    (["sft", "--base", "b", "--data", "d", "--output", "o", "seed=3"], SftRecipe),
    (["distill", "--base", "b", "--teacher", "t", "--data", "d", "seed=3"], DistillRecipe),
]


@pytest.mark.parametrize(("command", "schema"), CHECKED)
def test_the_command_to_come_is_checked_by_a_word_before_it_or_a_flag_behind_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], schema: type[Any]
) -> None:
    import dae.checking.check

    checked: list[Any] = []
    monkeypatch.setattr(dae.checking.check, "check", lambda _stage, recipe, **_: checked.append(recipe))
    monkeypatch.chdir(tmp_path)
    (tmp_path / command[0]).write_text("no recipe")  # the stage goes before a file of its name
    assert cli.run(["check", *command]) == 0
    assert cli.run([*command, "--check"]) == 0
    assert cli.run(["check", *command, "--check"]) == 0
    assert type(checked[0]) is schema and checked[0] == checked[1] == checked[2]


def test_a_file_with_the_name_of_a_stage_is_had_by_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dae.checking.check

    checked: list[Any] = []
    monkeypatch.setattr(dae.checking.check, "check", lambda _stage, recipe, **_: checked.append(recipe))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "align").write_text("base: b\noutput: o\ndata: {train: d}\n")
    assert cli.run(["check", "./align", "seed=4"]) == 0
    assert type(checked[0]) is SftRecipe and checked[0].seed == 4
    assert cli.run(["check", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for form in ("dae check align --base CKPT", "dae align ... --check", "dae check FILE [KEY=VALUE]...", "./align"):
        assert form in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "align, distill or sft"),
        (["--base", "b"], "--base: "),
        (["--base", "b"], "dae check align --base"),
        (["algin", "--base", "b"], "algin: "),
        (["algin", "--base", "b"], "did you mean `align`?"),
        (["r.yaml"], "r.yaml"),
        (["--stage", "nonsense", "r.yaml"], "--stage nonsense: expected align, distill or sft"),
        (["sft", "--expert", "e"], "--expert"),
        (["align", "--base", "b"], "expert"),
    ],
)
def test_mistakes_in_what_is_to_be_checked(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["check", *words]) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("stages: {expert: {stage: sft}}", "run"),
        ("base: b\nexperts: [{path: a, prompts: [x]}]\noutput: o", "merge moe"),
        ("method: ties\nbase: b\nexpert: e\nweight: 0.5\noutput: o", "merge weights"),
        ("reference: r\nexpert: e\nrank: 4\noutput: o", "merge to-lora"),
        ("model: m\nrows: 10\noutput: o.jsonl", "sample"),
    ],
)
def test_check_names_the_command_of_another_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, command: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert cli.run(["check", str(tmp_path / "r.yaml")]) == 2
    told = capsys.readouterr().err
    assert f"r.yaml: is a recipe of `dae {command}`" in told
    assert len(told.splitlines()) == 1


def test_an_align_recipe_with_a_key_of_another_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("base: b\nexpert: e\noutput: o\nrank: 4")
    assert cli.run(["check", str(tmp_path / "r.yaml")]) == 2
    assert "rank = 4: " in (told := capsys.readouterr().err) and "`lora.rank`" in told


@pytest.mark.parametrize("command", [n for n, schema in schemas().items() if "seed" in schema.model_fields])
def test_a_seed_that_no_library_takes_is_told(command: str) -> None:
    with pytest.raises(UserError, match="seed=4294967296: must be at most 4294967295"):
        load_recipe(schemas()[command], None, {}, ["seed=4294967296"])


@pytest.mark.parametrize("command", [["demo"], ["eval", "mt-bench"], ["eval", "alpaca-eval"]])
def test_a_seed_is_a_flag_with_the_same_bounds(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--seed", "4294967296"]) == 2
    told = capsys.readouterr().err
    assert "--seed" in told and "4294967295" in told


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "key"), [("align", "lambda"), ("sft", "data.ROUTE.0.share"), ("sample", "rows")])
def test_keys_lists_each_key_with_type_default_and_meaning(stage: str, key: str, capsys: Any) -> None:
    assert cli.run(["keys", stage]) == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = [place for place, line in enumerate(lines) if line.startswith(f"{key}  ")]
    assert "default" in lines[place]
    assert lines[place + 1].startswith("    ")
