"""The author of the answers: a checkpoint or a model behind an endpoint, asked turn by turn."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dae_eval.judging.asking import NO_ROOM, ChatModel, Reply, ReplyLog, Request, ask_all, was_answered
from dae_eval.judging.endpoints import Endpoint
from dae_eval.judging.fastchat_files import Answers, Question
from dae_eval.results import ModelFacts
from kd.errors import UserError
from kd.served.connection import EndpointChoice

logger = logging.getLogger("dae")

# FastChat's sampling temperatures by category; that of all others, such as writing.
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Author:
    """A model that writes answers: a checkpoint, or with `endpoint` a model served there.

    max_new_tokens: longest answer of one turn. seed, batch_size, chat_template: of a checkpoint.
    """

    model: str
    endpoint: EndpointChoice | None = None
    max_new_tokens: int = 1024
    seed: int = 0
    batch_size: int = 8
    chat_template: str | None = None

    @property
    def model_id(self) -> str:
        """Its name in files: the last part of its path."""
        return Path(self.model).name or self.model

    def settings(self) -> dict[str, Any]:
        """All that its answers depend on except the questions. Raises UserError."""
        if self.endpoint is not None:
            return {"model at an endpoint": self.endpoint.model, "max new tokens": self.max_new_tokens}
        from dae_eval.judging.local_chat import read_chat_format, template_sha256
        from dae_eval.models import locate

        model = locate("--model", self.model, None)
        fingerprint, of_base = model.identity
        return {
            "model": fingerprint,
            "model's base": of_base,
            "chat template": template_sha256(read_chat_format(model, self.chat_template)),
            "seed": self.seed,
            "batch size": self.batch_size,
            "max new tokens": self.max_new_tokens,
        }

    def facts(self) -> ModelFacts:
        """The model; a served model that is not a local folder is identified by its name."""
        if self.endpoint is None or Path(self.model).is_dir():
            from dae_eval.models import locate

            return locate("--model", self.model, None).facts()
        return ModelFacts(self.model, hashlib.sha256(f"endpoint: {self.model}".encode()).hexdigest())

    def open(self) -> ChatModel:
        """Open the endpoint or the checkpoint. Raises UserError."""
        if self.endpoint is not None:
            return Endpoint(self.endpoint)
        from dae_eval.judging.local_chat import open_local_chat
        from dae_eval.models import locate

        return open_local_chat(locate("--model", self.model, None), self.chat_template, self.batch_size)


def seed_of(*parts: int) -> int:
    """A seed for each sequence of numbers: 0 <= seed < 2^63."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def answer_questions(
    author: Author, questions: Sequence[Question], log: ReplyLog
) -> tuple[Answers, Mapping[int, float], tuple[str, ...]]:
    """Both turns of every question, the second after the author's own first answer.

    Returns:
        The answers, when each question was answered, and notes on how the author was asked.

    Raises:
        UserError, MachineError: by the model. Earlier answers are in the log.
    """
    opened: list[ChatModel] = []

    def open_once() -> ChatModel:
        if not opened:
            opened.append(author.open())
        return opened[0]

    replies: dict[str, Reply] = {}
    for turn in (1, 2):
        requests = [_turn_request(author, q, turn, replies) for q in questions if len(q.turns) >= turn]
        if requests:
            replies |= ask_all(open_once, requests, log, f"answers, turn {turn}")
    _warn_of_unanswered(author.model, replies)
    texts = {q.id: tuple(replies[_key(q, turn)].text for turn in range(1, len(q.turns) + 1)) for q in questions}
    tstamps = {q.id: replies[_key(q, len(q.turns))].tstamp for q in questions}
    return Answers(author.model_id, texts), tstamps, notes_of(author.model_id, replies)


def _key(question: Question, turn: int) -> str:
    return f"{question.id}/{turn}"


def _turn_request(author: Author, question: Question, turn: int, replies: Mapping[str, Reply]) -> Request:
    messages = []
    for number in range(1, turn + 1):
        messages.append({"role": "user", "content": question.turns[number - 1]})
        if number < turn:
            messages.append({"role": "assistant", "content": replies[_key(question, number)].text})
    return Request(
        key=_key(question, turn),
        messages=tuple(messages),
        temperature=TEMPERATURES.get(question.category, OTHER_TEMPERATURE),
        max_tokens=author.max_new_tokens,
        seed=seed_of(author.seed, question.id, turn),
    )


def answer_instructions(
    author: Author, instructions: Sequence[str], temperature: float, log: ReplyLog
) -> tuple[list[str], tuple[str, ...]]:
    """The answer to each instruction, and notes on how the author was asked. Raises as `answer_questions`."""
    requests = [
        Request(
            key=str(index),
            messages=({"role": "user", "content": instruction},),
            temperature=temperature,
            max_tokens=author.max_new_tokens,
            seed=seed_of(author.seed, index),
        )
        for index, instruction in enumerate(instructions)
    ]
    replies = ask_all(author.open, requests, log, "answers")
    _warn_of_unanswered(author.model, replies)
    return [replies[request.key].text for request in requests], notes_of(author.model_id, replies)


def _warn_of_unanswered(model: str, replies: Mapping[str, Reply]) -> None:
    crowded = [key for key, reply in replies.items() if reply.stop == NO_ROOM]
    if crowded:
        words = "%s: %d answers are empty because the conversation fills the model's context: %s"
        logger.warning(words, model, len(crowded), first_of(crowded))
    failed = [key for key, reply in replies.items() if not was_answered(reply)]
    if failed:
        words = "%s: the endpoint gave no whole answer to %d requests (%s): %s; the same command asks them again"
        stops = ", ".join(sorted({replies[key].stop for key in failed}))
        logger.warning(words, model, len(failed), stops, first_of(failed))


def first_of(items: Sequence[object], most: int = 10) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def notes_of(name: str, replies: Mapping[str, Reply]) -> tuple[str, ...]:
    """Notes on how a model was asked, if not the usual way."""
    return tuple(f"{name}: {how}" for how in sorted({reply.how for reply in replies.values()} - {""}))


def refuse_missing(answers: Answers, questions: Sequence[Question], source: str) -> None:
    """Raise UserError if a question's turn has no answer."""
    missing = [q.id for q in questions if len(answers.turns.get(q.id, ())) < len(q.turns)]
    if missing:
        raise UserError(
            f"{source}: answers are missing for {len(missing)} of {len(questions)} questions ({first_of(missing)}); "
            "give the answers to all turns of all questions"
        )
