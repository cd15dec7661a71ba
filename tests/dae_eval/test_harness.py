"""lm-eval through our door: right scores, nothing printed, nothing left changed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from asked_tasks import answers, asked
from dae_eval.answers import task_settings
from dae_eval.benchmarks import load_tasks
from dae_eval.harness import Harness, chat_renderer, generation_settings, refuse_unfit_length, run_task
from dae_eval.suites import TASKS as SHIPPED
from pico import make_model, make_tokenizer
from pico_tasks import TASKS, make_tasks
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.real_pair_scores import score_tasks
from dae.demo import world
from dae.demo.model import build_tokenizer
from kd.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "heldout").mkdir()
    for name, records in world.files():
        if name.startswith("heldout/"):
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records[:24]))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> list[float]:
    """Accuracy from the definition: one choice at a time, no padding."""
    scores = []
    for line in path.read_text().splitlines():
        document = json.loads(line)
        sums = []
        for choice in document["choices"]:
            start = len(tokenizer(document["context"]).input_ids)
            ids = torch.tensor([tokenizer(document["context"] + " " + choice).input_ids])
            logs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
            sums.append(sum(logs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        scores.append(float(int(np.argmax(sums)) == document["gold"]))
    return scores


def test_scores_equal_the_definition(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = ["world_sorting", "world_category", "world_compatibility"]
    results = score_tasks(model, tokenizer, tasks, include_path=SHIPPED, metadata={"world": str(folder)}, batch_size=7)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    model.eval()
    assert list(results) == tasks
    for task, scores in results.items():
        expected = by_hand(model, tokenizer, folder / "heldout" / f"{task.removeprefix('world_')}.jsonl")
        assert [document.score for document in scores.documents] == expected
        assert 0 < scores.mean < 1
        assert scores.mean == pytest.approx(sum(expected) / len(expected))
        assert [document.id for document in scores.documents] == list(range(24))
        assert len({document.hash for document in scores.documents}) == 24
        assert (scores.version, scores.metric) == ("1", "acc")


def global_random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_nothing_is_left_changed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = global_random_states()
    limited = score_tasks(
        model, tokenizer, ["world_sorting"], include_path=SHIPPED, metadata={"world": str(folder)}, limit=5
    )
    assert [module.training for module in model.modules()] == modes
    assert global_random_states() == states
    assert len(limited["world_sorting"].documents) == 5


def test_every_skill_and_kind_has_its_task() -> None:
    tasks = {path.stem for path in (SHIPPED / "world").glob("[a-z]*.yaml")}
    assert tasks == set(world.GENERAL_SKILLS + world.SHOP_KINDS)


def test_an_unknown_metric_is_reported(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    with pytest.raises(UserError, match=r"world_sorting: .*'f1'.* acc"):
        score_tasks(
            model,
            tokenizer,
            ["world_sorting"],
            include_path=SHIPPED,
            metadata={"world": str(folder)},
            metric="f1",
            limit=2,
        )


# -- what lm-eval and the model's own settings must not do -------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampling = {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 5}
    nats = [{"metric": "nats", "aggregation": "mean", "higher_is_better": True}]
    shots = {"fewshot_split": None, "num_fewshot": 2}
    return make_tasks(
        tmp_path_factory.mktemp("tasks"),
        sampled={**TASKS["say"], "generation_kwargs": sampling},
        filtered={**TASKS["say"], "filter_list": FILTERS},
        rolling={"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "answer"},
        costly={**TASKS["go_on"], "process_results": "!function surprise", "metric_list": nats},
        endings=ENDINGS,
        alone={**TASKS["choose"], **shots},
    )


FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    {"name": "all", "filter": [{"function": "take_first"}]},
]
ENDINGS = {  # the choices are the beginnings of one ending, as in winogrande
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "choices",
    "doc_to_target": "{{question}}",
}


def test_generation_settings_of_the_model_have_no_say(tasks: Path) -> None:
    plain, talkative = make_model(), make_model()
    own = {"max_new_tokens": 1, "do_sample": True, "temperature": 9.0, "repetition_penalty": 7.0, "num_beams": 2}
    talkative.generation_config = GenerationConfig(**own, eos_token_id=2, pad_token_id=0)
    before = talkative.generation_config.to_dict()
    say = asked(tasks, "shop_say")
    assert answers(say, talkative) == answers(say, plain)
    assert talkative.generation_config.to_dict() == before
    assert max(len(document.answer) for document in answers(say, talkative)) > 3


def test_written_answers_are_the_greedy_ones_up_to_the_task_s_length(tasks: Path) -> None:
    model, tokenizer, say = make_model(), make_tokenizer(), asked(tasks, "shop_say")
    for document in answers(say, model, batch_size=5):
        ids = tokenizer(document.prompt).input_ids
        written: list[int] = []
        while len(written) < 6 and 2 not in written:
            with torch.no_grad():
                written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert document.answer == tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]


def test_answers_that_are_drawn_are_the_same_each_time_and_leave_no_trace(tasks: Path) -> None:
    sampled, model = asked(tasks, "sampled"), make_model()
    first = answers(sampled, model)
    torch.manual_seed(77)
    states = global_random_states()
    assert answers(sampled, model) == first
    assert global_random_states() == states


def test_requests_that_are_too_long_are_counted_and_not_talked_about(
    tasks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose, tokenizer = asked(tasks, "shop_choose"), make_tokenizer()
    lengths = [
        len(tokenizer(question.text + " " + choice).input_ids)
        for question in choose.questions
        for choice in question.choices
    ]
    room = sorted(lengths)[len(lengths) // 2]
    harness = Harness(make_model(), tokenizer, batch_size=4, max_length=room)
    run_task(harness, choose.task, None, False)
    assert harness.truncated == sum(length > room + 1 for length in lengths) > 0
    say = asked(tasks, "shop_say")
    prompts = [len(tokenizer(question.text).input_ids) for question in say.questions]
    room = sorted(prompts)[6]
    harness = Harness(make_model(), tokenizer, batch_size=4, max_length=room + 6)
    run_task(harness, say.task, None, False)
    assert harness.truncated == sum(length > room for length in prompts) > 0
    assert caplog.text == ""


def test_progress_is_reported_by_requests(tasks: Path) -> None:
    found: list[tuple[int, int]] = []
    choose = asked(tasks, "shop_choose", limit=3)
    harness = Harness(make_model(), make_tokenizer(), batch_size=4, progress=lambda *counts: found.append(counts))
    run_task(harness, choose.task, 3, False)
    assert found == [(done, 12) for done in range(1, 13)]


def test_what_was_chosen_is_readable_and_agrees_with_the_metric(tasks: Path) -> None:
    model = make_model()
    for metric in ("acc", "acc_norm"):
        choose = asked(tasks, "shop_choose", metric=metric)
        documents = answers(choose, model)
        for document, question in zip(documents, choose.questions, strict=True):
            assert document.answer in question.choices and document.target in question.choices
            assert document.score == (document.answer == document.target)
    assert {document.score for document in documents} == {0.0, 1.0}
    assert choose.chance == 0.25
    most = max(Counter(question.target for question in choose.questions).values())
    assert choose.majority == (most / 12 if most > 1 else None)


def test_beginnings_to_choose_from_are_readable(tasks: Path) -> None:
    endings = asked(tasks, "endings")
    for document, question in zip(answers(endings, make_model()), endings.questions, strict=True):
        assert question.text.startswith("What comes after")
        assert document.prompt.count(question.text) == 4 and document.answer in question.choices
        assert document.score == (document.answer == document.target)


def test_a_continuation_says_whether_it_would_be_said(tasks: Path) -> None:
    documents = answers(asked(tasks, "shop_go_on"), make_model())
    assert all(
        document.answer.startswith("(something else is likelier") for document in documents if not document.score
    )
    assert all(document.answer == document.target for document in documents if document.score)


def test_the_metric_is_the_first_score_or_the_one_that_is_named(tasks: Path) -> None:
    assert asked(tasks, "shop_choose").metric.key == "acc"
    assert asked(tasks, "shop_go_on").metric.key == "acc"
    assert asked(tasks, "filtered").metric.key == "exact_match,first"
    first, whole = (
        answers(asked(tasks, "filtered", metric=f"exact_match,{name}"), make_model()) for name in ("first", "all")
    )
    assert [document.answer for document in first] == [document.answer[:1] for document in whole]
    assert max(len(document.answer) for document in whole) > 1


@pytest.mark.parametrize(
    ("name", "metric", "what"),
    [
        ("rolling", None, "bits_per_byte: .*kind: shown"),
        ("shop_go_on", "perplexity", "metric: perplexity: .*use acc$"),
        ("shop_choose", "f1", "acc, acc_norm.*metric: 'f1'"),
        ("shop_choose", "acc_bytes", "acc, acc_norm.*metric: 'acc_bytes'"),
        ("filtered", "exact_match,last", "first, all; metric: 'exact_match,last'"),
    ],
)
def test_a_metric_that_is_not_a_score_is_refused(tasks: Path, name: str, metric: str | None, what: str) -> None:
    with pytest.raises(UserError, match=f"^task {name}: .*{what}"):
        asked(tasks, name, metric=metric)


def test_values_that_are_not_scores_are_refused(tasks: Path) -> None:
    with pytest.raises(UserError, match=r"^task costly: metric: nats: .* document 0 "):
        answers(asked(tasks, "costly"), make_model())


@pytest.mark.parametrize("key", ["cluster_by", "leak_by"])
def test_fields_of_documents_are_looked_up_by_name(tasks: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: page: .* question, choices"):
        asked(tasks, "shop_choose", **{key: "page"})
    chosen = asked(tasks, "shop_choose", **{key: "source"}).questions
    assert [getattr(question, key.removesuffix("_by")) for question in chosen] == [f"page {n // 3}" for n in range(12)]


def test_shots_are_those_of_lm_eval_s_seed_and_never_the_document_itself(tasks: Path) -> None:
    prompts = [document.prompt for document in answers(asked(tasks, "shop_choose", shots=2), make_model())]
    assert prompts == [document.prompt for document in answers(asked(tasks, "shop_choose", shots=2), make_model())]
    assert all(prompt.count("What comes after") == 3 for prompt in prompts)
    plain = asked(tasks, "shop_choose")
    assert [q.cluster for q in plain.questions] == [q.cluster for q in asked(tasks, "shop_choose", shots=2).questions]
    with pytest.raises(UserError, match=r"^task alone: shots: 2:"):
        asked(tasks, "alone")


def test_documents_that_cannot_be_loaded_are_reported(tmp_path: Path) -> None:
    folder = make_tasks(tmp_path)
    (folder / "shop.jsonl").unlink()
    with pytest.raises(UserError, match=r"^task shop_say: .*FileNotFoundError: .*shop\.jsonl"):
        load_tasks(["shop_say"], folder, {})


def test_a_chat_template_changes_prompts_and_drops_the_delimiter_and_says_so(tasks: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    harness = Harness(make_model(), tokenizer, batch_size=4)
    chatting, plain = (
        asked(tasks, "shop_choose", chat_renderer(tokenizer), shots=1),
        asked(tasks, "shop_choose", shots=1),
    )
    assert chatting.requests != plain.requests
    (sample, *_) = run_task(harness, chatting.task, None, True)
    prompt, continuation = sample["arguments"][0]
    assert prompt.startswith("[user] What") and prompt.endswith("[assistant]") and prompt.count("[user]") == 2
    assert not continuation.startswith(" ")
    with_template, without = task_settings(chatting, "a" * 64, None), task_settings(plain, None, None)
    assert (with_template["target_delimiter"], without["target_delimiter"]) == ("", " ")
    assert with_template["chat_template_sha256"] == "a" * 64
    assert {key for key in without if without[key] != with_template[key]} == {
        "target_delimiter", "chat_template_sha256", "shots_as_turns",
    }  # fmt: skip


def test_a_task_s_definition_is_known_again_by_its_content(tasks: Path, tmp_path: Path) -> None:
    again = make_tasks(tmp_path / "again")
    here, there = (task_settings(asked(folder, "shop_say"), None, None)["task_sha256"] for folder in (tasks, again))
    assert here == there == task_settings(asked(tasks, "shop_say", shots=3), None, None)["task_sha256"]
    assert here != task_settings(asked(tasks, "sampled"), None, None)["task_sha256"]


def test_room_for_answers_is_looked_for_before(tasks: Path) -> None:
    model, tokenizer = make_model(max_position_embeddings=64), make_tokenizer()
    loaded = load_tasks(["shop_say"], tasks, {})
    assert refuse_unfit_length(loaded, model.config, tokenizer, None, "base") == 64
    with pytest.raises(UserError, match=r"^max_length: 65: .*max_length=64"):
        refuse_unfit_length(loaded, model.config, tokenizer, 65, "base")
    with pytest.raises(UserError, match=r"^task shop_say: .*max_gen_toks"):
        refuse_unfit_length(loaded, model.config, tokenizer, 6, "base")
    assert generation_settings(loaded["shop_say"]) == {
        "do_sample": False, "temperature": 0.0, "until": ["\n"], "max_gen_toks": 6,
    }  # fmt: skip
