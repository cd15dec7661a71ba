"""`align`, `sft`, `distill` from Python: rows in memory are rows of a file; stops, mistakes, results."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dae_eval.contamination import training_rows
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from worlds import make_world, metrics_of

import dae
from dae import AlignRecipe, Stopped, TrainingResult, UserError, align, cli, distill, sft
from kd.config.in_memory_rows import InMemoryRows

SHORT = {"max_steps": 6, "save_steps": 2, "logging_steps": 2, "learning_rate": 1e-2, "rank": 4}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("python") / "world")


@pytest.fixture(autouse=True)
def world(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with links to the files of the world; without the proof in a fresh process."""
    for file in origin.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kd.training.publishing.verify_saved", lambda *_: None)
    return tmp_path


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


def run(form: Any = list, output: str = "student", **more: Any) -> TrainingResult:
    """A run whose rows are lists, or what `form` makes of them."""
    names = {"domain": "shop", "general": "general"}
    data = {route: form(rows(name)) for route, name in names.items()}
    held_out = {"domain": form(rows("heldout_shop"))}
    return align("base", "expert", data, eval_dataset=held_out, output_dir=output, **{**SHORT, **more})


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


class Acting(TrainerCallback):
    """Does something at the beginning of a step, and counts the steps."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act, self.steps = step, act, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1
        if state.global_step == self.step:
            self.act()


# -- rows in memory ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lists_datasets_and_files_give_the_same_run() -> None:
    first = run()
    assert weights(run(Dataset.from_list, "of-datasets").path) == weights(first.path)
    files = {"domain": "shop.jsonl", "general": Path("general.jsonl")}
    held_out = {"domain": {"path": "heldout_shop.jsonl"}}
    of_files = align("base", "expert", files, eval_dataset=held_out, output_dir="of-files", **SHORT)
    assert weights(of_files.path) == weights(first.path)
    losses = [[line.get("loss", line.get("eval_loss")) for line in metrics_of(one.path)] for one in (first, of_files)]
    assert losses[0] == losses[1]
    flags = ["--base", "base", "--expert", "expert", "--domain-data", "shop.jsonl", "--general-data", "general.jsonl"]
    keys = ["train.max_steps=6", "train.save_steps=2", "train.logging_steps=2", "train.learning_rate=1e-2"]
    held = ["lora.rank=4", "data.eval.domain=heldout_shop.jsonl", "--output", "of-command"]
    assert cli.run(["align", *flags, *keys, *held]) == 0
    assert weights("of-command") == weights(first.path)


def test_run_folders_tell_number_and_sha256_and_keep_no_row() -> None:
    folder = run().path
    told = str(InMemoryRows(rows("shop")))
    assert told.startswith("in memory, 120 rows, sha256 ")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["data"]["domain"][0]["path"] == told
    assert provenance["data"]["domain"][0]["sha256"] == told.rsplit(maxsplit=1)[-1]
    assert f"path: {told}\n" in (folder / "recipe.yaml").read_text()
    assert f"`{told}`" in (folder / "README.md").read_text()
    longest = max((row["prompt"] for row in rows("shop")), key=len).encode()
    assert not [file for file in folder.rglob("*") if file.is_file() and longest in file.read_bytes()]


def test_equal_rows_have_equal_fingerprints() -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 1}]
    some: list[dict[str, Any]] = [{"text": None, "messages": turns, "id": 3}, {"text": "one", "id": 4.5}]
    one = InMemoryRows(some)
    dataset = Dataset.from_list(some)
    assert dataset[0] != some[0]  # Arrow has filled it up with nulls
    assert InMemoryRows(dataset) == one == InMemoryRows(dataset.with_format("torch"))
    assert InMemoryRows([some[0], {"id": 4.5, "text": "one"}]) == one
    assert InMemoryRows(some[::-1]) != one
    assert InMemoryRows([some[0], {"text": "One", "id": 4.5}]) != one
    assert InMemoryRows(some, name="other") == one


def test_sources_with_shares_and_several_sources() -> None:
    shop, general = rows("shop"), rows("general")
    shares = {"domain": {"path": shop, "share": 0.5}, "general": [{"path": general, "share": 0.25}] * 2}
    first = align("base", "expert", shares, output_dir="one", **SHORT)
    by_name = {"data.domain.0.share": 0.5, "data.general.0.share": 0.25, "data.general.1.share": 0.25}
    data = {"domain": Dataset.from_list(shop), "general": [general, "general.jsonl"]}
    second = align("base", "expert", data, output_dir="two", args=by_name, **SHORT)
    assert weights(first.path) == weights(second.path)
    assert first.summary["rows"] == {"general": 240, "domain": 120}


@pytest.mark.slow
def test_changed_rows_are_refused_by_name_and_equal_ones_resume() -> None:
    with pytest.raises(Stopped):
        run(callbacks=[Acting(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    before = {file: file.stat().st_mtime_ns for file in Path("student").rglob("*") if file.name != ".lock"}
    with pytest.raises(UserError, match=r"content of data.domain\[0\]: ") as refused:
        run(lambda some: [*some[:-1], {"text": "another"}] if "KETTLE" in str(some) else some)
    assert "content of data.general[0]" not in str(refused.value)
    assert before == {file: file.stat().st_mtime_ns for file in Path("student").rglob("*") if file.name != ".lock"}
    seen = Acting(-1, None)
    assert run(Dataset.from_list, callbacks=[seen]).summary["steps"] == 6
    assert seen.steps == 2
    assert weights("student") == weights(run(output="calm").path)


def test_commands_say_that_recorded_rows_were_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sft("base", rows("shop"), output_dir="own", **SHORT)
    words = "own was trained on rows in memory, 120 rows, sha256 "
    with pytest.raises(UserError, match=words) as refused:
        align("base", "own", {"general": rows("general")})
    assert 'train_dataset={"domain": ROWS}' in str(refused.value)
    command = ["align", "--base", "base", "--expert", "own", "--general-data", "general.jsonl"]
    assert cli.run(command) == 2
    assert words in (said := capsys.readouterr().err)
    assert "--domain-data PATH" in said
    assert cli.run(["sft", "--recipe", "own/recipe.yaml", "--output", "again"]) == 2
    assert "these rows were in memory" in capsys.readouterr().err
    ((found, source),) = training_rows(["own"])
    assert source is None and found.problem == "no run folder keeps such rows; own was trained on them"


# -- mistakes ----------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "?", "completion": "!"}
WRONG_ROWS = [
    ([], "rows of `train`: has no rows"),
    (Dataset.from_list([]), "rows of `train`: has no rows"),
    (3, "rows of `train`: expected a path, a datasets.Dataset or a list of dicts, not int"),
    ([PAIR, PAIR, PAIR, 3], "rows of `train`, row 3: expected a JSON object"),
    ([PAIR, {"question": "?"}], "rows of `train`, row 1: its keys are question"),
    (Dataset.from_list([PAIR, {**PAIR, "prompt": None}]), "rows of `train`, row 1: "),
    ([PAIR, {**PAIR, "id": object()}], "rows of `train`, row 1: cannot be fingerprinted"),
    (DatasetDict(a=Dataset.from_list([PAIR]), b=Dataset.from_list([PAIR])), "pass one of its splits: a, b"),
    (Dataset.from_list([PAIR]).to_iterable_dataset(), "load it without `streaming`"),
    (Dataset.from_list([PAIR]).to_pandas(), "Dataset.from_pandas"),
    ([{"path": "shop.jsonl"}, {"path": [PAIR, {"a": 1}]}], "rows of `train.1`, row 1: "),
    ("nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), WRONG_ROWS, ids=[words[:40] for _, words in WRONG_ROWS])
def test_wrong_rows_are_one_message(given: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        sft("base", given, output_dir="out", **SHORT)
    assert words in str(refused.value)
    assert not Path("out").exists() or not list(Path("out").glob("*.json"))


WRONG_KEYS = [
    ({"lerning_rate": 1e-3}, "align(): lerning_rate: unknown key; did you mean `learning_rate`?"),
    ({"max_lenght": 8}, "align(): max_lenght: unknown key; did you mean `max_length`?"),
    ({"strat": "base"}, "align(): strat = 'base': unknown key; did you mean `start`?"),
    ({"args": {"train.lr": 1}}, "align(): train.lr = 1: unknown training argument"),
    ({"args": {"data.domian.0.share": 0.2}}, "data.domian"),
    ({"args": 3}, "align(args=...): expected a mapping"),
    ({"base": "other"}, "align(base=...): is the argument `model`"),
    ({"max_steps": "many"}, "align(): train.max_steps = 'many': "),
    ({"reference": 3}, "reference: reference = 3: expected text"),
    ({"seed": -1, "rank": 0}, "2 problems in the recipe"),
]


@pytest.mark.parametrize(("keys", "words"), WRONG_KEYS, ids=[words for _, words in WRONG_KEYS])
def test_wrong_keys_are_one_message(keys: dict[str, Any], words: str) -> None:
    data = {"domain": [PAIR], "general": [PAIR]}
    with pytest.raises(UserError) as refused:
        align("base", "expert", data, output_dir="out", **keys)
    assert words in str(refused.value)
    assert not Path("out").exists()


def test_routes_are_named() -> None:
    with pytest.raises(UserError, match="train_dataset: expected a mapping from routes to rows"):
        align("base", "expert", rows("shop"))  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"data\.shop: unknown key or route; the routes are general, domain"):
        align("base", "expert", {"shop": rows("shop"), "domain": rows("shop"), "general": rows("general")})
    with pytest.raises(UserError, match=r"rows of `eval\.domain`, row 0: "):
        align("base", "expert", {"domain": [PAIR], "general": [PAIR]}, eval_dataset={"domain": [{"a": 1}]})


# -- stops and callbacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """The process's own handlers are there again after a run."""
    own = [signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), own, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_leaves_a_checkpoint_and_the_same_call_resumes() -> None:
    with pytest.raises(Stopped, match=r"stopped after step 4 of 6; .* \(in Python, the same call\) resumes"):
        run(callbacks=[Acting(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert max(path.name for path in Path("student/checkpoints").iterdir()) == "step-000004"
    assert run().summary["steps"] == 6
    assert weights("student") == weights(run(output="calm").path)


@pytest.mark.usefixtures("handlers")
def test_an_error_in_training_gives_the_signals_back() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(callbacks=[Acting(3, fail)])
    assert run().summary["steps"] == 6


def test_callbacks_are_called_and_can_stop_a_run() -> None:
    class Watching(TrainerCallback):
        logged: list[str] = []  # noqa: RUF012 - of this one run

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logged += logs
            control.should_training_stop = state.global_step == 4

    result = run(callbacks=[Watching()])
    assert {"loss", "domain/kl", "eval_loss"} <= set(Watching.logged)
    assert result.summary["steps"] == 4


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_result_has_metrics_and_a_model() -> None:
    result = run()
    assert repr(result).startswith("TrainingResult(student, 6 steps, general/kl ")
    table = result.metrics
    assert list(table.index) == [0, 2, 4, 6]
    lines = metrics_of(result.path)
    assert table.loc[4, "domain/kl"] == next(
        line["domain/kl"] for line in lines if line["step"] == 4 and "loss" in line
    )
    assert table["eval_domain_kl"].notna().sum() == 3
    probe = torch.tensor([[5, 60, 70, 80]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "student").eval()
    model = result.model()
    assert not model.training
    assert torch.equal(model(probe).logits, plain(probe).logits)
    assert run().summary == result.summary  # finished: nothing is trained again


def test_numbers_that_are_none_are_numbers_in_the_table() -> None:
    result = run()
    with (result.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": "nan"}\n{"step": 8, "loss": "inf"}\n')
    assert result.metrics["loss"].dtype == float
    assert result.metrics.loc[8, "loss"] == float("inf")


@pytest.mark.slow
def test_results_go_where_paths_go() -> None:
    expert = sft("base", rows("shop"), output_dir="own", **SHORT)
    data = {"domain": rows("shop"), "general": rows("general")}
    student = align("base", expert, data, output_dir="student", start="base", lambda_=0.5, **SHORT)
    assert json.loads((student.path / "provenance.json").read_text())["inputs"]["expert.domain"]
    recipe = student.recipe
    assert isinstance(recipe, AlignRecipe)
    assert (recipe.expert, recipe.start, recipe.lambda_) == ({"domain": "own"}, "base", 0.5)
    full = sft("base", rows("shop"), output_dir="full", lora=None, args={"train.max_steps": 2})
    assert type(full.model()).__name__ == "LlamaForCausalLM"
    taught = distill("base", full, rows("shop"), eval_dataset=rows("heldout_shop"), output_dir="taught", **SHORT)
    assert "eval_train_kl" in taught.metrics


def test_a_whole_recipe_is_taken_with_callbacks_alone() -> None:
    data = {"domain": InMemoryRows(rows("shop"), "mine"), "general": "general.jsonl"}
    recipe = AlignRecipe(base="base", expert="expert", output="student", data=data, train={"max_steps": 2})
    seen = Acting(-1, None)
    assert align(recipe, callbacks=[seen]).summary["rows"] == {"general": 120, "domain": 120}
    assert seen.steps == 2
    with pytest.raises(UserError, match=r"align\(recipe\): a recipe has all settings"):
        align(recipe, output_dir="other")  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"sft\(\): model: expected a folder or hub id, not AlignRecipe; save a model"):
        sft(recipe, rows("shop"), output_dir="other")  # type: ignore[call-overload]


def test_nothing_but_progress_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n}{of}" for n in (2, 4, 6) for of in ("/6", "")]
    assert len(set(lines)) == 6


def test_the_public_names_are_typed() -> None:
    import dae_eval

    import kd

    for package in (dae, kd, dae_eval):
        assert (Path(str(package.__file__)).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"callbacks": 3}, "callbacks: expected a list of transformers.TrainerCallback, not int"),
        ({"callbacks": [print]}, "callbacks: expected a list of transformers.TrainerCallback, not print"),
        ({"callbacks": Acting(0, print)}, "callbacks: expected a list: write callbacks="),
        ({"output_dir": "x" * 300}, "file name too long"),
        ({"output_dir": "q\0"}, "U\\+0000"),
    ],
)
def test_other_mistakes_are_one_message_each(world: Path, arguments: dict[str, Any], words: str) -> None:
    before = {*world.iterdir()}
    with pytest.raises(UserError, match=words):
        sft("base", rows("shop"), **{"output_dir": "s", **SHORT, **arguments})
    assert {*world.iterdir()} == before


@pytest.mark.parametrize(
    "arguments", [{"student": 3}, {"suite": None}, {"output_dir": 3}, {"margin": "1"}, {"compare": "q9"}], ids=str
)
def test_arguments_of_a_report_have_their_types(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(arguments))}: expected"):
        dae.report(
            **{"base": "base", "expert": "expert", "student": "base", "suite": "s.yaml", "output_dir": "r"} | arguments
        )
