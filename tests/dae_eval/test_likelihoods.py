"""Likelihoods that lm-eval returns: of long texts, of texts cut in two ways, and those that are not numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asked_tasks import answers, asked
from dae_eval.harness import Harness, run_task
from lm_eval.api.instance import Instance
from pico import make_model, make_tokenizer
from pico_tasks import TASKS, make_tasks

from kd.errors import UserError


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampling = {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 5}
    return make_tasks(
        tmp_path_factory.mktemp("tasks"),
        sampled={**TASKS["say"], "generation_kwargs": sampling},
        rolling={"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "answer"},
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_rolling_likelihoods_are_those_of_all_tokens_each_in_its_window(tasks: Path, batch_size: int) -> None:
    rolling = asked(tasks, "rolling", kind="shown")
    model, tokenizer, room = make_model(), make_tokenizer(), 5
    progress: list[tuple[int, int]] = []
    harness = Harness(
        model, tokenizer, batch_size=batch_size, max_length=room, progress=lambda *counts: progress.append(counts)
    )
    samples = run_task(harness, rolling.task, None, False)
    windows = 0
    for sample in samples:
        ids = tokenizer(sample["doc"]["answer"]).input_ids
        starts = range(0, len(ids), room)
        windows += len(starts)
        expected = 0.0
        for start in starts:  # the window ends with its last token, and is as long as the context allows
            end = min(start + room, len(ids))
            before = ids[max(0, end - room - 1) : end - 1] if start else [tokenizer.bos_token_id, *ids[: end - 1]]
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([before])).logits[0].double(), dim=-1)
            expected += sum(float(logs[place - end, ids[place]]) for place in range(start, end))
        assert sample["resps"][0][0] == pytest.approx(expected, rel=1e-4)
    assert windows > len(samples) and harness.truncated == 0
    assert progress[-1] == (windows, windows) and [done for done, _ in progress] == sorted({d for d, _ in progress})


def test_one_text_cut_in_two_ways_has_two_likelihoods(tasks: Path) -> None:
    cuts = [("red green", " blue one two"), ("red green blue", " one two"), ("red green blue one", " two")]
    harness = Harness(make_model(), make_tokenizer(), batch_size=4)
    requests = [Instance("loglikelihood", {}, cut, 0) for cut in cuts]
    alone = [harness.loglikelihood([request])[0][0] for request in requests]
    assert [value for value, _ in harness.loglikelihood(requests)] == pytest.approx(alone, rel=1e-5)
    assert len({round(value, 3) for value in alone}) == 3


# -- models whose weights are finite and whose logits are not ----------------------------------------------------------


def broken(value: float) -> Any:
    """A model whose logits overflow to infinities of both signs, or (of a smaller weight) do not."""
    model: Any = make_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(value * model.lm_head.weight.sign())
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("shop_choose", {}),
        ("shop_go_on", {}),
        ("rolling", {"kind": "shown"}),
        ("shop_say", {}),
        ("sampled", {}),
        ("shop_choose", {"shots": 1}),
    ],
)
def test_a_model_whose_likelihoods_are_not_numbers_is_refused(tasks: Path, name: str, settings: dict[str, Any]) -> None:
    one = asked(tasks, name, **settings)
    with pytest.raises(UserError, match=rf"^runs/broken: task {name}: document \d+: .*NaN.*float32.*checkpoint"):
        answers(one, broken(3e38), name="runs/broken")
    assert answers(one, broken(1.0))  # and the same task with another model is asked as ever


@pytest.mark.parametrize("name", ["shop_choose", "shop_go_on", "rolling", "shop_say"])
def test_the_document_that_has_no_number_is_named(tasks: Path, name: str) -> None:
    one = asked(tasks, name, kind="shown")
    model: Any = make_model()
    tokenizer = make_tokenizer()
    (special,) = [q for q in one.questions if q.id == 7]
    text = special.leak.strip() if name == "rolling" else special.text
    start = tokenizer(text).input_ids

    def spoil(_module: Any, _inputs: Any, named: Any, output: Any) -> Any:
        for row, ids in enumerate(named["input_ids"].tolist() if "input_ids" in named else _inputs[0].tolist()):
            if any(ids[place : place + len(start) - 1] == start[:-1] for place in range(len(ids))):
                output.logits[row] = float("nan")
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(UserError, match=rf"task {name}: document 7: "):
        answers(one, model, batch_size=4)


def test_a_token_that_is_ruled_out_is_no_failure(tasks: Path) -> None:
    model: Any = make_model()
    (space, *_) = make_tokenizer()(" ").input_ids

    def rule_out(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits[..., space] = -float("inf")
        return output

    model.register_forward_hook(rule_out)
    assert all(document.score == 0 for document in answers(asked(tasks, "shop_go_on"), model))
    assert answers(asked(tasks, "shop_say"), model)
