"""From MT-Bench judgments to scores with their spread, and to an evaluation that reports can read."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dae_eval.folders import write_evaluation
from dae_eval.judging.fastchat_files import (
    Answers,
    Judgment,
    PairJudgment,
    Question,
    read_judgments,
    read_pair_judgments,
)
from dae_eval.judging.judged_folder import software
from dae_eval.judging.mt_bench_prompts import Mode
from dae_eval.judging.mt_bench_scores import (
    GIVE_ALL,
    NO_PROBLEMS,
    PairScores,
    Place,
    Scores,
    compatible,
    is_usable,
    mean,
    outcome,
    pair_scores_of,
    place_of,
    scores_of,
    strict,
)
from dae_eval.judging.readings import HIGHEST, LONGER, TRUNCATED
from dae_eval.results import Document, Evaluation, Kind, ModelFacts, TaskResult
from kd.errors import UserError
from kd.runs.files import json_text, write_text_durably

GROUP = "mt-bench"
SCORES = "scores.json"
# Standard deviation of a question's difference between two models, in ratings and in wins.
_SPREAD: Mapping[Mode, float] = {"single": 2.0, "pairwise": 0.5}


@dataclass(frozen=True)
class Asked:
    """The judged model, and how it was judged. settings: must be equal for two models to be compared.

    answers: None if only the judgments are known. against: the name of the other model in pairwise mode.
    """

    facts: ModelFacts
    questions: tuple[Question, ...]
    references: Mapping[int, tuple[str, ...]]
    answers: Answers | None
    settings: Mapping[str, Any]
    conditions: Mapping[str, Any]
    against: str | None = None


@dataclass(frozen=True)
class Judged:
    """The judgments of each repeat, either all single or all pairwise.

    sources: their files, for messages. problems: for each repeat, why turns are unrated; empty if only the files are
    known. remedy: how unrated turns get a judgment.
    """

    sources: tuple[str, ...]
    repeats: tuple[Sequence[Judgment | PairJudgment], ...]
    problems: tuple[Mapping[Place, str], ...] = ()
    remedy: str = GIVE_ALL


@dataclass(frozen=True)
class Result:
    """The scores of each repeat, and their folder."""

    output: Path
    repeats: tuple[Scores | PairScores, ...]

    @property
    def totals(self) -> tuple[float, ...]:
        """The average rating of each repeat, or its adjusted win rate."""
        return tuple(s.average if isinstance(s, Scores) else s.win_rate_adjusted for s in self.repeats)


def finish(output: Path, asked: Asked, judged: Judged, *, strictly: bool, kind: Kind) -> Result:
    """Score each repeat's judgments; write scores.json and the evaluation.

    Raises:
        UserError: nothing was judged, or in strict mode a question's turn was not.
    """
    categories = {question.id: question.category for question in asked.questions}
    known = judged.problems or [NO_PROBLEMS] * len(judged.repeats)
    counted = [
        strict(repeat, asked.questions, source, problems, judged.remedy) if strictly else compatible(repeat, problems)
        for source, repeat, problems in zip(judged.sources, judged.repeats, known, strict=True)
    ]
    scores: list[Scores | PairScores] = []
    for (kept, dropped), problems in zip(counted, known, strict=True):
        if asked.against is None:
            singles = [one for one in kept if isinstance(one, Judgment)]
            scores.append(scores_of(singles, categories, dropped, problems))
        else:
            pairs = [one for one in kept if isinstance(one, PairJudgment)]
            scores.append(pair_scores_of(pairs, categories, dropped, problems))
    result = Result(output, tuple(scores))
    write_text_durably(output / SCORES, json_text(scores_file(result, strictly)))
    write_evaluation(output, evaluation_of(asked, values_of([kept for kept, _ in counted]), strictly, kind))
    return result


def values_of(repeats: Sequence[Sequence[Judgment | PairJudgment]]) -> dict[Place, list[float]]:
    """Scores on 0..1 of each question and turn, over the repeats: rating / 10, or 1, 0.5 or 0 for a win, tie or loss.

    Ratings off the scale are left out.
    """
    values: dict[Place, list[float]] = {}
    for judgment in (judgment for repeat in repeats for judgment in repeat if is_usable(judgment)):
        score = outcome(judgment) if isinstance(judgment, PairJudgment) else judgment.score / HIGHEST
        values.setdefault(place_of(judgment), []).append(score)
    return values


def evaluation_of(asked: Asked, values: Mapping[Place, Sequence[float]], strictly: bool, kind: Kind) -> Evaluation:
    """The evaluation: one document for each question and turn, its score the mean over the repeats."""
    documents = [
        _document(asked, question, turn, mean(values[question.id, turn]))
        for question in asked.questions
        for turn in range(1, len(question.turns) + 1)
        if (question.id, turn) in values
    ]
    if not documents:
        raise UserError(
            "no judgment on the judge's scale is of a question in the question file; give the question file of the "
            "judgments"
        )
    counted = "strict" if strictly else "compatible"
    task = TaskResult(
        task="mt_bench" if asked.against is None else "mt_bench_pairwise",
        group=GROUP,
        kind=kind,
        metric="rating / 10" if asked.against is None else f"win rate against {asked.against}",
        version="1",
        settings={**asked.settings, "counted": counted},
        documents=tuple(documents),
        unit="rating" if asked.against is None else "points",
        total=sum(len(question.turns) for question in asked.questions),
    )
    return Evaluation(asked.facts, {task.task: task}, {**asked.conditions, "counted": counted, **software()})


def _document(asked: Asked, question: Question, turn: int, score: float) -> Document:
    prompt = "\n\n".join(question.turns[:turn])
    reference = asked.references.get(question.id, ())
    answer = "(not in file)" if asked.answers is None else asked.answers.turns[question.id][turn - 1]
    return Document(
        id=question.id * 10 + turn,
        hash=hashlib.sha256(prompt.encode()).hexdigest(),
        score=score,
        prompt=prompt,
        target=reference[turn - 1] if len(reference) >= turn else "",
        answer=answer,
        cluster=str(question.id),
        category=question.category,
    )


# -- existing judgments ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneModel:
    """A file's judgments of one model, or of one model against one other."""

    model: str
    against: str | None
    judgments: Sequence[Judgment | PairJudgment]


def judgments_of(path: Path, model_id: str | None) -> OneModel:
    """A file's judgments of one model.

    Raises:
        UserError: the file has no judgments of that model, or holds several and none was named.
    """
    judgments = read_judgments(path)
    chosen = _chosen(path, model_id, sorted({judgment.model for judgment in judgments}))
    return OneModel(chosen, None, [judgment for judgment in judgments if judgment.model == chosen])


def pair_judgments_of(path: Path, model_id: str | None) -> OneModel:
    """A file's judgments of one model against one other, as model_1 and model_2.

    model_id: on either side in the file; without it the file's only model_1.

    Raises:
        UserError: the file has no judgments of that model, or more than one pair of models.
    """
    judgments = read_pair_judgments(path)
    firsts = {judgment.model_1 for judgment in judgments}
    if model_id is None and len(firsts) == 1:
        model_id = next(iter(firsts))
    chosen = _chosen(path, model_id, sorted(firsts | {judgment.model_2 for judgment in judgments}))
    ours = [
        judgment if judgment.model_1 == chosen else exchanged(judgment)
        for judgment in judgments
        if chosen in (judgment.model_1, judgment.model_2)
    ]
    others = sorted({judgment.model_2 for judgment in ours})
    if len(others) != 1:
        raise UserError(f"{path}: compares {chosen} with {', '.join(others)}; give a file with one of them")
    return OneModel(chosen, others[0], ours)


def exchanged(judgment: PairJudgment) -> PairJudgment:
    """The same verdicts with the other model as model_1, which is A in game 1."""
    names = {"model_1": "model_2", "model_2": "model_1"}
    return replace(
        judgment,
        model_1=judgment.model_2,
        model_2=judgment.model_1,
        g1_winner=names.get(judgment.g2_winner, judgment.g2_winner),
        g2_winner=names.get(judgment.g1_winner, judgment.g1_winner),
        g1_user_prompt=judgment.g2_user_prompt,
        g1_judgment=judgment.g2_judgment,
        g2_user_prompt=judgment.g1_user_prompt,
        g2_judgment=judgment.g1_judgment,
    )


def _chosen(path: Path, model_id: str | None, models: Sequence[str]) -> str:
    chosen = models[0] if model_id is None and len(models) == 1 else model_id
    if chosen is None or chosen not in models:
        problem = "several models; choose one with --model-id" if model_id is None else f"no judgments of {model_id}"
        raise UserError(f"{path}: {problem}; models in the file: {', '.join(models)}")
    return chosen


def smallest_margin(questions: int, mode: Mode) -> str:
    """What so many questions cannot decide, in one sentence: half of a 95 % interval of the mean paired difference.

    Assumes a standard deviation of 2 ratings (single), or of 0.5 wins (pairwise, the largest possible), and that the
    turns of a question say the same, so that only questions count; repeats do not help, they average the judge's noise
    alone. Between three models of about equal quality that GPT-4 rated in public the deviation was 0.8 to 1.3.
    """
    half = 1.96 * _SPREAD[mode] / math.sqrt(questions)
    size = f"{half:.1f} in the average rating" if mode == "single" else f"{100 * half:.0f} points of win rate"
    return f"{questions} questions cannot decide a margin below about {size}"


# -- output ------------------------------------------------------------------------------------------------------------


def scores_file(result: Result, strictly: bool) -> dict[str, Any]:
    """scores.json: every repeat, and the spread of the totals."""
    repeats = [asdict(one) for one in result.repeats]
    for one, row in zip(result.repeats, repeats, strict=True):
        if isinstance(one, PairScores):
            row |= {name: getattr(one, name) for name in ("win_rate", "loss_rate", "win_rate_adjusted")}
    return {
        "counted": "strict" if strictly else "compatible",
        "total": mean(result.totals),
        "spread": spread(result.totals),
        "repeats": repeats,
    }


def spread(totals: Sequence[float]) -> dict[str, float] | None:
    """Lowest and highest total and the standard deviation; None without repeats."""
    if len(totals) < 2:
        return None
    return {"lowest": min(totals), "highest": max(totals), "standard deviation": statistics.stdev(totals)}


def result_lines(result: Result) -> list[str]:
    """The result for a terminal of 80 columns."""
    lines = []
    for number, one in enumerate(result.repeats, 1):
        if len(result.repeats) > 1:
            lines.append(f"judging {number} of {len(result.repeats)}")
        lines += _single_lines(one) if isinstance(one, Scores) else _pair_lines(one)
        lines += [f"  left out: {dropped}" for dropped in one.dropped]
        lines += [f"  note: {note}" for note in one.notes]
        if any(TRUNCATED in line for line in (*one.dropped, *one.notes)):
            lines.append(f"  {LONGER}")
    measured = spread(result.totals)
    if measured is not None:
        lines.append(
            f"over {len(result.totals)} judgings: mean {mean(result.totals):.4f}, from "
            f"{measured['lowest']:.4f} to {measured['highest']:.4f}, standard deviation "
            f"{measured['standard deviation']:.4f}"
        )
    return lines


def _single_lines(scores: Scores) -> list[str]:
    lines = [f"  turn {turn:<13} {value:9.6f}" for turn, value in scores.turns.items()]
    lines += [f"  {name:<18} {value:9.6f}" for name, value in scores.categories.items()]
    return [*lines, f"  {'average':<18} {scores.average:9.6f}  ({scores.judgments} judgments)"]


def _pair_lines(scores: PairScores) -> list[str]:
    lines = [f"  {name:<18} {value:9.6f}" for name, value in scores.categories.items()]
    return [
        *lines,
        f"  wins {scores.wins}, losses {scores.losses}, ties {scores.ties}",
        f"  {'win rate':<18} {scores.win_rate:9.6f}",
        f"  {'ties as half':<18} {scores.win_rate_adjusted:9.6f}  ({scores.judgments} pairs)",
    ]
