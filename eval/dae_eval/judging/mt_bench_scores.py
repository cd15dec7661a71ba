"""Scores from MT-Bench judgments: as FastChat counts (`compatible`), or one judgment for every turn (`strict`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dae_eval.judging.fastchat_files import ERROR, NO_RATING, Judgment, PairJudgment, Question
from dae_eval.judging.readings import (
    HIGHEST,
    LOWEST,
    NONE_FOUND,
    OFF_SCALE,
    SEVERAL,
    counted,
    has_several,
    ratings_in,
    verdicts_in,
)
from kd.errors import UserError

_SHOWN_IDS = 12  # (question, turn) pairs that a message names before it counts the rest

Place = tuple[int, int]  # question id and turn
NO_PROBLEMS: Mapping[Place, str] = {}
GIVE_ALL = "give a file that rates them"  # the remedy where judgments are finished
OneJudgment = TypeVar("OneJudgment", bound=Judgment | PairJudgment)
Name = TypeVar("Name", int, str)


@dataclass(frozen=True)
class Scores:
    """Mean ratings on the judge's scale.

    dropped: judgments left out, one line for each reason. notes: on judgments that count.
    """

    turns: Mapping[int, float]
    categories: Mapping[str, float]
    average: float
    judgments: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairScores:
    """Wins, losses and ties of model_1; a win only where both orders agree. Rates on 0..1. The rest as in `Scores`."""

    wins: int
    losses: int
    ties: int
    categories: Mapping[str, float]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()

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


def compatible(
    judgments: Sequence[OneJudgment], problems: Mapping[Place, str] = NO_PROBLEMS
) -> tuple[list[OneJudgment], tuple[str, ...]]:
    """The judgments that FastChat's show_result counts, duplicates included, and what was left out.

    It leaves out ratings of -1, and pairs with an order without a verdict. problems: why turns are unrated, if known.
    """

    def counts(judgment: OneJudgment) -> bool:
        return judgment.score != NO_RATING if isinstance(judgment, Judgment) else is_usable(judgment)

    dropped = [judgment for judgment in judgments if not counts(judgment)]
    return [judgment for judgment in judgments if counts(judgment)], _reasons(*_by_problem(dropped, problems))


def strict(
    judgments: Sequence[OneJudgment],
    questions: Sequence[Question],
    source: str,
    problems: Mapping[Place, str] = NO_PROBLEMS,
    remedy: str = GIVE_ALL,
) -> tuple[list[OneJudgment], tuple[str, ...]]:
    """One usable judgment for every question and turn, in the questions' order, and what was left out.

    Of several the last usable one counts. source: where they come from, for the message. problems: as in `compatible`.
    remedy: how turns without one get theirs.

    Raises:
        UserError: a question's turn has none, or they are by several judges.
    """
    judges = {judgment.judge[0] for judgment in judgments}
    if len(judges) > 1:
        raise UserError(
            f"{source}: judged by {', '.join(sorted(judges))}, whose scales differ; give judgments of one judge"
        )
    usable = [judgment for judgment in judgments if is_usable(judgment)]
    unusable = [judgment for judgment in judgments if not is_usable(judgment)]
    kept = {place_of(judgment): judgment for judgment in usable}
    places = [(question.id, turn) for question in questions for turn in range(1, len(question.turns) + 1)]
    if missing := [place for place in places if place not in kept]:
        known = {place_of(judgment): problem_of(judgment, problems) for judgment in unusable}
        reasons = counted(known.get(place, "not in the file") for place in missing)
        raise UserError(
            f"{source}: {len(missing)} of {len(places)} turns are unrated ({reasons}): {_list(missing)}; {remedy}, or "
            "count as FastChat does with --compatible"
        )
    found = Counter(map(place_of, usable))
    dropped = _reasons(
        *_by_problem(unusable, problems),
        ("earlier duplicates", sorted(place for place in places for _ in range(found[place] - 1))),
        ("of unknown questions", [place for place in map(place_of, usable) if place not in places]),
    )
    return [kept[place] for place in places], dropped


def problem_of(judgment: Judgment | PairJudgment, problems: Mapping[Place, str]) -> str:
    """Why a judgment is unusable: as its reply was read, else as it is written."""
    if isinstance(judgment, PairJudgment):
        unrated = [judgment.g1_winner, judgment.g2_winner].count(ERROR)
        orders = "one order" if unrated == 1 else "both orders"
        return problems.get(place_of(judgment), f"{NONE_FOUND['verdict']} in {orders}")
    written = NONE_FOUND["rating"] if judgment.score == NO_RATING else OFF_SCALE
    return problems.get(place_of(judgment), written)


def notes_on(
    judgments: Sequence[Judgment | PairJudgment], problems: Mapping[Place, str] = NO_PROBLEMS
) -> tuple[str, ...]:
    """What is to be known of judgments that count: of unfinished replies, off the scale, or with several ratings."""
    singles = [one for one in judgments if isinstance(one, Judgment)]
    pairs = [one for one in judgments if isinstance(one, PairJudgment)]
    off = [place_of(one) for one in singles if not is_usable(one)]
    ratings = [place_of(one) for one in singles if has_several(one.judgment, ratings_in)]
    verdicts = [
        place_of(one) for one in pairs for text in (one.g1_judgment, one.g2_judgment) if has_several(text, verdicts_in)
    ]
    shown = (OFF_SCALE, *SEVERAL.values())
    unfinished = [one for one in judgments if problems.get(place_of(one), OFF_SCALE) not in shown]
    return _reasons(
        *((f"{problem}, counted as FastChat does", places) for problem, places in _by_problem(unfinished, problems)),
        (f"{OFF_SCALE}, counted as FastChat does but not in reports", off),
        (f"{SEVERAL['rating']}, of which one counts", ratings),
        (f"{SEVERAL['verdict']}, of which one counts", verdicts),
    )


def scores_of(
    judgments: Sequence[Judgment],
    categories: Mapping[int, str],
    dropped: tuple[str, ...],
    problems: Mapping[Place, str] = NO_PROBLEMS,
) -> Scores:
    """Means by turn and category, and over all judgments pooled (FastChat's average; not the mean of turn means)."""
    if not judgments:
        raise UserError(f"no judgment has a rating{_why(dropped)}; check the judge's replies in the judgments file")
    return Scores(
        turns=dict(sorted(_means((judgment.turn, judgment.score) for judgment in judgments).items())),
        categories=_means((categories.get(j.question_id, "(unknown)"), j.score) for j in judgments),
        average=mean([judgment.score for judgment in judgments]),
        judgments=len(judgments),
        dropped=dropped,
        notes=notes_on(judgments, problems),
    )


def pair_scores_of(
    judgments: Sequence[PairJudgment],
    categories: Mapping[int, str],
    dropped: tuple[str, ...],
    problems: Mapping[Place, str] = NO_PROBLEMS,
) -> PairScores:
    """Wins, losses and ties, and the adjusted win rate by category."""
    if not judgments:
        raise UserError(
            f"no pair has a verdict in both orders{_why(dropped)}; check the judge's replies in the judgments file"
        )
    counts = Counter(map(outcome, judgments))
    means = _means((categories.get(j.question_id, "(unknown)"), outcome(j)) for j in judgments)
    return PairScores(counts[1.0], counts[0.0], counts[0.5], means, dropped, notes_on(judgments, problems))


def mean(values: Sequence[float]) -> float:
    """The mean, the same for every order of the values."""
    return math.fsum(values) / len(values)


def _means(named: Iterable[tuple[Name, float]]) -> dict[Name, float]:
    values: dict[Name, list[float]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


def _why(dropped: Sequence[str]) -> str:
    return f" ({'; '.join(dropped)})" if dropped else ""


def _by_problem(
    judgments: Sequence[Judgment | PairJudgment], problems: Mapping[Place, str]
) -> list[tuple[str, list[Place]]]:
    places: dict[str, list[Place]] = {}
    for judgment in judgments:
        places.setdefault(problem_of(judgment, problems), []).append(place_of(judgment))
    return list(places.items())


def _reasons(*reasons: tuple[str, Sequence[Place]]) -> tuple[str, ...]:
    return tuple(f"{len(places)} {reason}: {_list(places)}" for reason, places in reasons if places)


def _list(places: Sequence[Place]) -> str:
    names = [f"{question_id} turn {turn}" for question_id, turn in places]
    more = len(names) - _SHOWN_IDS
    return ", ".join(names[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")
