"""FastChat's MT-Bench files: questions, judge prompts, answers, single and pairwise judgments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd.data.messages import kind_of
from kd.data.records import read_jsonl
from kd.errors import UserError

HUB = "hub:"
NO_RATING = -1.0  # FastChat's score where the judge's text holds no rating
ERROR = "error"  # FastChat's winner where the judge's text holds no verdict

Winner = Literal["model_1", "model_2", "tie", "error"]
WINNERS = ("model_1", "model_2", "tie", ERROR)


@dataclass(frozen=True)
class Question:
    """One question of one or two turns."""

    id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class JudgePrompt:
    """A judge's instruction. template: with fields in braces, such as {question}. kind: single or pairwise."""

    name: str
    kind: str
    system: str
    template: str
    output_format: str


@dataclass(frozen=True)
class Answers:
    """A model's answers: for each question the text of each turn."""

    model_id: str
    turns: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Judgment:
    """A rating of one answer. score: as the judge wrote it, or NO_RATING."""

    question_id: int
    model: str
    judge: tuple[str, str]
    turn: int
    score: float
    user_prompt: str = ""
    judgment: str = ""
    tstamp: float = 0.0


@dataclass(frozen=True)
class PairJudgment:
    """The verdicts on two answers, shown in both orders: in game 1 model_1 is A, in game 2 it is B."""

    question_id: int
    model_1: str
    model_2: str
    g1_winner: str
    g2_winner: str
    judge: tuple[str, str]
    turn: int
    g1_user_prompt: str = ""
    g1_judgment: str = ""
    g2_user_prompt: str = ""
    g2_judgment: str = ""
    tstamp: float = 0.0


def local_file(source: str, flag: str) -> Path:
    """The file that is meant: a path, or `hub:OWNER/NAME/FILE`, fetched from a data set of the hub.

    Raises:
        UserError: it is not there, or cannot be had.
    """
    if source.startswith(HUB):
        return _hub_file(source, flag)
    path = Path(source)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{flag} {source}: {wrong}; give a file, or hub:OWNER/NAME/FILE for one of a hub data set")
    return path


def _hub_file(source: str, flag: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{flag} {source}: wants hub:OWNER/NAME/FILE, the file's path in the data set")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{flag} {source}: the hub does not give this file ({reason}); check the spelling and your network, or "
            "download it and give its path"
        ) from error


def read_questions(path: Path) -> list[Question]:
    """The questions in the file's order. Raises UserError."""
    questions = [_question(row, location) for location, row in read_jsonl(str(path))]
    _refuse_repeats([question.id for question in questions], path, "question_id")
    return questions


def _question(row: Any, location: str) -> Question:
    turns = _field(row, "turns", list, location)
    if not 1 <= len(turns) <= 2 or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{location}: turns: wants one or two texts; the judge prompts are made for them")
    question_id = _field(row, "question_id", int, location)
    return Question(question_id, _field(row, "category", str, location), tuple(turns))


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Judge prompts by name. Raises UserError."""
    prompts = {}
    for location, row in read_jsonl(str(path)):
        fields = ("name", "type", "system_prompt", "prompt_template", "output_format")
        name, kind, system, template, output_format = (_field(row, key, str, location) for key in fields)
        prompts[name] = JudgePrompt(name, kind, system, template, output_format)
    if not prompts:
        raise UserError(f"{path}: has no judge prompts; give FastChat's judge_prompts.jsonl or one like it")
    return prompts


def read_answers(path: Path) -> Answers:
    """Answers of one model; of a question answered twice the later one, and each time the first choice.

    Raises:
        UserError: the file holds none, answers of several models, or something else.
    """
    turns: dict[int, tuple[str, ...]] = {}
    models: dict[str, None] = {}
    for location, row in read_jsonl(str(path)):
        choices = _field(row, "choices", list, location)
        if not choices:
            raise UserError(f"{location}: choices: is empty; wants at least one")
        texts = _field(choices[0], "turns", list, f"{location}: choices[0]")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{location}: choices[0].turns: wants the text of each turn")
        turns[_field(row, "question_id", int, location)] = tuple(texts)
        models[_field(row, "model_id", str, location)] = None
    if len(models) != 1:
        told = f"holds answers of {', '.join(models)}" if models else "has no answers"
        raise UserError(f"{path}: {told}; wants the answers of one model")
    return Answers(next(iter(models)), turns)


def answer_lines(answers: Answers, tstamps: Mapping[int, float]) -> str:
    """Answers as the text of a file; tstamps: when each question was answered."""
    return _lines(
        {
            "question_id": question_id,
            "answer_id": f"{answers.model_id}-{question_id}",
            "model_id": answers.model_id,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": tstamps[question_id],
        }
        for question_id, turns in answers.turns.items()
    )


def read_judgments(path: Path) -> list[Judgment]:
    """Single-mode judgments in the file's order, of whatever models it holds. Raises UserError."""
    judgments = []
    for location, row in read_jsonl(str(path)):
        judgments.append(
            Judgment(
                question_id=_field(row, "question_id", int, location),
                model=_field(row, "model", str, location),
                judge=_judge(row, location),
                turn=_turn(row, location),
                score=float(_field(row, "score", (int, float), location)),
                user_prompt=row.get("user_prompt", ""),
                judgment=row.get("judgment", ""),
                tstamp=row.get("tstamp", 0.0),
            )
        )
    if not judgments:
        raise UserError(f"{path}: has no judgments")
    return judgments


def read_pair_judgments(path: Path) -> list[PairJudgment]:
    """Pairwise judgments in the file's order. Raises UserError."""
    judgments = []
    for location, row in read_jsonl(str(path)):
        winners = [_field(row, key, str, location) for key in ("g1_winner", "g2_winner")]
        if not set(winners) <= set(WINNERS):
            raise UserError(f"{location}: g1_winner, g2_winner: {winners}: each is one of {', '.join(WINNERS)}")
        texts = {
            key: str(row.get(key, "")) for key in ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment")
        }
        judgments.append(
            PairJudgment(
                question_id=_field(row, "question_id", int, location),
                model_1=_field(row, "model_1", str, location),
                model_2=_field(row, "model_2", str, location),
                g1_winner=winners[0],
                g2_winner=winners[1],
                judge=_judge(row, location),
                turn=_turn(row, location),
                tstamp=row.get("tstamp", 0.0),
                **texts,
            )
        )
    if not judgments:
        raise UserError(f"{path}: has no judgments")
    return judgments


def judgment_lines(judgments: Sequence[Judgment] | Sequence[PairJudgment]) -> str:
    """Judgments as the text of a file."""
    return _lines(_row_of(judgment) for judgment in judgments)


def _row_of(judgment: Judgment | PairJudgment) -> dict[str, Any]:
    row: dict[str, Any] = {**judgment.__dict__, "judge": list(judgment.judge)}
    order: tuple[str, ...]
    if isinstance(judgment, PairJudgment):
        order = ("question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt",
                 "g1_judgment", "g2_user_prompt", "g2_judgment", "turn", "tstamp")  # fmt: skip
    else:
        order = ("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp")
        row["score"] = int(judgment.score) if judgment.score == int(judgment.score) else judgment.score
    return {key: row[key] for key in order}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _judge(row: Any, location: str) -> tuple[str, str]:
    judge = _field(row, "judge", list, location)
    if len(judge) != 2 or not all(isinstance(part, str) for part in judge):
        raise UserError(f"{location}: judge: wants [the judge's name, the prompt's name]")
    return judge[0], judge[1]


def _turn(row: Any, location: str) -> int:
    turn: int = _field(row, "turn", int, location)
    if turn not in (1, 2):
        raise UserError(f"{location}: turn: {turn}: wants 1 or 2")
    return turn


def _field(row: Any, key: str, kind: type | tuple[type, ...], location: str) -> Any:
    """A field of the right JSON kind. Raises UserError."""
    names = {str: "text", int: "a whole number", list: "a list", (int, float): "a number"}
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: wants an object, not {kind_of(row)}")
    if key not in row:
        raise UserError(f"{location}: has no {key}; its fields are {', '.join(map(str, row)) or '(none)'}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{location}: {key}: wants {names[kind]}, not {kind_of(value)}")
    return value


def _refuse_repeats(ids: Sequence[int], path: Path, key: str) -> None:
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if not ids:
        raise UserError(f"{path}: has no questions")
    if repeated:
        raise UserError(f"{path}: {key} {', '.join(map(str, repeated))}: more than once; each question has its own")
