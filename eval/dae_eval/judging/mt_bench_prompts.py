"""The prompts of an MT-Bench judge and its judgments, in FastChat's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dae_eval.judging.asking import Reply, Request
from dae_eval.judging.fastchat_files import Answers, JudgePrompt, Judgment, PairJudgment, Question
from dae_eval.judging.judges import JudgeChoice, chosen_prompt, judge_request
from dae_eval.judging.mt_bench_scores import Place
from dae_eval.judging.readings import rating_of, verdict_of

NEED_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge prompts show a reference answer

Mode = Literal["single", "pairwise"]


@dataclass(frozen=True)
class Material:
    questions: tuple[Question, ...]
    prompts: Mapping[str, JudgePrompt]
    references: Mapping[int, tuple[str, ...]]
    prompts_file: str
    hashes: Mapping[str, str | None]


def prompt_for(question: Question, turn: int, mode: Mode, material: Material) -> JudgePrompt:
    """FastChat's prompt for this question and turn. Raises UserError if the file lacks it."""
    plain, with_reference = {"single": ("single-v1", "single-math-v1"), "pairwise": ("pair-v2", "pair-math-v1")}[mode]
    name = with_reference if question.category in NEED_REFERENCE else plain
    return chosen_prompt(material.prompts, name + ("-multi-turn" if turn == 2 else ""), mode, material.prompts_file)


def fields_of(
    question: Question, turn: int, answers: Mapping[str, tuple[str, ...]], material: Material
) -> dict[str, str]:
    """The fields of a prompt: questions, answers (by the field's name) and references; both turns if turn is 2."""
    if turn == 1:
        fields = {"question": question.turns[0], **{name: texts[0] for name, texts in answers.items()}}
    else:
        fields = {f"question_{n}": question.turns[n - 1] for n in (1, 2)}
        fields |= {f"{name}_{n}": texts[n - 1] for name, texts in answers.items() for n in (1, 2)}
    if question.category in NEED_REFERENCE:
        fields |= {f"ref_answer_{n}": text for n, text in enumerate(material.references[question.id], 1)}
    return fields


def single_requests(judge: JudgeChoice, material: Material, answers: Answers, repeat: int) -> list[Request]:
    """A request for every question and turn; for the second turn the judge sees both."""
    requests = []
    for question, turn in places(material.questions):
        fields = fields_of(question, turn, {"answer": answers.turns[question.id]}, material)
        prompt = prompt_for(question, turn, "single", material)
        key = f"{repeat}/{question.id}/{turn}"
        requests.append(judge_request(judge, prompt, key, fields, material.prompts_file))
    return requests


def pair_requests(
    judge: JudgeChoice, material: Material, answers: Answers, against: Answers, repeat: int
) -> list[Request]:
    """Two requests for every question and turn: in game 1 `answers` is shown as A, in game 2 as B."""
    requests = []
    for question, turn in places(material.questions):
        prompt = prompt_for(question, turn, "pairwise", material)
        for game, (a, b) in enumerate(((answers, against), (against, answers)), 1):
            shown = {"answer_a": a.turns[question.id], "answer_b": b.turns[question.id]}
            fields = fields_of(question, turn, shown, material)
            key = f"{repeat}/{question.id}/{turn}/{game}"
            requests.append(judge_request(judge, prompt, key, fields, material.prompts_file))
    return requests


def places(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def single_judgments(
    judge: JudgeChoice,
    material: Material,
    answers: Answers,
    repeat: int,
    requests: Sequence[Request],
    replies: Mapping[str, Reply],
    strictly: bool,
) -> tuple[list[Judgment], dict[Place, str]]:
    """The judge's ratings, in FastChat's terms, and why turns are unrated in the strict reading.

    strictly: whether the ratings are read so (see `readings`).
    """
    prompts = {request.key: request.messages[-1]["content"] for request in requests}
    judgments, problems = [], {}
    for question, turn in places(material.questions):
        key = f"{repeat}/{question.id}/{turn}"
        score, _ = rating_of(replies[key], strictly)
        problems[question.id, turn] = rating_of(replies[key], strictly=True)[1]
        judgments.append(
            Judgment(
                question_id=question.id,
                model=answers.model_id,
                judge=(judge.name, prompt_for(question, turn, "single", material).name),
                turn=turn,
                score=score,
                user_prompt=prompts[key],
                judgment=replies[key].text,
                tstamp=replies[key].tstamp,
            )
        )
    return judgments, {place: problem for place, problem in problems.items() if problem}


def pair_judgments(
    judge: JudgeChoice,
    material: Material,
    answers: Answers,
    against: Answers,
    repeat: int,
    requests: Sequence[Request],
    replies: Mapping[str, Reply],
    strictly: bool,
) -> tuple[list[PairJudgment], dict[Place, str]]:
    """The judge's verdicts and why turns are unrated, as `single_judgments`; `answers` are those of model_1."""
    prompts = {request.key: request.messages[-1]["content"] for request in requests}
    judgments, problems = [], {}
    for question, turn in places(material.questions):
        first, second = (f"{repeat}/{question.id}/{turn}/{game}" for game in (1, 2))
        unrated = [verdict_of(replies[key], "model_1", "model_2", strictly=True)[1] for key in (first, second)]
        problems[question.id, turn] = unrated[0] or unrated[1]
        judgments.append(
            PairJudgment(
                question_id=question.id,
                model_1=answers.model_id,
                model_2=against.model_id,
                g1_winner=verdict_of(replies[first], "model_1", "model_2", strictly)[0],
                g2_winner=verdict_of(replies[second], "model_2", "model_1", strictly)[0],
                judge=(judge.name, prompt_for(question, turn, "pairwise", material).name),
                turn=turn,
                g1_user_prompt=prompts[first],
                g1_judgment=replies[first].text,
                g2_user_prompt=prompts[second],
                g2_judgment=replies[second].text,
                tstamp=replies[second].tstamp,
            )
        )
    return judgments, {place: problem for place, problem in problems.items() if problem}
