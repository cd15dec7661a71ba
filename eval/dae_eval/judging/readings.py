"""What a judge's reply says: the rating or verdict after its reasoning, or why it is unrated.

FastChat's reading takes the first match. The strict reading takes a rating or verdict only from a reply that was
written to its end, and only if it is the only one there: reasoning judges quote others before they decide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dae_eval.judging.asking import FILTERED, LENGTH, NO_CHOICES, NO_CONTENT, NO_ROOM, Reply
from dae_eval.judging.fastchat_files import NO_RATING, Winner

LOWEST, HIGHEST = 1.0, 10.0  # the scale that the judge prompts ask for

TRUNCATED = "truncated at --judge-max-tokens"
LONGER = "for truncated replies: a larger --judge-max-tokens, with another --output"
OFF_SCALE = f"rated off the scale of {LOWEST:.0f} to {HIGHEST:.0f}"
NONE_FOUND = {"rating": "without a rating", "verdict": "without a verdict"}
SEVERAL = {"rating": "with several different ratings", "verdict": "with several different verdicts"}
_EMPTY, _IN_REASONING = "with an empty reply", "ended within the reasoning"
_REASONING_ONLY = "with nothing after the reasoning"
_UNFINISHED = {
    LENGTH: TRUNCATED,
    FILTERED: "stopped by a content filter",
    NO_CHOICES: "without choices in the reply",
    NO_CONTENT: "without content in the reply",
    NO_ROOM: "too long for the judge's context",
}

_RATING = re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]")
_RATING_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+(?:\.\d*)?)\]")

# What begins and ends reasoning: the tags of most models, then the channels of gpt-oss (also without its special
# tokens), Gemma and Kimi K3.
_NAME = r"(?:\w+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad|monologue)(?:_\w+)?"
_BEGIN = rf"<\|?(?:begin_of_|start_)?{_NAME}\|?>|◁{_NAME}▷|\[think\]"
_BEGIN += r"|<\|channel\|>(?!final)\w[^<]*<\|message\|>|\Aanalysis(?-i:(?=[A-Z]))"
_BEGIN += rf"|<\|channel>{_NAME}|<\|open\|>{_NAME}<\|sep\|>"
_END = rf"</{_NAME}>|<\|(?:/|end_of_|end_){_NAME}\|>|◁/{_NAME}▷|\[/think\]"
_END += r"|<\|channel\|>final[^<]*<\|message\|>|assistantfinal"
_END += rf"|<channel\|>|<\|close\|>{_NAME}<\|sep\|>"
_MARK = re.compile(rf"(?P<end>{_END})|{_BEGIN}", re.IGNORECASE)

Found = TypeVar("Found", float, str)


def after_reasoning(text: str) -> str | None:
    """The text without its reasoning; None if it ends within it.

    A chat template may have begun the reasoning in the prompt: text before an end without a beginning is reasoning. A
    mark in the middle that nothing ends is a word of the answer.
    """
    kept: list[str] = []
    position, inside = 0, False
    marks = list(_MARK.finditer(text))
    last_end = max((mark.start() for mark in marks if mark["end"] is not None), default=-1)
    for mark in marks:
        ends = mark["end"] is not None
        if ends and not inside:
            kept.clear()
        elif not inside:
            before = text[position : mark.start()]
            if mark.start() > last_end and "".join([*kept, before]).strip():
                break
            kept.append(before)
        position, inside = mark.end(), not ends
    return None if inside else " ".join([*kept, text[position:]]).strip()


def _begins_with_reasoning(text: str) -> bool:
    first = _MARK.search(text)
    return first is not None and first["end"] is None and not text[: first.start()].strip()


def ratings_in(text: str) -> list[float]:
    """All [[rating]]s of a text without reasoning, in order; if there are none, all [rating]s."""
    found = _RATING.findall(text) or _RATING_IN_SINGLE_BRACKETS.findall(text)
    return [float(number) for number in found]


def verdicts_in(text: str) -> list[str]:
    """The verdicts in a text without reasoning, in the order in which FastChat looks for them: A, B, C."""
    return [letter for letter in "ABC" if f"[[{letter}]]" in text]


def has_several(judgment: str, find: Callable[[str], Sequence[Found]]) -> bool:
    """Whether a judgment has different ratings or verdicts after its reasoning."""
    return len(set(find(after_reasoning(judgment) or ""))) > 1


def rating_of(reply: Reply, strictly: bool) -> tuple[float, str]:
    """The rating (NO_RATING without one), and why the reply counts as unrated (empty if it is rated).

    A rating off the scale is unrated in the strict reading only.
    """
    rating, problem = _read(reply, ratings_in, "rating", strictly)
    if rating is None:
        return NO_RATING, problem
    off = strictly and not LOWEST <= rating <= HIGHEST
    return rating, OFF_SCALE if off else ""


def verdict_of(reply: Reply, first: Winner, second: Winner, strictly: bool) -> tuple[Winner, str]:
    """The winner (`error` without one) where `first` was shown as A and `second` as B, and why there is none."""
    letter, problem = _read(reply, verdicts_in, "verdict", strictly)
    if letter is None:
        return "error", problem
    return {"A": first, "B": second}.get(letter, "tie"), ""


def _read(reply: Reply, find: Callable[[str], Sequence[Found]], what: str, strictly: bool) -> tuple[Found | None, str]:
    answer = after_reasoning(reply.text)
    found = [] if answer is None else find(answer)
    if not found and not strictly and not _begins_with_reasoning(reply.text):
        found = find(reply.text)  # the marks are words of the answer
    unfinished = _UNFINISHED.get(reply.stop, "")
    if unfinished and (strictly or not found):
        return None, unfinished
    if not found:
        empty = _REASONING_ONLY if reply.text.strip() else _EMPTY
        return None, _IN_REASONING if answer is None else NONE_FOUND[what] if answer else empty
    if strictly and len(set(found)) > 1:
        return None, SEVERAL[what]
    return found[0], ""


def counted(problems: Iterable[str]) -> str:
    """How many replies are unrated for which reason, in one line."""
    return ", ".join(f"{count} {problem}" for problem, count in Counter(problems).most_common())
