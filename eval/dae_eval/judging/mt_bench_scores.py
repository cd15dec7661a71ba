"""Scores from MT-Bench judgments: FastChat's way (`compatible`) and a strict one that leaves nothing out in silence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dae_eval.judging.fastchat_files import ERROR, NO_RATING, Judgment, PairJudgment, Question, Winner
from kd.errors import UserError

LOWEST, HIGHEST = 1.0, 10.0  # the scale that the judge prompts ask for

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]")
_SHOWN_IDS = 12  # (question, turn) pairs that a message names before it counts the rest

Place = tuple[int, int]  # question id and turn
OneJudgment = TypeVar("OneJudgment", Judgment, PairJudgment)


@dataclass(frozen=True)
class Scores:
    """Mean ratings on the judge's scale. dropped: what was left out, one line for each reason."""

    turns: Mapping[int, float]
    categories: Mapping[str, float]
    average: float
    judgments: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class PairScores:
    """Wins, losses and ties of model_1; a win only where both orders agree. Rates on 0..1."""

    wins: int
    losses: int
    ties: int
    categories: Mapping[str, float]
    dropped: tuple[str, ...]

    @property
    def judgments(self) -> int:
        """How many pairs count."""
        return self.wins + self.losses + self.ties

    @property
    def win_rate(self) -> float:
        """Wins among all pairs that count."""
        return self.wins / self.judgments

    @property
    def loss_rate(self) -> float:
        """Losses among all pairs that count."""
        return self.losses / self.judgments

    @property
    def win_rate_adjusted(self) -> float:
        """The same with half a win for a tie."""
        return (self.wins + 0.5 * self.ties) / self.judgments


def rating_in(text: str) -> float:
    """The first [[rating]] in a judge's text, else the first [rating], else NO_RATING, as FastChat reads it."""
    found = _RATING.search(text) or _RATING_IN_SINGLE_BRACKETS.search(text)
    return float(found[1]) if found else NO_RATING


def verdict_in(text: str, first: Winner, second: Winner) -> Winner:
    """Who won, by the judge's text: `first` was shown as A, `second` as B. FastChat's precedence: A, B, C."""
    if "[[A]]" in text:
        return first
    if "[[B]]" in text:
        return second
    return "tie" if "[[C]]" in text else "error"


def outcome(judgment: PairJudgment) -> float:
    """1 where model_1 won in both orders, 0 where model_2 did, else 0.5."""
    if judgment.g1_winner == "tie" or judgment.g1_winner != judgment.g2_winner:
        return 0.5
    return 1.0 if judgment.g1_winner == "model_1" else 0.0


def has_rating(judgment: Judgment) -> bool:
    """Whether the judge gave a rating on its scale."""
    return LOWEST <= judgment.score <= HIGHEST


def has_verdict(judgment: PairJudgment) -> bool:
    """Whether the judge gave a verdict in both orders."""
    return ERROR not in (judgment.g1_winner, judgment.g2_winner)


def compatible(judgments: Sequence[Judgment]) -> tuple[list[Judgment], tuple[str, ...]]:
    """The judgments that FastChat's show_result counts: all but those with score -1, repeated ones each time."""
    kept = [judgment for judgment in judgments if judgment.score != NO_RATING]
    dropped = [(j.question_id, j.turn) for j in judgments if j.score == NO_RATING]
    return kept, _told(("without a rating", dropped))


def compatible_pairs(judgments: Sequence[PairJudgment]) -> tuple[list[PairJudgment], tuple[str, ...]]:
    """The same for pairs: all but those where either order has no verdict."""
    kept = [judgment for judgment in judgments if has_verdict(judgment)]
    dropped = [(j.question_id, j.turn) for j in judgments if not has_verdict(j)]
    return kept, _told(("without a verdict in both orders", dropped))


def strict(
    judgments: Sequence[Judgment], questions: Sequence[Question], source: str
) -> tuple[list[Judgment], tuple[str, ...]]:
    """One rated judgment for every question and turn, in the questions' order.

    Of several the last one with a rating counts. source: where they come from, for the message.

    Raises:
        UserError: a question's turn has none, or they are by several judges.
    """
    rated = [judgment for judgment in judgments if has_rating(judgment)]
    kept, dropped = _strictly(judgments, rated, questions, "no rating on the scale", source)
    unrated = [(j.question_id, j.turn) for j in judgments if not has_rating(j)]
    return kept, _told(("without a rating from 1 to 10", unrated), *dropped)


def strict_pairs(
    judgments: Sequence[PairJudgment], questions: Sequence[Question], source: str
) -> tuple[list[PairJudgment], tuple[str, ...]]:
    """One pair with a verdict in both orders for every question and turn. Raises UserError as `strict` does."""
    decided = [judgment for judgment in judgments if has_verdict(judgment)]
    kept, dropped = _strictly(judgments, decided, questions, "no verdict in both orders", source)
    undecided = [(j.question_id, j.turn) for j in judgments if not has_verdict(j)]
    return kept, _told(("without a verdict in both orders", undecided), *dropped)


def _strictly(
    judgments: Sequence[OneJudgment],
    usable: Sequence[OneJudgment],
    questions: Sequence[Question],
    missing: str,
    source: str,
) -> tuple[list[OneJudgment], list[tuple[str, list[Place]]]]:
    """(the last usable judgment of each question and turn, what else was left out and why)."""
    _refuse_several_judges({judgment.judge[0] for judgment in judgments}, source)
    kept = {(judgment.question_id, judgment.turn): judgment for judgment in usable}
    places = _places(questions)
    dropped = _strictly_dropped([(j.question_id, j.turn) for j in usable], places)
    _refuse_gaps([place for place in places if place not in kept], len(places), missing, source)
    return [kept[place] for place in places], dropped


def scores_of(judgments: Sequence[Judgment], categories: Mapping[int, str], dropped: tuple[str, ...]) -> Scores:
    """Means by turn and category, and over all judgments pooled (FastChat's average; not the mean of turn means)."""
    if not judgments:
        raise UserError("no judgment has a rating; look at what the judge wrote in the judgments' file")
    by_turn: dict[int, list[float]] = {}
    by_category: dict[str, list[float]] = {}
    for judgment in judgments:
        by_turn.setdefault(judgment.turn, []).append(judgment.score)
        by_category.setdefault(categories.get(judgment.question_id, "(unknown)"), []).append(judgment.score)
    return Scores(
        turns={turn: mean(by_turn[turn]) for turn in sorted(by_turn)},
        categories={name: mean(scores) for name, scores in by_category.items()},
        average=mean([judgment.score for judgment in judgments]),
        judgments=len(judgments),
        dropped=dropped,
    )


def pair_scores_of(
    judgments: Sequence[PairJudgment], categories: Mapping[int, str], dropped: tuple[str, ...]
) -> PairScores:
    """Wins, losses and ties, and the adjusted win rate by category."""
    if not judgments:
        raise UserError("no pair has a verdict in both orders; look at what the judge wrote in the judgments' file")
    outcomes = [(categories.get(j.question_id, "(unknown)"), outcome(j)) for j in judgments]
    counts = Counter(value for _, value in outcomes)
    by_category: dict[str, list[float]] = {}
    for name, value in outcomes:
        by_category.setdefault(name, []).append(value)
    means = {name: mean(values) for name, values in by_category.items()}
    return PairScores(counts[1.0], counts[0.0], counts[0.5], means, dropped)


def mean(values: Sequence[float]) -> float:
    """The mean, the same for every order of the values."""
    return math.fsum(values) / len(values)


def _places(questions: Sequence[Question]) -> list[Place]:
    return [(question.id, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def _strictly_dropped(found: Sequence[Place], places: Sequence[Place]) -> list[tuple[str, list[Place]]]:
    known = set(places)
    counts = Counter(found)
    repeated = [place for place in known for _ in range(counts[place] - 1)]
    return [
        ("earlier duplicates", sorted(repeated)),
        ("of questions that are not in the question file", [place for place in found if place not in known]),
    ]


def _refuse_several_judges(judges: set[str], source: str) -> None:
    if len(judges) > 1:
        raise UserError(
            f"{source}: judged by {', '.join(sorted(judges))}: their scales differ; give judgments of one judge"
        )


def _refuse_gaps(missing: Sequence[Place], expected: int, what: str, source: str) -> None:
    if missing:
        raise UserError(
            f"{source}: {what} for {len(missing)} of {expected} (question, turn): {_list(missing)}; judge them (the "
            "same command asks the judge again), or leave them out as FastChat does with --compatible"
        )


def _told(*reasons: tuple[str, Sequence[Place]]) -> tuple[str, ...]:
    return tuple(f"{len(places)} {reason}: {_list(places)}" for reason, places in reasons if places)


def _list(places: Iterable[Place]) -> str:
    names = [f"{question_id} turn {turn}" for question_id, turn in places]
    more = len(names) - _SHOWN_IDS
    return ", ".join(names[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")
