"""FastChat's MT-Bench files: questions, judge prompts, answers, single and pairwise judgments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd.data.messages import kind_of
from kd.data.records import read_jsonl
from kd.errors import UserError

HUB = "hub:"
NO_RATING = -1.0  # FastChat's score if the judge's text has no rating
ERROR = "error"  # FastChat's winner if the judge's text has no verdict

Winner = Literal["model_1", "model_2", "tie", "error"]
WINNERS = ("model_1", "model_2", "tie", ERROR)


@dataclass(frozen=True)
class Question:
    id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class JudgePrompt:
    """The prompt of a judge. template: with fields in braces, such as {question}. kind: single or pairwise."""

    name: str
    kind: str
    system: str
    template: str
    output_format: str


@dataclass(frozen=True)
class Answers:
    """A model's answers: the text of each turn by question id."""

    model_id: str
    turns: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Judgment:
    """A rating of one answer, with the fields in the file's order. score: from the judge's text, or NO_RATING."""

    question_id: int
    model: str
    judge: tuple[str, str]
    user_prompt: str
    judgment: str
    score: float
    turn: int
    tstamp: float


@dataclass(frozen=True)
class PairJudgment:
    """The verdicts on two answers, with the fields in the file's order: in game 1 model_1 is A, in game 2 it is B."""

    question_id: int
    model_1: str
    model_2: str
    g1_winner: str
    g2_winner: str
    judge: tuple[str, str]
    g1_user_prompt: str
    g1_judgment: str
    g2_user_prompt: str
    g2_judgment: str
    turn: int
    tstamp: float


def local_file(source: str, flag: str) -> Path:
    """A path as it is, or the downloaded file of `hub:OWNER/NAME/FILE`, which names one in a hub data set.

    Raises:
        UserError: it is not found or cannot be downloaded.
    """
    if source.startswith(HUB):
        return _hub_file(source, flag)
    path = Path(source)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "file not found"
        raise UserError(f"{flag} {source}: {wrong}; give a file, or hub:OWNER/NAME/FILE for one of a hub data set")
    return path


def _hub_file(source: str, flag: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{flag} {source}: expected hub:OWNER/NAME/FILE, with the file's path in the data set")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{flag} {source}: cannot be downloaded ({reason}); check the spelling and your network, or download the "
            "file and give its path"
        ) from error


def read_questions(path: Path) -> list[Question]:
    """The questions in the file's order. Raises UserError."""
    questions = [_question(row, location) for location, row in read_jsonl(str(path))]
    if not questions:
        raise UserError(f"{path}: has no questions")
    repeated = sorted(id_ for id_, count in Counter(question.id for question in questions).items() if count > 1)
    if repeated:
        raise UserError(f"{path}: question_id: duplicates {', '.join(map(str, repeated))}; ids must be unique")
    return questions


def _question(row: Any, location: str) -> Question:
    turns = _field(row, "turns", list, location)
    if not 1 <= len(turns) <= 2 or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{location}: turns: expected one or two strings, as the judge prompts do")
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
    """Answers of one model: the first choice of the last answer to each question.

    Raises:
        UserError: the file is invalid, or has no answers or those of several models.
    """
    turns: dict[int, tuple[str, ...]] = {}
    models: dict[str, None] = {}
    for location, row in read_jsonl(str(path)):
        choices = _field(row, "choices", list, location)
        if not choices:
            raise UserError(f"{location}: choices: expected at least one")
        texts = _field(choices[0], "turns", list, f"{location}: choices[0]")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{location}: choices[0].turns: expected the text of each turn")
        turns[_field(row, "question_id", int, location)] = tuple(texts)
        models[_field(row, "model_id", str, location)] = None
    if len(models) != 1:
        found = f"has answers of {', '.join(models)}" if models else "has no answers"
        raise UserError(f"{path}: {found}; expected the answers of one model")
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
    """Single-mode judgments in the file's order, of all models. Raises UserError."""
    judgments = []
    for location, row in read_jsonl(str(path)):
        model, score = _field(row, "model", str, location), float(_field(row, "score", (int, float), location))
        texts: dict[str, Any] = {
            key: text if isinstance(text := row.get(key), str) else "" for key in ("user_prompt", "judgment")
        }
        judgments.append(Judgment(model=model, score=score, **texts, **_of_any_judgment(row, location)))
    if not judgments:
        raise UserError(f"{path}: has no judgments")
    return judgments


def read_pair_judgments(path: Path) -> list[PairJudgment]:
    """Pairwise judgments in the file's order. Raises UserError."""
    judgments = []
    for location, row in read_jsonl(str(path)):
        fields = _of_any_judgment(row, location)
        fields |= {key: _field(row, key, str, location) for key in ("model_1", "model_2", "g1_winner", "g2_winner")}
        for key in ("g1_winner", "g2_winner"):
            if fields[key] not in WINNERS:
                raise UserError(f"{location}: {key}: {fields[key]!r}: expected one of {', '.join(WINNERS)}")
        for key in ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment"):
            fields[key] = str(row.get(key, ""))
        judgments.append(PairJudgment(**fields))
    if not judgments:
        raise UserError(f"{path}: has no judgments")
    return judgments


def _of_any_judgment(row: Any, location: str) -> dict[str, Any]:
    judge, turn = _field(row, "judge", list, location), _field(row, "turn", int, location)
    if len(judge) != 2 or not all(isinstance(part, str) for part in judge):
        raise UserError(f"{location}: judge: expected [name of the judge, name of the prompt]")
    if turn not in (1, 2):
        raise UserError(f"{location}: turn: {turn}: expected 1 or 2")
    return {
        "question_id": _field(row, "question_id", int, location),
        "judge": tuple(judge),
        "turn": turn,
        "tstamp": row.get("tstamp", 0.0),
    }


def judgment_lines(judgments: Sequence[Judgment | PairJudgment]) -> str:
    rows = [dict(vars(judgment)) for judgment in judgments]
    for row in rows:
        if "score" in row and row["score"] == int(row["score"]):
            row["score"] = int(row["score"])
    return _lines(rows)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _field(row: Any, key: str, kind: type | tuple[type, ...], location: str) -> Any:
    """A field of the right JSON kind. Raises UserError."""
    names = {str: "a string", int: "an integer", list: "a list", (int, float): "a number"}
    if not isinstance(row, Mapping):
        raise UserError(f"{location}: expected an object, not {kind_of(row)}")
    if key not in row:
        raise UserError(f"{location}: {key}: is required; the fields are {', '.join(map(str, row)) or '(none)'}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{location}: {key}: expected {names[kind]}, not {kind_of(value)}")
    return value
