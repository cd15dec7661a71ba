"""Metrics of tasks: which can be a score, which a loss that is shown, and their values per document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dae_eval.answers import ask, documents_of
from dae_eval.benchmarks import load_tasks
from dae_eval.harness import Harness, run_task
from dae_eval.metrics import choose_metric, value_of
from dae_eval.results import Document, Kind, TaskResult
from dae_eval.suites import TaskEntry
from dae_eval.units import in_unit
from pico import make_model, make_tokenizer
from pico_tasks import TASKS, make_tasks, metrics, write_task

from kd.errors import UserError

ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "answer"}
CHOOSE = metrics(("mcc", "matthews_corrcoef", True), ("f1", "f1", True), ("brier_score", "brier_score", False))
SAY = metrics(("bleu", "bleu", True), ("chrf", "chrf", True), ("ter", "ter", False))
OWN = {**TASKS["go_on"], "process_results": "!function surprise"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tasks(
        tmp_path_factory.mktemp("tasks"),
        rolling=ROLLING,
        choose={**TASKS["choose"], "metric_list": [*CHOOSE, *TASKS["choose"]["metric_list"]]},
        brier={**TASKS["choose"], "metric_list": [CHOOSE[-1]]},
        say={**TASKS["say"], "metric_list": [*SAY, *TASKS["say"]["metric_list"]]},
        translate={**TASKS["say"], "metric_list": SAY},
        average={**OWN, "metric_list": metrics(("nats", "!function average", True))},
        nan_average={**OWN, "metric_list": metrics(("nats", "nanmean", True))},
        best={**OWN, "metric_list": metrics(("nats", "!function best", True))},
        middle={**OWN, "metric_list": metrics(("nats", "median", True))},
        costly={**OWN, "metric_list": metrics(("nats", "mean", False))},
    )
    lines = [json.loads(line) for line in (folder / "shop.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["choices"] = line["choices"][: 4 - number % 2]
        line["gold"] %= len(line["choices"])
    (folder / "uneven.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_task(folder, "uneven", folder / "uneven.jsonl", {**TASKS["choose"], "metric_list": [CHOOSE[-1]]})
    texts = [{**line, "answer": answer} for line, answer in zip(lines, ["", "a  long\nanswer é"], strict=False)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    write_task(folder, "texts", folder / "texts.jsonl", ROLLING)
    (folder / "nothing.jsonl").write_text(json.dumps(texts[0]) + "\n")
    write_task(folder, "nothing", folder / "nothing.jsonl", ROLLING)
    return folder


@pytest.fixture(scope="module")
def loaded(tasks: Path) -> dict[str, Any]:
    return load_tasks(sorted({path.stem for path in tasks.glob("*.yaml")}), tasks, {})


def refusal(loaded: dict[str, Any], name: str, metric: str | None, kind: Kind) -> str:
    with pytest.raises(UserError) as caught:
        choose_metric(loaded[name], metric, kind)
    assert str(caught.value).startswith(f"task {name}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("say", "bleu"),
        ("say", "chrf"),
        ("say", "ter"),
        ("choose", "mcc"),
        ("choose", "f1"),
        ("shop_go_on", "perplexity"),
    ],
)
@pytest.mark.parametrize("kind", ["domain", "shown"])
def test_a_metric_of_the_corpus_is_refused_with_those_that_can_be_used(
    loaded: dict[str, Any], name: str, metric: str, kind: Kind
) -> None:
    told = refusal(loaded, name, metric, kind)
    usable = {"say": "use exact_match", "choose": "use acc or acc_norm", "shop_go_on": "use acc"}[name]
    assert f"metric: {metric}: " in told and "corpus" in told and usable in told
    assert "held_out" not in told and ("brier_score" in told) == (name == "choose" and kind == "shown")


def test_a_task_with_metrics_of_the_corpus_only_is_to_be_removed(loaded: dict[str, Any]) -> None:
    told = refusal(loaded, "translate", None, "general")
    assert "bleu, chrf, ter: " in told and "corpus" in told and "remove it" in told
    assert "remove it" in refusal(loaded, "translate", "bleu", "shown")


def test_without_a_name_the_first_score_per_document_is_taken(loaded: dict[str, Any]) -> None:
    found = {
        name: choose_metric(loaded[name], None, "general") for name in ("say", "choose", "shop_go_on", "shop_choose")
    }
    assert [metric.key for metric in found.values()] == ["exact_match", "acc", "acc", "acc"]
    assert {metric.unit for metric in found.values()} == {"points"}
    assert choose_metric(loaded["choose"], None, "shown").key == "acc"
    assert choose_metric(loaded["choose"], None, "general", ["f1", "acc_norm"]).key == "acc_norm"


def test_what_is_a_mean_is_found_by_what_a_function_does(loaded: dict[str, Any]) -> None:
    assert [choose_metric(loaded[name], None, "domain").key for name in ("average", "nan_average")] == ["nats"] * 2
    for name in ("best", "middle"):
        assert "corpus" in refusal(loaded, name, None, "domain")
    assert "lower is better" in refusal(loaded, "costly", "nats", "shown")


@pytest.mark.parametrize("name", ["rolling", "brier"])
@pytest.mark.parametrize("kind", ["domain", "general"])
def test_losses_are_only_shown(loaded: dict[str, Any], name: str, kind: Kind) -> None:
    loss = {"rolling": "bits_per_byte", "brier": "brier_score"}[name]
    for metric in (None, loss):
        told = refusal(loaded, name, metric, kind)
        assert loss in told and "`kind: shown`" in told and "remove" not in told


@pytest.mark.parametrize(
    ("name", "metric", "unit"),
    [
        ("rolling", None, "bits per byte"),
        ("rolling", "bits_per_byte", "bits per byte"),
        ("rolling", "byte_perplexity", "byte perplexity"),
        ("rolling", "word_perplexity", "word perplexity"),
        ("texts", "bits_per_byte", "bits per byte"),
        ("texts", "word_perplexity", "word perplexity"),
        ("brier", None, "Brier score"),
        ("choose", "brier_score", "Brier score"),
    ],
)
def test_losses_of_documents_make_exactly_lm_eval_s_loss(
    loaded: dict[str, Any], name: str, metric: str | None, unit: str
) -> None:
    task = loaded[name]
    documents, result, samples = answers(task, metric)
    assert result.unit == unit and result.is_loss and result.chance is result.majority is None
    key = result.metric
    theirs = task.aggregation()[key]([sample[key] for sample in samples])
    assert in_unit(result) == pytest.approx(theirs, rel=1e-12, abs=0)
    assert min(document.score for document in documents) >= 0 and len({d.score for d in documents}) > 1
    if name == "rolling":
        assert [d.prompt for d in documents] == [sample["doc"]["answer"] for sample in samples]
        lengths = [len(d.prompt.split()) if "word" in key else len(d.prompt.encode()) for d in documents]
        assert [d.weight for d in documents] == lengths
    if name == "texts":
        assert documents[0].prompt == "" and documents[0].score == 0


def answers(task: Any, metric: str | None) -> tuple[tuple[Document, ...], TaskResult, list[dict[str, Any]]]:
    """The documents, the result of the task, and lm-eval's samples."""
    chosen = choose_metric(task, metric, "shown")
    asked = ask(task, TaskEntry(task="any"), chosen, None)
    samples = run_task(Harness(make_model(), make_tokenizer(), batch_size=4), task, None, False)
    documents = documents_of(asked, samples, frozenset())
    result = TaskResult(
        "any", "any", "shown", chosen.key, "1", {}, documents, asked.chance, asked.majority, chosen.unit
    )
    return documents, result, samples


def test_the_brier_score_is_also_that_of_tasks_with_different_numbers_of_choices(loaded: dict[str, Any]) -> None:
    documents, _, samples = answers(loaded["uneven"], None)
    with pytest.raises(ValueError, match="inhomogeneous"):
        loaded["uneven"].aggregation()["brier_score"]([sample["brier_score"] for sample in samples])
    for document, sample in zip(documents, samples, strict=True):
        right, given = sample["brier_score"]
        expected = sum((p - (place == right)) ** 2 for place, p in enumerate(given))
        assert (document.score, document.weight) == (pytest.approx(expected, rel=1e-12), 1)


def test_a_task_of_empty_texts_has_no_loss(loaded: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^task nothing: .*empty"):
        answers(loaded["nothing"], None)


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("shop_choose", "acc", 1.5),
        ("shop_choose", "acc", (1, 2)),
        ("shop_choose", "acc", float("nan")),
        ("brier", "brier_score", (-100, [0.5, 0.5])),
        ("brier", "brier_score", ([0, 1], [0.5, 0.5])),
        ("rolling", "bits_per_byte", (float("-inf"), 3)),
    ],
)
def test_values_that_are_none_are_refused_by_document(
    loaded: dict[str, Any], name: str, metric: str, value: Any
) -> None:
    chosen = choose_metric(loaded[name], metric, "shown")
    with pytest.raises(UserError, match=rf"^task {name}: metric: {metric}: .*document 7 ") as caught:
        value_of(chosen, loaded[name], {"doc_id": 7, "metrics": [metric], metric: value})
    others = {"shop_choose": "use acc_norm", "brier": "remove the task", "rolling": "word_perplexity"}
    assert others[name] in str(caught.value)
