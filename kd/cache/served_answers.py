"""What a teacher on a server says of rows: POST /completions with `prompt_logprobs`, checked position by position.

A row is sent as token ids and comes back with, for each of its tokens, the most probable tokens there and the row's
own: {"ID": {"logprob": ..., "rank": ..., "decoded_token": ...}}. vLLM answers so. One request has one row: servers make
batches of the requests that they have.

Shape legend: T positions of a row, N response tokens, K tokens kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.cache.parts import REMEDY, Answers
from kd.config.served_recipe import KEY_NAME, ServedTeacher
from kd.data.token_rows import Ids, Mask
from kd.errors import UserError
from kd.models.teacher_logits import SMALLEST
from kd.served.connection import TRIES_AGAIN, Connection, EndpointChoice, Wording, concurrent_answers

logger = logging.getLogger("dae")

TRIES = 3  # requests for a row whose answer is wrong
TIMEOUT = 300.0  # seconds for one row
TELL_SECONDS = 60.0  # between two lines of progress
# A server's defaults may come from the model's generation_config.json: the distribution is wanted as it is.
UNCHANGED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
CUT = -9999.0  # what vLLM sends for a logarithm of 0
EXCESS = 1e-2  # by which rounding may lift a sum of probabilities above 1
CHANGED = 0.1  # of the stored probability differs between two answers to one row: another model, not rounding
FEWEST_TEXTS = 4  # tokens with a text, to tell whether they are the student's
WORDING = Wording(
    "completions",
    "rows so far are kept; run the same command to resume",
    "lower requests_per_minute or concurrency of this teacher, or check the quota",
)

Row = tuple[Ids, Mask]  # token ids [T] and which of them are response tokens [T]


class WrongAnswerError(ValueError):
    """An answer that is not what was asked for."""


class ServedAnswers:
    """One teacher on a server."""

    def __init__(self, role: str, teacher: ServedTeacher, vocabulary_rows: int, text_of: Callable[[int], str]) -> None:
        """vocabulary_rows: that the run's models share; text_of: a token's text in the student's tokenizer.

        Raises MachineError where nothing answers at the address.
        """
        pace = teacher.requests_per_minute, teacher.concurrency
        choice = EndpointChoice(teacher.url, teacher.model, f"{role}.url", KEY_NAME, *pace)
        self._role, self._teacher = role, teacher
        self._vocabulary_rows, self._text_of = vocabulary_rows, text_of
        self._server = Connection(choice, WORDING, TRIES_AGAIN, TIMEOUT)
        self._server.refuse_unreachable()

    def answers(self, rows: Sequence[Row]) -> Iterator[tuple[int, Answers]]:
        """Yields (index of the row, its answers) as they arrive: ids [N, K] int32, log_q [N, K], log_tail [N].

        Raises:
            UserError: the server refuses, or answers something else than what it was asked.
            MachineError: it cannot be reached, or fails after all retries.
        """
        told = time.monotonic()

        def ask(index: int) -> Answers:
            return self.answer(rows[index])

        answered = concurrent_answers(ask, range(len(rows)), self._teacher.concurrency)
        for count, (index, answer) in enumerate(answered, 1):
            yield index, answer
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                logger.info("cache: %s: %d of the next %d rows", self._role, count, len(rows))

    def answer(self, row: Row) -> Answers:
        """Of one row. Raises as `answers` does."""
        wrong: WrongAnswerError | None = None
        for _ in range(TRIES):
            try:
                return self._read(self._ask(row[0]), row)
            except WrongAnswerError as error:
                wrong = error
        raise UserError(
            f"{self._server.url}: {self._role}: {self._teacher.model} answers wrongly: {wrong}; nothing of this row "
            "was kept"
        ) from wrong

    def refuse_change(self, row: Row, stored: Answers, folder: Path) -> None:
        """Raise UserError where the server now says something else of a row than what is stored."""
        changed = changed_share(stored, self.answer(row))
        if changed > CHANGED:
            raise UserError(
                f"{self._server.url}: {self._teacher.model} no longer answers as when {folder} was filled "
                f"({changed:.0%} of the probability on a row has changed): it is another model; {REMEDY}"
            )

    def _ask(self, ids: Ids) -> Any:
        import openai

        try:
            completion: Any = self._server.client.completions.create(
                model=self._teacher.model,
                prompt=[int(token) for token in ids],
                max_tokens=1,
                temperature=1.0,
                top_p=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                extra_headers=self._server.headers,
                extra_body={**UNCHANGED, "prompt_logprobs": self._teacher.top_k},
            )
        except openai.BadRequestError as error:
            raise UserError(
                f"{self._server.refused(error)}; a row of {len(ids)} tokens needs a server with --max-model-len of at "
                f"least {len(ids) + 1}, and top_k {self._teacher.top_k} one with --max-logprobs of at least that (or "
                f"lower data.max_length or {self._role}.top_k)"
            ) from error
        except (openai.OpenAIError, ValueError) as error:
            raise self._server.described(error) from error
        choices = getattr(completion, "choices", None)
        if not choices and "choices" not in getattr(completion, "model_fields_set", ()):
            raise UserError(
                f"{self._server.url}: not a completions endpoint; check {self._role}.url (it often ends in /v1)"
            )
        if not choices or not isinstance(choices, list):
            raise WrongAnswerError("it has no choices")
        extra = getattr(choices[0], "model_extra", None) or {}
        if extra.get("prompt_logprobs") is None:
            raise UserError(
                f"{self._server.url}: {self._teacher.model} answers without `prompt_logprobs`; a server that gives "
                "them is needed, such as vLLM's"
            )
        return extra["prompt_logprobs"]

    def _read(self, positions: Any, row: Row) -> Answers:
        ids, mask = row
        if not isinstance(positions, Sequence) or len(positions) != len(ids):
            count = len(positions) if isinstance(positions, Sequence) else "no"
            raise WrongAnswerError(f"{count} positions for a row of {len(ids)} tokens")
        if positions[0] is not None:
            raise WrongAnswerError("the first position has probabilities, and no token comes before it")
        entries = [log_probabilities(positions[at], int(ids[at]), at) for at in range(1, len(ids))]
        read = [self._largest(entry, at) for at, entry in enumerate(entries, 1) if mask[at]]
        self._refuse_other_tokens(positions, ids)
        ids_NK, log_q_NK = (np.array([one[part] for one in read]) for part in (0, 1))
        left_N = 1.0 - np.exp(log_q_NK).sum(axis=1)
        log_tail_N = np.log(np.maximum(left_N, math.exp(SMALLEST)))
        # Where rounding leaves more than 1, the largest probabilities are all there is.
        log_q_NK = log_q_NK - np.log(np.maximum(1.0, 1.0 - left_N))[:, None]
        return {
            "ids": torch.from_numpy(ids_NK.astype(np.int32)),
            "log_q": torch.from_numpy(log_q_NK.astype(np.float32)),
            "log_tail": torch.from_numpy(log_tail_N.astype(np.float32)),
        }

    def _largest(self, entry: Mapping[int, Any], position: int) -> tuple[list[int], list[float]]:
        """(token ids [K], log probabilities [K]) of one position, the largest first."""
        try:
            found = {token: float(value) for token, value in entry.items() if value is not None}
        except (TypeError, ValueError) as error:
            raise WrongAnswerError(f"position {position} has values that are no numbers ({error})") from error
        kept = min(self._teacher.top_k, self._vocabulary_rows - 1)
        if any(math.isnan(value) or value > EXCESS for value in found.values()):
            raise WrongAnswerError(f"position {position} has values that are no logarithms of probabilities")
        largest = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:kept]
        if len(largest) < kept:
            raise WrongAnswerError(f"position {position} has {len(largest)} tokens, and top_k is {self._teacher.top_k}")
        if largest[-1][1] <= CUT:
            raise WrongAnswerError(
                f"position {position} has {largest[-1][1]:g} instead of a probability: the server cuts the "
                "distribution; start it with --logprobs-mode raw_logprobs"
            )
        if not all(0 <= token < self._vocabulary_rows for token, _ in largest):
            raise WrongAnswerError(
                f"position {position} names tokens that the student lacks (it has {self._vocabulary_rows}); a teacher "
                "needs the student's tokenizer"
            )
        if sum(math.exp(value) for _, value in largest) > 1 + EXCESS:
            raise WrongAnswerError(f"position {position} has probabilities whose sum is above 1")
        return [token for token, _ in largest], [value for _, value in largest]

    def _refuse_other_tokens(self, positions: Sequence[Any], ids: Ids) -> None:
        """Raise UserError where most of the row's tokens have other texts there: another tokenizer."""
        texts = []
        for entry, token in zip(positions[1:], ids[1:].tolist(), strict=True):
            own = entry.get(str(token)) if isinstance(entry, Mapping) else None
            theirs = own.get("decoded_token") if isinstance(own, Mapping) else None
            ours = self._text_of(token).strip()
            if isinstance(theirs, str) and theirs.strip() and ours and "\ufffd" not in ours + theirs:
                texts.append((ours, theirs.strip()))
        if len(texts) >= FEWEST_TEXTS and sum(ours == theirs for ours, theirs in texts) < len(texts) / 2:
            ours, theirs = next((ours, theirs) for ours, theirs in texts if ours != theirs)
            raise UserError(
                f"{self._server.url}: {self._teacher.model} has another tokenizer (a token that is {ours!r} here is "
                f"{theirs!r} there); a teacher needs the student's"
            )


def log_probabilities(entry: Any, own: int, position: int) -> dict[int, Any]:
    """Token -> what is sent as its log probability, at one position. own: the row's token there."""
    try:
        found = {int(token): value["logprob"] for token, value in entry.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WrongAnswerError(f"position {position} has no log probabilities") from error
    if len(found) < len(entry):
        raise WrongAnswerError(f"position {position} has a token twice")
    if own not in found:
        raise WrongAnswerError(f"position {position} is about other tokens than the one that was sent ({own})")
    return found


def changed_share(stored: Answers, now: Answers) -> float:
    """Sum |q - q'| / sum q over the stored tokens of a row; one that is not among the new ones has q' = 0."""
    same_NKK = stored["ids"][:, :, None] == now["ids"][:, None, :]
    now_NK = (same_NKK * now["log_q"].float().exp()[:, None, :]).sum(-1)
    stored_NK = stored["log_q"].float().exp()
    return float((stored_NK - now_NK).abs().sum() / stored_NK.sum())
