"""What a judge's reply says: after its reasoning, as FastChat reads it and strictly."""

from __future__ import annotations

import pytest
from dae_eval.judging.asking import FILTERED, LENGTH, NO_CHOICES, NO_CONTENT, NO_ROOM, Reply
from dae_eval.judging.fastchat_files import NO_RATING
from dae_eval.judging.readings import OFF_SCALE, SEVERAL, TRUNCATED, after_reasoning, rating_of, verdict_of


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[8]]", 8),
        ("[[7.5]] and then [[9]]", 7.5),
        ("only [4]", 4),
        ("[[8]] of [10]", 8),
        ("Rating: 8", NO_RATING),
        ("[[8/10]]", NO_RATING),
        ("[[11]]", 11),
        ("e.g. [[5]] would be too low: [[8]]", 5),
        ("", NO_RATING),
        ("Rating: [[7]]. The answer leaks a stray `<think>` tag.", 7),
        ("Rating: [[4]]. The answer ends in a stray `</think>` tag.", 4),
        ("<thinking_process>[[3]]</thinking_process>[[8]]", 8),
        ("<internal_monologue>[[3]]</internal_monologue>[[8]]", 8),
        ("<think>[[2]]</think>", NO_RATING),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(text: str, rating: float) -> None:
    assert rating_of(Reply(text, "stop"), strictly=False)[0] == rating


@pytest.mark.parametrize(
    ("text", "rating", "problem"),
    [
        ("Rating: [[8]]", 8, ""),
        ("[[8]], that is [[8.0]]", 8, ""),
        ("only [4]", 4, ""),
        ("[[8]] of [10]", 8, ""),
        ("e.g. [[5]] would be too low: [[8]]", NO_RATING, SEVERAL["rating"]),
        ("[1] says so, [2] not", NO_RATING, SEVERAL["rating"]),
        ("Rating: 8", NO_RATING, "without a rating"),
        ("[[11]]", 11, OFF_SCALE),
        ("[[0]]", 0, OFF_SCALE),
    ],
)
def test_strictly_a_reply_has_one_rating_on_the_scale(text: str, rating: float, problem: str) -> None:
    assert rating_of(Reply(text, "stop"), strictly=True) == (rating, problem)


@pytest.mark.parametrize(
    ("text", "winner", "strictly"),
    [
        ("[[A]]", "model_1", "model_1"),
        ("[[C]]", "tie", "tie"),
        ("[[B]] and again [[B]]", "model_2", "model_2"),
        ("[[B]] or [[A]]", "model_1", "error"),
        ("[A]", "error", "error"),
        ("<think>[[A]]? no</think> [[B]]", "model_2", "model_2"),
    ],
)
def test_verdicts(text: str, winner: str, strictly: str) -> None:
    reply = Reply(text, "stop")
    assert verdict_of(reply, "model_1", "model_2", strictly=False)[0] == winner
    found, problem = verdict_of(reply, "model_1", "model_2", strictly=True)
    assert (found, problem == "") == (strictly, strictly != "error")


@pytest.mark.parametrize(
    "text",
    [
        "<think>[[3]]</think>[[8]]",
        "<THINKING>\n[[3]]\n</THINKING>\n\n[[8]]",
        "<reasoning>[[3]] [[4]]</reasoning> Rating: [[8]]",
        "<seed:think>[[3]]</seed:think>[[8]]",
        "◁think▷[[3]]◁/think▷[[8]]",
        "[THINK][[3]][/THINK][[8]]",
        "<|begin_of_thought|>[[3]]<|end_of_thought|>[[8]]",
        "<|START_THINKING|>[[3]]<|END_THINKING|>[[8]]",
        "<|channel|>analysis<|message|>[[3]]<|end|><|start|>assistant<|channel|>final<|message|>[[8]]",
        "analysisPerhaps [[3]]assistantfinal[[8]]",
        "<|channel>thought\n[[3]]<channel|>[[8]]",
        "<|open|>think<|sep|>[[3]]<|close|>think<|sep|>[[8]]",
        "the template has begun it, [[3]]</think>[[8]]",
        "<think>a<think>b</think>[[3]]</think>[[8]]",
        "<think>[[3]]</think>So: <think>[[4]]</think>[[8]]",
        "[[8]]<think>[[3]]</think>",
    ],
)
@pytest.mark.parametrize("strictly", [True, False])
def test_what_is_reasoned_is_no_rating(text: str, strictly: bool) -> None:
    assert rating_of(Reply(text, "stop"), strictly) == (8, "")


@pytest.mark.parametrize("text", ["<think>[[3]]", "◁think▷[[3]] or [[4]]", "<|channel|>analysis<|message|>[[3]]"])
@pytest.mark.parametrize("strictly", [True, False])
def test_a_reply_that_ends_in_its_reasoning_is_unrated(text: str, strictly: bool) -> None:
    assert after_reasoning(text) is None
    rating, problem = rating_of(Reply(text, "stop"), strictly)
    assert (rating, "reasoning" in problem) == (NO_RATING, True)
    assert rating_of(Reply(text, LENGTH), strictly) == (NO_RATING, TRUNCATED)


def test_prose_about_reasoning_is_none() -> None:
    for text in ("analysis: sound. [[8]]", "Its thinking [sic] is sound, its reasoning (see above) too. [[8]]"):
        assert rating_of(Reply(text, "stop"), strictly=True) == (8, "")


@pytest.mark.parametrize("stop", [LENGTH, FILTERED, NO_CHOICES, NO_CONTENT, NO_ROOM])
def test_a_reply_without_a_text_is_unrated_for_its_own_reason(stop: str) -> None:
    problems = {rating_of(Reply("", stop), strictly)[1] for strictly in (True, False)}
    assert len(problems) == 1
    assert problems != {rating_of(Reply("", "stop"), strictly=True)[1]}


def test_a_truncated_reply_counts_only_as_fastchat_counts() -> None:
    reply = Reply("For example [[3]] would be", LENGTH)
    assert rating_of(reply, strictly=True) == (NO_RATING, TRUNCATED)
    assert rating_of(reply, strictly=False) == (3, "")
