"""Groups and tags of lm-eval in a suite: their members, and their scores as lm-eval has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from dae_eval.benchmarks import load_members, load_tasks
from dae_eval.evaluation import evaluate
from dae_eval.folders import read_evaluation
from dae_eval.models import locate
from dae_eval.results import Evaluation, TaskResult
from dae_eval.suites import load_suite
from dae_eval.units import benchmark_score
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pico import make_checkpoint, make_tokenizer
from pico_tasks import TASKS, make_documents, make_suite, make_tasks, metrics, write_task
from transformers import AutoModelForCausalLM
from worlds import SHOP_WORDS

from dae.commands.score_tables import print_scores, show_plan
from kd.errors import UserError

SIZES = {"one": 12, "two": 5, "three": 3}
ACC: dict[str, Any] = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "answer"}
GROUPS: dict[str, dict[str, Any]] = {
    "by_size": {"task": ["one", "two", "three"], "aggregate_metric_list": [ACC]},
    "equal": {"task": ["one", "two", "three"], "aggregate_metric_list": [{**ACC, "weight_by_size": False}]},
    "pair": {"task": ["one", "two"], "aggregate_metric_list": [{**ACC, "weight_by_size": False}]},
    "nested": {"task": ["pair", "three"], "aggregate_metric_list": [ACC]},
    "nested_equal": {
        "task": ["pair", {"group": "inside", "task": [{"task": "three", "num_fewshot": 1}]}],
        "aggregate_metric_list": [{**ACC, "weight_by_size": False}],
    },
    "twice": {"task": ["pair", "two", "three"], "aggregate_metric_list": [ACC]},
    "norm": {"task": ["one", "two"], "aggregate_metric_list": [{**ACC, "metric": "acc_norm"}]},
    "scoreless": {"task": ["pair", "three"]},
    "texts": {
        "task": ["text_one", "text_two"],
        "aggregate_metric_list": [{**ACC, "metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
    "filters": {"task": ["first_letter", "whole"], "aggregate_metric_list": [{**ACC, "metric": "exact_match"}]},
    "mixed": {"task": ["one", "translate", "code", "picture"], "aggregate_metric_list": [ACC]},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tasks(tmp_path_factory.mktemp("tasks"))
    for name, rows in SIZES.items():
        path = make_documents(folder / f"{name}.jsonl", SHOP_WORDS, rows, rows)
        write_task(folder, name, path, {**TASKS["choose"], "tag": "tagged"})
    for name in ("one", "two"):
        write_task(folder, f"text_{name}", folder / f"{name}.jsonl", ROLLING)
    for name, pattern in (("first_letter", "(.)"), ("whole", "(.*)")):
        filters = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
        say = {**TASKS["say"], "filter_list": [{"name": "own", "filter": filters}]}
        write_task(folder, name, folder / "one.jsonl", say)
    write_task(
        folder, "translate", folder / "one.jsonl", {**TASKS["say"], "metric_list": metrics(("ter", "ter", False))}
    )
    write_task(folder, "code", folder / "one.jsonl", {**TASKS["say"], "unsafe_code": True})
    write_task(folder, "picture", folder / "one.jsonl", {**TASKS["say"], "doc_to_image": ["source"]})
    for name, group in GROUPS.items():
        write_task(folder, f"group_{name}", folder, {"group": name, **group})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "base")


def ask(tasks: Path, model: Path, output: Path, groups: dict[str, Any], **suite: Any) -> Evaluation:
    output.mkdir(exist_ok=True)
    loaded = load_suite(make_suite(output / "suite.yaml", tasks, groups=groups, **suite))
    return evaluate({"model": locate("model", str(model), None)}, loaded, {"model": output / "out"})["model"]


def theirs(tasks: Path, model: Path, name: str, limit: int | None) -> dict[str, Any]:
    """The scores that lm-eval itself computes for a group."""
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(model), tokenizer=make_tokenizer(), batch_size=4)
    loaded: Any = TaskManager(include_path=str(tasks), include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    found = lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=0)
    assert found is not None
    return dict(found["groups"][name])


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize(
    ("name", "key", "shares"),
    [
        ("by_size", "acc,none", [12 / 20, 5 / 20, 3 / 20]),
        ("equal", "acc,none", [1 / 3] * 3),
        ("nested", "acc,none", [12 / 20, 5 / 20, 3 / 20]),
        ("nested_equal", "acc,none", [1 / 3] * 3),
        ("twice", "acc,none", [12 / 25, 10 / 25, 3 / 25]),
        ("norm", "acc_norm,none", [12 / 17, 5 / 17]),
        ("texts", "bits_per_byte,none", [12 / 17, 5 / 17]),
        ("filters", "exact_match,own", [1 / 2] * 2),
    ],
)
def test_a_benchmark_s_score_is_lm_eval_s_own(
    tasks: Path, model: Path, tmp_path: Path, name: str, key: str, shares: list[float], limit: int | None
) -> None:
    found = ask(tasks, model, tmp_path, {"beside": {"kind": "shown", "tasks": [{"task": name, "limit": limit}]}})
    results = list(found.tasks.values())
    assert {(r.benchmark, r.metric, r.settings["limit"]) for r in results} == {(name, key.partition(",")[0], limit)}
    sizes = [12 if name == "filters" else SIZES[r.task.removeprefix("text_")] for r in results]
    assert [r.total for r in results] == sizes
    assert [len(r.documents) for r in results] == [min(size, limit or size) for size in sizes]
    if limit is None:
        assert [r.share for r in results] == pytest.approx(shares, rel=1e-12)
    assert sum(result.share for result in results) == pytest.approx(1, rel=1e-12)
    score = sum(result.share * result.mean for result in results)
    assert score == pytest.approx(theirs(tasks, model, name, limit)[key], rel=1e-12)
    assert read_evaluation(tmp_path / "out") == found


def test_a_perplexity_of_a_benchmark_is_the_mean_of_perplexities_as_in_lm_eval(
    tasks: Path, model: Path, tmp_path: Path
) -> None:
    entry = {"task": "texts", "metric": "word_perplexity"}
    found = ask(tasks, model, tmp_path, {"beside": {"kind": "shown", "tasks": [entry]}})
    expected = theirs(tasks, model, "texts", None)["word_perplexity,none"]
    assert benchmark_score(list(found.tasks.values())) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["tagged", "scoreless"])
def test_members_have_equal_shares_where_lm_eval_has_no_score(tasks: Path, name: str) -> None:
    members = members_of(tasks, {"domain": [name]})
    assert set(members) == set(SIZES)
    assert {(member.benchmark, member.share) for member in members.values()} == {(name, 1 / 3)}


def members_of(tasks: Path, groups: dict[str, Any]) -> dict[str, Any]:
    return load_members(load_suite(make_suite(tasks / "suite.yml", tasks, groups=groups)))


def test_another_metric_than_that_of_the_group_has_equal_shares(tasks: Path) -> None:
    members = members_of(tasks, {"domain": [{"task": "by_size", "metric": "acc_norm"}]})
    assert [member.share for member in members.values()] == [1 / 3] * 3


def test_the_keys_of_an_entry_are_those_of_each_member(tasks: Path, model: Path, tmp_path: Path) -> None:
    keys = {"shots": 2, "limit": 3, "metric": "acc_norm", "cluster_by": "source", "leak_by": "source"}
    found = ask(tasks, model, tmp_path, {"domain": [{"task": "nested", **keys}], "general": ["general_choose"]})
    *members, alone = found.tasks.values()
    assert [(r.task, r.group, r.kind, r.metric) for r in members] == [
        (name, "domain", "domain", "acc_norm") for name in ("one", "two", "three")
    ]
    for result in members:
        assert (result.settings["shots"], result.settings["limit"], len(result.documents)) == (2, 3, 3)
        assert len({document.cluster for document in result.documents}) == 1
    assert (alone.benchmark, alone.share, alone.total) == ("", 1.0, 12)


def test_a_member_answers_as_if_it_were_named_alone(tasks: Path, model: Path, tmp_path: Path) -> None:
    inside = ask(tasks, model, tmp_path, {"domain": ["by_size"]}).tasks["two"]
    files = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "documents").glob("two-*")}
    alone = ask(tasks, model, tmp_path, {"domain": ["two"]}).tasks["two"]
    assert (inside.documents, inside.settings, inside.metric) == (alone.documents, alone.settings, alone.metric)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out" / "documents").glob("two-*")} == files


@pytest.mark.slow  # lm-eval looks through thousands of files for a task that the folder does not have
def test_everything_that_is_wrong_with_the_names_is_told_at_once(tasks: Path) -> None:
    groups = {
        "domain": ["by_size", "two", "nested", "shop_sai"],
        "general": ["mixed", {"task": "shop_say", "metric": "bleu"}],
        "rows": {"kind": "shown", "tasks": ["by_sise"]},
    }
    with pytest.raises(UserError) as caught:
        members_of(tasks, groups)
    lines = str(caught.value).splitlines()
    for start, words in (
        ("shop_sai: unknown task", "`shop_say`?"),
        ("by_sise: unknown task", "`by_size`?"),
        ("two: duplicate task, ", "`by_size` and alone and `nested`"),
        ("three: duplicate task, ", "`by_size` and `nested`"),
        ("one: duplicate task, ", "`by_size` and `nested` and `mixed`"),
        ("task translate of `mixed`: ", "ter: "),
        ("task code of `mixed`: ", "runs code"),
        ("task picture of `mixed`: ", "images"),
        ("mixed: ", "in its place: one"),
        ("task shop_say: ", "'bleu'"),
    ):
        assert len([line for line in lines if line.startswith(start) and words in line]) == 1
    assert len(lines) == 10


def test_what_is_wrong_with_all_members_is_told_once(tasks: Path) -> None:
    with pytest.raises(UserError) as caught:
        members_of(tasks, {"domain": [{"task": "by_size", "metric": "f1"}, "texts"]})
    f1, losses = str(caught.value).splitlines()
    assert f1.startswith("tasks one, two, three of `by_size`: ") and "'f1'" in f1
    assert losses.startswith("tasks text_one, text_two of `texts`: ")
    assert "`kind: shown`, which shows bits_per_byte" in losses


@pytest.mark.slow  # as above
def test_a_group_of_one_s_own_may_hold_lm_eval_s_tasks(tasks: Path, tmp_path: Path) -> None:
    own = make_tasks(tmp_path / "own")
    (own / "lm.yaml").write_text("group: lm\ntask: [shop_choose, arithmetic_1dc]\n")
    with pytest.raises(UserError, match=r"^task arithmetic_1dc: documents cannot be loaded"):  # not on this machine
        load_tasks(["lm"], own, {})


def test_tasks_that_cannot_be_loaded_are_named(tasks: Path, tmp_path: Path) -> None:
    folder = make_tasks(tmp_path / "own")
    write_task(folder, "all", folder, {"group": "all", "task": ["general_say", "shop_say"]})
    (folder / "shop.jsonl").unlink()
    with pytest.raises(UserError) as caught:
        load_tasks(["all", "shop_choose"], folder, {})
    starts = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert starts == ["task shop_say", "task shop_choose"] and "FileNotFoundError" in str(caught.value)


def test_what_will_be_asked_is_told_before_and_what_was_scored_after(
    tasks: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {
        "domain": [{"task": "by_size", "shots": 1, "limit": 4}, "shop_say"],
        "beside": {"kind": "shown", "tasks": ["texts", {"task": "text_three", "metric": "word_perplexity"}]},
    }
    write_task(tasks, "text_three", tasks / "three.jsonl", ROLLING)
    loaded = load_suite(make_suite(tmp_path / "suite.yaml", tasks, groups=groups))
    found = evaluate({"model": locate("model", str(model), None)}, loaded, {"model": tmp_path / "out"}, [], show_plan)
    before = capsys.readouterr().out
    assert rows(before, ["by_size", "shop_say", "texts", "text_three"]) == [
        ["by_size", "acc", "11", "of", "20", "1"],
        ["shop_say", "exact_match", "12", "0"],
        ["texts", "bits_per_byte", "17", "0"],
        ["text_three", "word_perplexity", "3", "0"],
    ]
    assert "by_size: 3 tasks: one, two, three" in before
    print_scores(found["model"])
    after = capsys.readouterr().out
    results = found["model"].tasks
    by_size = 100 * sum(r.share * r.mean for r in results.values() if r.benchmark == "by_size")
    bits = sum(r.share * r.mean for r in results.values() if r.benchmark == "texts")
    told = {row[0]: row[1:] for row in rows(after, ["by_size", "one", "texts", "text_one", "text_three"])}
    assert told["by_size"] == ["acc", "11", f"{by_size:.1f}", "points", "25.0"]
    assert told["one"] == ["acc", "4", f"{100 * results['one'].mean:.1f}", "points", "25.0"]
    assert told["texts"] == ["bits_per_byte", "17", f"{bits:.3f}", "bits", "per", "byte"]
    assert told["text_one"] == ["bits_per_byte", "12", f"{results['text_one'].mean:.3f}", "bits", "per", "byte"]
    assert told["text_three"][0] == "word_perplexity" and told["text_three"][3:] == ["word", "perplexity"]
    assert max(map(len, (before + after).splitlines())) <= 80


def rows(printed: str, names: Sequence[str]) -> list[list[str]]:
    """The words of the lines that begin with these names."""
    return [words for line in printed.splitlines() if (words := line.split()) and words[0] in names]


def test_a_benchmark_of_several_units_has_no_score() -> None:
    parts = [
        TaskResult(unit, "g", "shown", "m", "1", {}, (), unit=unit, benchmark="b", share=0.5)
        for unit in ("points", "bits per byte")
    ]
    assert benchmark_score(parts) is None
