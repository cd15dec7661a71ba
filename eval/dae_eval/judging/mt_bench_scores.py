"""Scores from MT-Bench judgments: as FastChat counts (`compatible`), or one judgment for every turn (`strict`)."""

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
OneJudgment = TypeVar("OneJudgment", bound=Judgment | PairJudgment)
Name = TypeVar("Name", int, str)


@dataclass(frozen=True)
class Scores:
    """Mean ratings on the judge's scale. dropped: judgments left out, one line for each reason."""

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
        return self.wins + self.losses + self.ties

    @property
    def win_rate(self) -> float:
        return self.wins / self.judgments

    @property
    def loss_rate(self) -> float:
        return self.losses / self.judgments

    @property
    def win_rate_adjusted(self) -> float:
        """The win rate with half a win for a tie."""
        return (self.wins + 0.5 * self.ties) / self.judgments


def rating_in(text: str) -> float:
    """The first [[rating]] in a judge's text, else the first [rating], else NO_RATING, as FastChat reads it."""
    found = _RATING.search(text) or _RATING_IN_SINGLE_BRACKETS.search(text)
    return float(found[1]) if found else NO_RATING


def verdict_in(text: str, first: Winner, second: Winner) -> Winner:
    """The winner in a judge's text: `first` was shown as A, `second` as B. FastChat's precedence: A, B, C."""
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


def is_usable(judgment: Judgment | PairJudgment) -> bool:
    """Whether the judge gave a rating on its scale; for a pair, a verdict in both orders."""
    if isinstance(judgment, PairJudgment):
        return ERROR not in (judgment.g1_winner, judgment.g2_winner)
    return LOWEST <= judgment.score <= HIGHEST


def place_of(judgment: Judgment | PairJudgment) -> Place:
    return judgment.question_id, judgment.turn


def compatible(judgments: Sequence[OneJudgment]) -> tuple[list[OneJudgment], tuple[str, ...]]:
    """The judgments that FastChat's show_result counts, duplicates included, and what was left out.

    It leaves out ratings of -1, and pairs with an order without a verdict.
    """

    def counts(judgment: OneJudgment) -> bool:
        return judgment.score != NO_RATING if isinstance(judgment, Judgment) else is_usable(judgment)

    dropped = [place_of(judgment) for judgment in judgments if not counts(judgment)]
    return [judgment for judgment in judgments if counts(judgment)], _reasons((_without(judgments), dropped))


def strict(
    judgments: Sequence[OneJudgment], questions: Sequence[Question], source: str
) -> tuple[list[OneJudgment], tuple[str, ...]]:
    """One usable judgment for every question and turn, in the questions' order, and what was left out.

    Of several the last usable one counts. source: where they come from, for the message.

    Raises:
        UserError: a question's turn has none, or they are by several judges.
    """
    judges = {judgment.judge[0] for judgment in judgments}
    if len(judges) > 1:
        raise UserError(
            f"{source}: judged by {', '.join(sorted(judges))}, whose scales differ; give judgments of one judge"
        )
    usable = [judgment for judgment in judgments if is_usable(judgment)]
    kept = {place_of(judgment): judgment for judgment in usable}
    places = [(question.id, turn) for question in questions for turn in range(1, len(question.turns) + 1)]
    missing = [place for place in places if place not in kept]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(places)} turns {_without(judgments)}: {_list(missing)}; run the same "
            "command to ask the judge again, or leave them out as FastChat does with --compatible"
        )
    found = Counter(map(place_of, usable))
    dropped = _reasons(
        (_without(judgments), [place_of(judgment) for judgment in judgments if not is_usable(judgment)]),
        ("earlier duplicates", sorted(place for place in places for _ in range(found[place] - 1))),
        ("of unknown questions", [place for place in map(place_of, usable) if place not in places]),
    )
    return [kept[place] for place in places], dropped


def scores_of(judgments: Sequence[Judgment], categories: Mapping[int, str], dropped: tuple[str, ...]) -> Scores:
    """Means by turn and category, and over all judgments pooled (FastChat's average; not the mean of turn means)."""
    if not judgments:
        raise UserError("no judgment has a rating; check the judge's replies in the judgments file")
    return Scores(
        turns=dict(sorted(_means((judgment.turn, judgment.score) for judgment in judgments).items())),
        categories=_means((categories.get(j.question_id, "(unknown)"), j.score) for j in judgments),
        average=mean([judgment.score for judgment in judgments]),
        judgments=len(judgments),
        dropped=dropped,
    )


def pair_scores_of(
    judgments: Sequence[PairJudgment], categories: Mapping[int, str], dropped: tuple[str, ...]
) -> PairScores:
    """Wins, losses and ties, and the adjusted win rate by category."""
    if not judgments:
        raise UserError("no pair has a verdict in both orders; check the judge's replies in the judgments file")
    counts = Counter(map(outcome, judgments))
    means = _means((categories.get(j.question_id, "(unknown)"), outcome(j)) for j in judgments)
    return PairScores(counts[1.0], counts[0.0], counts[0.5], means, dropped)


def mean(values: Sequence[float]) -> float:
    """The mean, the same for every order of the values."""
    return math.fsum(values) / len(values)


def _means(named: Iterable[tuple[Name, float]]) -> dict[Name, float]:
    values: dict[Name, list[float]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


def _without(judgments: Sequence[Judgment | PairJudgment]) -> str:
    pairs = bool(judgments) and isinstance(judgments[0], PairJudgment)
    return "without a verdict in both orders" if pairs else "without a rating from 1 to 10"


def _reasons(*reasons: tuple[str, Sequence[Place]]) -> tuple[str, ...]:
    return tuple(f"{len(places)} {reason}: {_list(places)}" for reason, places in reasons if places)


def _list(places: Sequence[Place]) -> str:
    names = [f"{question_id} turn {turn}" for question_id, turn in places]
    more = len(names) - _SHOWN_IDS
    return ", ".join(names[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")
