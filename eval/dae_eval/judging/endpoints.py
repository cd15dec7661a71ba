"""Chat models behind an OpenAI-compatible endpoint (kd/served/connection.py), in two known dialects."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dae_eval.judging.asking import (
    FILTERED,
    LENGTH,
    NO_CHOICES,
    NO_CONTENT,
    NO_ROOM,
    Message,
    Reply,
    Request,
    was_answered,
)
from kd.errors import UserError
from kd.served.connection import TIMEOUT, TRIES_AGAIN, Connection, EndpointChoice, Wording, concurrent_answers

if TYPE_CHECKING:
    import openai

logger = logging.getLogger("dae")

TRIES_FOR_TEXT = 3  # requests to an endpoint that answers without choices or content, or filters the reply
NO_SYSTEM = "asked without a system message: its text is put before the user's"
WORDING = Wording(
    "chat-completions",
    "replies so far are kept; run the same command to resume",
    "lower --requests-per-minute or --concurrency, or check the quota",
)


@dataclass(frozen=True)
class Dialect:
    """How a server is asked: the name of the length limit, and whether there is a system message."""

    length_key: str = "max_tokens"
    system: bool = True

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        sent = [dict(message) for message in messages]
        return sent if self.system else without_system(sent)

    def after(self, refusal: str) -> Dialect | None:
        """The dialect to try after an error 400 with this text, or None if the text names neither difference."""
        text = refusal.lower()
        if self.length_key == "max_tokens" and "max_completion_tokens" in text:
            return replace(self, length_key="max_completion_tokens")
        if self.system and ("system" in text or "developer" in text):
            return replace(self, system=False)
        return None

    @property
    def how(self) -> str:
        """The dialect in words; empty for the usual one."""
        words = [] if self.length_key == "max_tokens" else [f"asked with {self.length_key}"]
        return "; ".join(words if self.system else [*words, NO_SYSTEM])


def without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with the system message's text put before the first user message."""
    if not messages or messages[0]["role"] != "system":
        return messages
    first = messages[1]
    return [{**first, "content": f"{messages[0]['content']}\n\n{first['content']}"}, *messages[2:]]


def stop_of_refusal(refusal: str) -> str | None:
    """The stop reason if an error 400 concerns the text of this one request; None if any request would be refused."""
    text = refusal.lower()
    if "content_filter" in text or "content management policy" in text:
        return FILTERED
    return NO_ROOM if "context_length_exceeded" in text or "maximum context length" in text else None


def text_of(content: Any) -> str | None:
    """The text of a message's content, which some servers send in parts, with the reasoning in parts of its own."""
    if not isinstance(content, list):
        return None if content is None else str(content)
    parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
    return "".join(str(part.get("text", "")) for part in parts) if parts else None


class Endpoint:
    """A model behind an endpoint (a `dae_eval.judging.asking.ChatModel`)."""

    def __init__(self, choice: EndpointChoice, retries: int = TRIES_AGAIN, timeout: float = TIMEOUT) -> None:
        self._server = Connection(choice, WORDING, retries, timeout)
        self.url = self._server.url
        self._choice = choice
        self._dialect = Dialect()
        self._lock = threading.Lock()

    def replies(self, requests: Sequence[Request], wanted: Collection[str]) -> Iterator[tuple[str, Reply]]:
        """Yield (key, reply) as they arrive, `concurrency` requests at a time.

        After a request has failed no new one is started; the replies under way are still yielded.

        Raises:
            UserError: the endpoint refuses the key, the model or the request.
            MachineError: it cannot be reached, or fails after all retries.
        """
        self._server.refuse_unreachable()
        jobs = [request for request in requests if request.key in wanted]
        for request, reply in concurrent_answers(self.reply, jobs, self._choice.concurrency):
            yield request.key, reply

    def reply(self, request: Request) -> Reply:
        """The reply to one request; `stop` says why, if the endpoint gives none. Raises as `replies` does."""
        for _ in range(TRIES_FOR_TEXT):
            reply = self._ask(request)
            if was_answered(reply):
                break
        return reply

    def _ask(self, request: Request) -> Reply:
        import openai

        while True:
            dialect = self._dialect
            length: dict[str, Any] = {dialect.length_key: request.max_tokens}
            messages: Any = dialect.messages(request.messages)
            try:
                completion = self._server.client.chat.completions.create(
                    model=self._choice.model,
                    messages=messages,
                    temperature=request.temperature,
                    extra_headers=self._server.headers,
                    **length,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                stop = stop_of_refusal(f"{error.code} {error}")
                if stop is not None:
                    return Reply("", stop, dialect.how)
                self._adapt(dialect, error)
            except (openai.OpenAIError, ValueError) as error:
                raise self._server.described(error) from error
            else:
                return self._read(completion, dialect.how)

    def _adapt(self, dialect: Dialect, error: openai.APIStatusError) -> None:
        """Change the dialect after a refusal, or raise UserError."""
        changed = dialect.after(str(error))
        if changed is None:
            raise self._server.refused(error) from error
        with self._lock:
            if self._dialect != dialect:
                return  # another thread has changed it already
            self._dialect = changed
            logger.info("%s: %s", self._choice.model, changed.how)

    def _read(self, completion: Any, how: str) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices or not isinstance(choices, list):
            if "choices" not in getattr(completion, "model_fields_set", ()) and not hasattr(completion, "error"):
                raise UserError(
                    f"{self.url}: not a chat-completions endpoint; check {self._choice.flag} (it often ends in /v1)"
                )
            return Reply("", NO_CHOICES, how)
        stop = str(getattr(choices[0], "finish_reason", None))
        # A filtered choice may have no message at all. `reasoning_content` beside the content is not read.
        text = text_of(getattr(getattr(choices[0], "message", None), "content", None))
        if stop.startswith(FILTERED):
            stop = FILTERED
        elif text is None and stop != LENGTH:
            stop = NO_CONTENT
        return Reply(self._server.without_key((text or "").strip()), stop, how)
