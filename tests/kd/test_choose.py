"""Choosing a teacher: every number against its definition in float64, whatever the batches and the padding."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import make_checkpoint, make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from dae.rank_teachers.car import RESAMPLES, Measured, Ranking, compatibility_adjusted_reward, rank, resampled_means
from dae.rank_teachers.folder import RankFolder
from dae.rank_teachers.recipe import RankRecipe, answers
from dae.rank_teachers.responses import Response, prompt_key, read_responses, response_of, same_prompts
from dae.rank_teachers.rewards import (
    encode_conversations,
    open_reward_model,
    open_tokenizer,
    padding_id,
    reward_config,
    rewards_of,
)
from dae.rank_teachers.student_losses import encode_responses, losses_of, open_student, without_prompt
from kd.config.loading import load_recipe
from kd.data.token_rows import TokenRow
from kd.errors import UserError
from kd.models.checkpoint import checkpoint
from kd.models.roles import LoadSettings, Role

F64 = LoadSettings(torch.float64)
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
ASK = CHAT + "{% if add_generation_prompt %}[assistant]{% endif %}"


def classifier(seed: int = 0, **config: Any) -> LlamaForSequenceClassification:
    """A pico reward model in float64."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**shape, "vocab_size": 288, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 2} | config
    model = LlamaForSequenceClassification(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.double().eval()


def token_rows(count: int = 13, seed: int = 0, low: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    return [[1, *(draw.randrange(low, 288) for _ in range(draw.randrange(1, 20)))] for _ in range(count)]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def measured(rewards: Sequence[float], losses: Sequence[float]) -> Measured:
    alone = [loss * (1.1 + place / 10) for place, loss in enumerate(losses)]
    return Measured(rewards, losses, alone, [3 + place for place in range(len(losses))])


THREE = {
    "a": measured([2.0, 3.0, 4.0, 3.5], [4.0, 5.0, 6.0, 4.5]),
    "b": measured([1.5, 2.0, 2.5, 2.2], [0.5, 1.0, 1.5, 0.7]),
    "c": measured([-0.5, 0.5, 1.0, 0.1], [2.0, 2.5, 2.0, 2.2]),
}
BETAS = (0.0, 0.1, 1.0, 10.0)


def ranked(measured: dict[str, Measured], betas: Sequence[float] = BETAS, **settings: Any) -> Ranking:
    rows = len(next(iter(measured.values())).rewards)
    return rank(measured, list(range(rows)), betas, **({"shift": False, "seed": 0} | settings))


@pytest.mark.parametrize("shift", [False, True])
def test_every_number_follows_its_definition(shift: bool) -> None:
    ranking = ranked(THREE, shift=shift)
    offset = 0.5 if shift else 0.0  # the lowest of all rewards is -0.5
    assert ranking.shift == (offset if shift else None)
    assert (ranking.prompts, ranking.rows) == (4, 4)
    expected: dict[float, dict[str, float]] = {beta: {} for beta in BETAS}
    for facts in ranking.facts:
        rows = THREE[facts.name]
        reward, loss = sum(rows.rewards) / 4, sum(rows.losses) / 4
        assert facts.reward.value == pytest.approx(reward, rel=1e-12)
        assert facts.loss.value == pytest.approx(loss, rel=1e-12)
        nats = [one * tokens for one, tokens in zip(rows.losses, rows.tokens, strict=True)]
        assert facts.loss_over_tokens == pytest.approx(sum(nats) / sum(rows.tokens), rel=1e-12)
        assert facts.tokens == 4.5
        assert facts.ifd == pytest.approx(sum(1 / (1.1 + place / 10) for place in range(4)) / 4, rel=1e-12)
        assert facts.perplexity == pytest.approx(sum(math.exp(one) for one in rows.losses) / 4, rel=1e-12)
        for beta in BETAS:
            expected[beta][facts.name] = (reward + offset) / (1 + beta * loss)
    for at in ranking.sweep:
        found = {place.name: place.car.value for place in at.places}
        assert found == pytest.approx(expected[at.beta], rel=1e-12)
        assert [place.name for place in at.places] == sorted(found, key=lambda name: -found[name])


def test_candidates_change_places_where_their_cars_are_equal() -> None:
    ranking = ranked(THREE)
    mean = {name: (sum(rows.rewards) / 4, sum(rows.losses) / 4) for name, rows in THREE.items()}

    def car(name: str, beta: float) -> float:
        reward, loss = mean[name]
        return reward / (1 + beta * loss)

    assert [(crossing.below, crossing.above) for crossing in ranking.crossings] == [("a", "b")]
    (crossing,) = ranking.crossings
    assert car("a", crossing.beta) == pytest.approx(car("b", crossing.beta), rel=1e-12)
    assert car("a", crossing.beta * 0.9) > car("b", crossing.beta * 0.9)
    assert car("a", crossing.beta * 1.1) < car("b", crossing.beta * 1.1)
    assert ranked(THREE, betas=(0.0, crossing.beta * 0.9)).crossings == ()
    assert ranked(THREE, betas=(crossing.beta * 1.1, 10.0)).crossings == ()


def test_a_negative_mean_reward_is_refused_and_a_shift_orders_by_reward_then() -> None:
    rows = {"low": measured([-3.0, -2.0], [1.0, 1.0]), "lower": measured([-4.0, -5.0], [9.0, 9.0])}
    # The discount turned around: the worse reward with the greater loss would come first.
    car = {name: compatibility_adjusted_reward(np.mean(r.rewards), np.mean(r.losses), 5.0) for name, r in rows.items()}
    assert car["lower"] > car["low"]
    with pytest.raises(UserError, match=r"mean reward is negative \(low -2\.5, lower -4\.5\).*set shift=true"):
        ranked(rows)
    assert [place.name for place in ranked(rows, shift=True).sweep[-1].places] == ["low", "lower"]


def test_intervals_are_those_of_the_mean_and_paired() -> None:
    draw = np.random.default_rng(5)
    hard = draw.normal(10.0, 3.0, 400)  # how a prompt is, for everybody
    near = {
        "one": measured((hard + draw.normal(0.2, 0.3, 400)).tolist(), [1.0] * 400),
        "two": measured((hard + draw.normal(0.0, 0.3, 400)).tolist(), [1.0] * 400),
        "same": measured([], []),
    }
    near["same"] = near["two"]
    first, *rest = ranked(near, betas=(0.0,)).sweep[0].places
    for place in (first, *rest):
        rewards = np.asarray(near[place.name].rewards)
        half = 1.96 * rewards.std() / 20
        assert (place.car.high - place.car.low) / 2 == pytest.approx(half, rel=0.1)
    # Unpaired, a lead of 0.2 would drown in intervals of +-0.3; paired it is clear.
    assert (first.name, first.best, first.worst, first.behind) == ("one", 1, 1, None)
    assert [(place.best, place.worst) for place in rest] == [(2, 3), (2, 3)]
    assert [place.tied for place in rest] == [False, True]
    tie = rest[1].behind
    assert tie is not None
    assert (tie.value, tie.low, tie.high) == (0.0, 0.0, 0.0)


def test_rows_of_one_prompt_are_resampled_together() -> None:
    draw = np.random.default_rng(6)
    values = draw.normal(0.0, 1.0, (2, 60))
    once = resampled_means(values, np.arange(60), 60, seed=1)
    twice = resampled_means(np.repeat(values, 2, axis=1), np.repeat(np.arange(60), 2), 60, seed=1)
    np.testing.assert_allclose(once, twice, rtol=1e-12)
    assert once.shape == (RESAMPLES, 2)
    # Prompts with more rows weigh more: the mean is over rows, on every resample.
    uneven = resampled_means(np.array([[1.0, 1.0, 1.0, 5.0]]), np.array([0, 0, 0, 1]), 2, seed=1)
    assert set(np.unique(uneven.round(12))) == {1.0, 2.0, 5.0}


def test_one_prompt_ranks_nobody() -> None:
    with pytest.raises(UserError, match="all rows have the same prompt"):
        rank(THREE, [0, 0, 0, 0], BETAS, shift=False, seed=0)


# -- rewards -----------------------------------------------------------------------------------------------------------


def read_off(model: LlamaForSequenceClassification, row: list[int], position: int = -1) -> float:
    """The head on the hidden state of one position of a lone row, without the classifier's own search for it."""
    with torch.no_grad():
        hidden_TD = model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        return float(model.score(hidden_TD[position]))


@pytest.mark.parametrize("pad", [0, None, -1])
@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_rewards_are_read_at_the_last_token_of_each_row(pad: int | None, batch_size: int) -> None:
    rows = token_rows(low=4 if pad == 0 else 0)  # without a pad token of its own, any token may end a row
    model = classifier(pad_token_id=pad)
    expected = [read_off(model, row) for row in rows]
    assert rewards_of(model, rows, batch_size) == pytest.approx(expected, rel=1e-7)
    assert max(expected) - min(expected) > 0.1


def test_another_padding_id_would_be_read_instead_of_the_response() -> None:
    """What `padding_id` is for: the classifier compares ids, it does not look at the attention mask."""
    model, rows = classifier(pad_token_id=0), [[1, 50, 60], [1, 50, 60, 70, 80, 90]]
    wrong = torch.tensor([[1, 50, 60, 9, 9, 9], rows[1]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    with torch.no_grad():
        misread = model(input_ids=wrong, attention_mask=mask).logits[:, 0].tolist()
    right = rewards_of(model, rows, 2)
    assert right == pytest.approx([read_off(model, row) for row in rows], rel=1e-7)
    assert abs(misread[0] - right[0]) > 1e-3
    assert padding_id(model, rows) == 0


def test_a_model_that_pads_with_its_end_token_says_in_a_batch_what_it_says_of_a_row_alone() -> None:
    model = classifier(pad_token_id=2)
    rows = [[*row, 2] for row in token_rows(6)]
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([row])).logits) for row in rows]
    assert rewards_of(model, rows, 6) == pytest.approx(alone, rel=1e-7)
    assert alone == pytest.approx([read_off(model, row, -2) for row in rows], rel=1e-7)


def test_an_encoder_is_a_reward_model_too() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=288, num_labels=1)).double().eval()
    rows = token_rows(7)
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([row])).logits) for row in rows]
    assert rewards_of(model, rows, 7) == pytest.approx(alone, rel=1e-7)


def saved_reward_model(folder: Path, template: str | None = CHAT, **config: Any) -> Path:
    classifier(**config).float().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


TALK = (
    Response("r.jsonl:1", ({"role": "user", "content": "red?"},), "blue"),
    Response("r.jsonl:2", "How big is it? ", " two cups"),
)


def test_conversations_are_written_by_the_reward_models_own_template(tmp_path: Path) -> None:
    path = checkpoint(saved_reward_model(tmp_path / "rm"))
    tokenizer = open_tokenizer(path, None, "reward_chat_template", False)
    rows = encode_conversations(TALK, tokenizer, reward_config(path), path)
    asked = [[{"role": "user", "content": "red?"}], [{"role": "user", "content": "How big is it?"}]]
    said = ["blue", "two cups"]
    for row, question, text in zip(rows, asked, said, strict=True):
        whole = [*question, {"role": "assistant", "content": text}]
        assert row == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert row.count(1) == 1  # one BOS


def test_reward_models_that_cannot_judge_are_refused(tmp_path: Path) -> None:
    two = checkpoint(saved_reward_model(tmp_path / "two", num_labels=2))
    with pytest.raises(UserError, match=r"two: has 2 labels"):
        reward_config(two)
    bare = checkpoint(saved_reward_model(tmp_path / "bare", template=None))
    tokenizer = open_tokenizer(bare, None, "reward_chat_template", False)
    with pytest.raises(UserError, match=r"no chat template.*set reward_chat_template"):
        encode_conversations(TALK, tokenizer, reward_config(bare), bare)
    plain = open_tokenizer(bare, "plain", "reward_chat_template", False)
    assert plain.decode(encode_conversations(TALK, plain, reward_config(bare), bare)[0]).startswith("<s>User: red?\n")
    with pytest.raises(UserError, match=r"reward_chat_template: no\.jinja: "):
        open_tokenizer(bare, "no.jinja", "reward_chat_template", False)
    grumpy = checkpoint(saved_reward_model(tmp_path / "grumpy", template="{{ raise_exception('no') }}"))
    tokenizer = open_tokenizer(grumpy, None, "reward_chat_template", False)
    with pytest.raises(UserError, match=r"r\.jsonl:1: the chat template of the reward model .* refuses .*: no"):
        encode_conversations(TALK, tokenizer, reward_config(grumpy), grumpy)
    short = checkpoint(saved_reward_model(tmp_path / "short", max_position_embeddings=8))
    tokenizer = open_tokenizer(short, None, "reward_chat_template", False)
    with pytest.raises(UserError, match=r"r\.jsonl:1: has \d+ tokens, .*reward model .*\(8\).* 2 of 2 rows"):
        encode_conversations(TALK, tokenizer, reward_config(short), short)


def test_a_language_model_does_not_pass_for_a_reward_model(tmp_path: Path) -> None:
    """transformers would give it a head of random numbers, and a warning."""
    make_model(num_labels=1).save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"reward_model: .*score\.weight"):
        open_reward_model(checkpoint(tmp_path / "lm"), F64)
    opened = open_reward_model(checkpoint(saved_reward_model(tmp_path / "rm")), F64)
    rows = token_rows(4)
    expected = [read_off(classifier().float().double(), row) for row in rows]
    assert rewards_of(opened, rows, 4) == pytest.approx(expected, rel=1e-7)


# -- the student's loss ------------------------------------------------------------------------------------------------


def written_out(model: Any, row: TokenRow) -> float:
    """Mean of -log p over the response tokens, from the model's own logits of a lone row."""
    with torch.no_grad():
        log_p_TV = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
    places = [t for t in range(1, len(row.input_ids)) if row.response_mask[t]]
    return -sum(float(log_p_TV[t - 1, row.input_ids[t]]) for t in places) / len(places)


def responses(count: int = 9) -> list[Response]:
    texts = ["two cups", "nine", "a blue kettle of nine coins", "one two three red green"]
    return [Response(f"r.jsonl:{n}", f"Question {n}: how big?", f" {texts[n % 4]} {n}") for n in range(1, count + 1)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_losses_with_and_without_the_prompt_are_those_of_the_definition(family: str) -> None:
    model = make_model(family, dtype=torch.float64)
    rows, cut = encode_responses(responses(), make_tokenizer(), 64, "student")
    alone = [without_prompt(row, make_tokenizer()) for row in rows]
    assert cut == 0
    for row, lone in zip(rows, alone, strict=True):
        response = list(itertools.compress(row.input_ids, row.response_mask))
        assert (lone.input_ids, lone.response_mask) == ([1, *response], [False, *[True] * len(response)])
        assert response[-1] == 2  # the end token is learnt, too
    role = Role("student", model, None)
    for wanted in (rows, alone):
        expected = [written_out(model, row) for row in wanted]
        for batch_size in (1, 4, 9):
            # Norms and softmax compute in float32 inside, whatever the weights.
            assert losses_of(role, wanted, batch_size) == pytest.approx(expected, rel=1e-7)


def test_no_position_is_projected_to_the_vocabulary_by_the_model_itself() -> None:
    model, seen = make_model(dtype=torch.float64), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    rows, _ = encode_responses(responses(), make_tokenizer(), 64, "student")
    losses_of(Role("student", model, None), rows, 4)
    assert set(seen) == {0}


def test_only_the_response_counts_in_a_conversation_and_long_rows_are_cut() -> None:
    tokenizer = make_tokenizer()
    history = (
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "an old answer"},
        {"role": "user", "content": "two?"},
    )
    with pytest.raises(UserError, match=r"r:1: a conversation, but the student s has no chat template; set chat_temp"):
        encode_responses([Response("r:1", history, "three")], tokenizer, 64, "s")
    tokenizer.chat_template = ASK
    (row,), cut = encode_responses([Response("r:1", history, "three")], tokenizer, 200, "s")
    assert (tokenizer.decode(list(itertools.compress(row.input_ids, row.response_mask))), cut) == ("three</s>", 0)
    length = len(row.input_ids)
    (shorter,), cut = encode_responses([Response("r:1", history, "three")], tokenizer, length - 1, "s")
    assert (shorter.input_ids, cut) == (row.input_ids[:-1], 1)
    with pytest.raises(UserError, match=r"r:1: prompt fills max_length.*raise max_length \(4\)"):
        encode_responses([Response("r:1", history, "three")], tokenizer, 4, "s")


def test_a_student_may_be_an_adapter_on_its_base(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    rows, _ = encode_responses(responses(3), make_tokenizer(), 64, "student")
    role = open_student(checkpoint(tmp_path / "adapter"), F64)
    expected = [written_out(adapted.eval(), row) for row in rows]
    assert losses_of(role, rows, 2) == pytest.approx(expected, rel=1e-6)
    plain = losses_of(open_student(checkpoint(base), F64), rows, 2)
    assert max(abs(one - other) for one, other in zip(plain, expected, strict=True)) > 1e-3
    assert str(checkpoint(tmp_path / "adapter").tokenizer_home) == str(base)


def test_rows_that_do_not_fit_the_student_are_told() -> None:
    row = TokenRow([1, *[5] * 300], [False, *[True] * 300])
    with pytest.raises(UserError, match=r"301 tokens.*256 positions; set max_length=256"):
        losses_of(Role("student", make_model("gpt2"), None), [row], 1)
    with pytest.raises(UserError, match=r"token 288"):
        losses_of(Role("student", make_model(), None), [TokenRow([1, 288], [False, True])], 1)


# -- responses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "all of it"}, "has only `text`"),
        ({"prompt": " ", "completion": "x"}, "prompt: "),
        ({"messages": [{"role": "user", "content": "red?"}]}, "ends with user"),
        ({"messages": [{"role": "assistant", "content": "red"}]}, "has no prompt"),
        (
            {
                "prompt": [{"role": "user", "content": "red?"}],
                "completion": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            },
            "ends with assistant, assistant",
        ),
    ],
)
def test_rows_without_one_response_are_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"rows:3: .*{words}"):
        response_of(record, "rows:3")


def test_a_response_that_was_cut_off_stays_so() -> None:
    """Else the student would be asked for an end token that the teacher never wrote."""
    cut = {"finish_reason": "length"}
    pair = {"prompt": "red?", "completion": "blue and"}
    asked, said = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue and"}
    for row in (pair, {"messages": [asked, said]}):
        assert response_of({**row, **cut}, "a:1").record["finish_reason"] == "length"
        assert "finish_reason" not in response_of(row, "a:1").record


def test_both_forms_of_a_conversation_are_the_same_row() -> None:
    asked, said = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}
    one = response_of({"messages": [asked, said]}, "a:1")
    other = response_of({"prompt": [asked], "completion": [said]}, "b:1")
    assert (one.key, one.record, one.conversation) == (other.key, other.record, other.conversation)
    assert response_of({"messages": [asked, said], "tools": [{"name": "f"}]}, "a:2").key != one.key


def test_responses_come_in_the_order_of_the_prompts() -> None:
    expected = [("p:1", prompt_key("one")), ("p:2", prompt_key("two")), ("p:3", prompt_key("one"))]
    found = same_prompts(
        expected, "f", [Response("f:1", "two ", "b"), Response("f:2", "one", "a"), Response("f:3", "one", "c")]
    )
    assert [(response.location, response.response) for response in found] == [("f:2", "a"), ("f:1", "b"), ("f:3", "c")]


def test_other_prompts_are_counted_and_named() -> None:
    expected = [(f"p:{n}", prompt_key(f"prompt {n}")) for n in range(1, 5)]
    given = [Response(f"f:{place}", f"prompt {n}", "x") for place, n in enumerate((1, 1, 7, 4), 1)]
    with pytest.raises(UserError) as caught:
        same_prompts(expected, "f.jsonl", given)
    told = str(caught.value)
    assert told.startswith("f.jsonl: 2 of 4 prompts")
    assert 'first p:2 "prompt 2"' in told and 'first f:2 "prompt 1"' in told
    as_messages = [Response("f:1", ({"role": "user", "content": "prompt 1"},), "x")]
    with pytest.raises(UserError, match="text prompts, the other messages"):
        same_prompts(expected[:1], "f.jsonl", as_messages)


def test_empty_responses_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a", "completion": "x"}\n' + '{"prompt": "b", "completion": " "}\n' * 2)
    with pytest.raises(UserError, match=rf"{path}:2: .*2 of 3 rows of {path}"):
        read_responses(str(path))


# -- recipe and folder -------------------------------------------------------------------------------------------------


def recipe_message(tmp_path: Path, *assignments: str, **flags: Any) -> str:
    (tmp_path / "a.jsonl").touch()
    full = {"student": "s", "reward_model": "r", "output": "o", "candidates.a": str(tmp_path / "a.jsonl")}
    with pytest.raises(UserError) as caught:
        load_recipe(RankRecipe, None, full | flags, assignments)
    return str(caught.value)


def test_mistakes_of_a_recipe(tmp_path: Path) -> None:
    assert "candidates: " in recipe_message(tmp_path)
    two = {"candidates.b": "b.jsonl"}
    assert "betas.1 = -1: must be at least 0" in recipe_message(tmp_path, "betas=[0,-1]", **two)
    assert "betas" in recipe_message(tmp_path, "betas=[1,1]", **two)
    assert "betas" in recipe_message(tmp_path, "betas=[]", **two)
    assert "prompts: " in recipe_message(tmp_path, **{"candidates.b": "org/b"})
    assert "prompts" in recipe_message(tmp_path, prompts="p.jsonl", **two)
    assert "1b" in recipe_message(tmp_path, **{"candidates.1b": "b.jsonl"})
    assert [answers(path) for path in ("gone.jsonl", str(tmp_path), "org/b")] == [False, True, True]
    (tmp_path / "state.json").touch()
    assert not answers(str(tmp_path))  # saved by `datasets`


def test_a_folder_keeps_what_was_computed_and_nothing_of_a_mistake_before(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    folder = RankFolder(str(place), {"seed": 0, "student": "s"})
    with pytest.raises(UserError, match="wrong"), folder.claimed():
        raise UserError("wrong")
    assert not (tmp_path / "deep").exists()
    with folder.claimed():
        assert folder.computed("rewards", "a") is None
        folder.keep("rewards", "a", {"rewards": [1.5]})
    with RankFolder(str(place), {"seed": 0, "student": "s"}).claimed():
        assert folder.computed("rewards", "a") == {"rewards": [1.5]}
