"""What an MT-Bench judge is shown, and what it said, in FastChat's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dae_eval.judging.asking import Reply, Request
from dae_eval.judging.fastchat_files import Answers, JudgePrompt, Judgment, PairJudgment, Question
from dae_eval.judging.judges import JudgeChoice, chosen_prompt, judge_request
from dae_eval.judging.mt_bench_scores import rating_in, verdict_in

NEED_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge prompts show a reference answer

Mode = Literal["single", "pairwise"]


@dataclass(frozen=True)
class Material:
    """The benchmark's own files, read."""

    questions: tuple[Question, ...]
    prompts: Mapping[str, JudgePrompt]
    references: Mapping[int, tuple[str, ...]]
    prompts_file: str
    hashes: Mapping[str, str | None]


def prompt_for(question: Question, turn: int, mode: Mode, material: Material) -> JudgePrompt:
    """FastChat's prompt for this question and turn. Raises UserError where the file has it not."""
    with_reference = question.category in NEED_REFERENCE
    name = {
        ("single", False): "single-v1",
        ("single", True): "single-math-v1",
        ("pairwise", False): "pair-v2",
        ("pairwise", True): "pair-math-v1",
    }[mode, with_reference]
    return chosen_prompt(material.prompts, name + ("-multi-turn" if turn == 2 else ""), mode, material.prompts_file)


def reference_fields(question: Question, material: Material) -> dict[str, str]:
    """ref_answer_1, ref_answer_2 where the question's category has references."""
    if question.category not in NEED_REFERENCE:
        return {}
    return {f"ref_answer_{n}": text for n, text in enumerate(material.references[question.id], 1)}


def single_requests(judge: JudgeChoice, material: Material, answers: Answers, repeat: int) -> list[Request]:
    """A request for every question and turn: the first turn by itself, the second with both turns shown."""
    requests = []
    for question, turn in places(material.questions):
        texts = answers.turns[question.id]
        if turn == 1:
            fields = {"question": question.turns[0], "answer": texts[0]}
        else:
            fields = {"question_1": question.turns[0], "question_2": question.turns[1]}
            fields |= {"answer_1": texts[0], "answer_2": texts[1]}
        fields |= reference_fields(question, material)
        prompt = prompt_for(question, turn, "single", material)
        key = f"{repeat}/{question.id}/{turn}"
        requests.append(judge_request(judge, prompt, key, fields, material.prompts_file))
    return requests


def pair_requests(
    judge: JudgeChoice, material: Material, answers: Answers, against: Answers, repeat: int
) -> list[Request]:
    """Two requests for every question and turn: in game 1 ours is shown as A, in game 2 as B."""
    requests = []
    for question, turn in places(material.questions):
        prompt = prompt_for(question, turn, "pairwise", material)
        for game, (a, b) in enumerate(((answers, against), (against, answers)), 1):
            texts_a, texts_b = a.turns[question.id], b.turns[question.id]
            if turn == 1:
                fields = {"question": question.turns[0], "answer_a": texts_a[0], "answer_b": texts_b[0]}
            else:
                fields = {"question_1": question.turns[0], "question_2": question.turns[1]}
                fields |= {"answer_a_1": texts_a[0], "answer_a_2": texts_a[1]}
                fields |= {"answer_b_1": texts_b[0], "answer_b_2": texts_b[1]}
            fields |= reference_fields(question, material)
            key = f"{repeat}/{question.id}/{turn}/{game}"
            requests.append(judge_request(judge, prompt, key, fields, material.prompts_file))
    return requests


def places(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    """Every question with each of its turns."""
    return [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def single_judgments(
    judge: JudgeChoice,
    material: Material,
    answers: Answers,
    repeat: int,
    requests: Sequence[Request],
    replies: Mapping[str, Reply],
) -> list[Judgment]:
    """What the judge said of each answer, in FastChat's terms."""
    prompts = {request.key: request.messages[-1]["content"] for request in requests}
    judgments = []
    for question, turn in places(material.questions):
        key = f"{repeat}/{question.id}/{turn}"
        judgments.append(
            Judgment(
                question_id=question.id,
                model=answers.model_id,
                judge=(judge.name, prompt_for(question, turn, "single", material).name),
                turn=turn,
                score=rating_in(replies[key].text),
                user_prompt=prompts[key],
                judgment=replies[key].text,
                tstamp=replies[key].tstamp,
            )
        )
    return judgments


def pair_judgments(
    judge: JudgeChoice,
    material: Material,
    answers: Answers,
    against: Answers,
    repeat: int,
    requests: Sequence[Request],
    replies: Mapping[str, Reply],
) -> list[PairJudgment]:
    """What the judge said of each pair, in FastChat's terms: model_1 is ours."""
    prompts = {request.key: request.messages[-1]["content"] for request in requests}
    judgments = []
    for question, turn in places(material.questions):
        first, second = (f"{repeat}/{question.id}/{turn}/{game}" for game in (1, 2))
        judgments.append(
            PairJudgment(
                question_id=question.id,
                model_1=answers.model_id,
                model_2=against.model_id,
                g1_winner=verdict_in(replies[first].text, "model_1", "model_2"),
                g2_winner=verdict_in(replies[second].text, "model_2", "model_1"),
                judge=(judge.name, prompt_for(question, turn, "pairwise", material).name),
                turn=turn,
                g1_user_prompt=prompts[first],
                g1_judgment=replies[first].text,
                g2_user_prompt=prompts[second],
                g2_judgment=replies[second].text,
                tstamp=replies[second].tstamp,
            )
        )
    return judgments
