"""Chat models behind an OpenAI-compatible endpoint: retries, rate limit, bounded concurrency, and two known dialects.

The key is read from the environment and sent to the endpoint only; it is never written to a file or a message.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
from kd.errors import MachineError, UserError

if TYPE_CHECKING:
    import openai

logger = logging.getLogger("dae")

TRIES_AGAIN = 10  # retries of the client: 0.5 s, 1 s, 2 s, ... 8 s with jitter, or what Retry-After says
TRIES_FOR_TEXT = 3  # requests to an endpoint that answers without choices or content, or filters the reply
TIMEOUT = 600.0  # seconds for one reply
NO_SYSTEM = "asked without a system message: its text is put before the user's"
# Headers by which the client would describe the machine it runs on.
_MACHINE_HEADERS = (
    "Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async", "Retry-Count", "Read-Timeout",
)  # fmt: skip


@dataclass(frozen=True)
class EndpointChoice:
    """An endpoint and a model there. flag: for messages; key_name: environment variable of its key."""

    url: str
    model: str
    flag: str
    key_name: str
    requests_per_minute: float | None = None
    concurrency: int = 4


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


class Pace:
    """Starts at most `per_minute` requests a minute, evenly spaced, over all threads."""

    def __init__(
        self,
        per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval = 60.0 / per_minute
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = clock()

    def wait(self, *_: Any) -> None:
        """Return when the next request may start."""
        with self._lock:
            now = self._clock()
            begin = max(now, self._next)
            self._next = begin + self._interval
        if begin > now:
            self._sleep(begin - now)


def plain_url(choice: EndpointChoice) -> str:
    """Scheme, host and path of the endpoint: the part that may be written to files.

    Raises:
        UserError: it is not an http(s) address, or contains a login or parameters.
    """
    try:
        parts = urlsplit(choice.url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(
            f"{choice.flag}: invalid address ({error}); expected http://localhost:8000/v1 or the like"
        ) from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{choice.flag} {choice.url}: expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"{choice.flag}: contains a login or parameters, which would be written to files; give the address without "
            f"them and set the key in the environment variable {choice.key_name}"
        )
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{f':{port}' if port else ''}{parts.path}"


class Endpoint:
    """A model behind an endpoint (a `dae_eval.judging.asking.ChatModel`)."""

    def __init__(self, choice: EndpointChoice, retries: int = TRIES_AGAIN, timeout: float = TIMEOUT) -> None:
        self.url = plain_url(choice)
        self._choice = choice
        self._key = os.environ.get(choice.key_name, "").strip()
        self._client = _client(self.url, self._key, choice.requests_per_minute, retries, timeout)
        self._headers = _headers(self._key)
        self._tries = retries + 1
        self._dialect = Dialect()
        self._lock = threading.Lock()

    def replies(self, requests: Sequence[Request], wanted: Collection[str]) -> Iterator[tuple[str, Reply]]:
        """Yield (key, reply) as they arrive, `concurrency` requests at a time.

        After a request has failed no new one is started; the replies under way are still yielded.

        Raises:
            UserError: the endpoint refuses the key, the model or the request.
            MachineError: it cannot be reached, or fails after all retries.
        """
        self._refuse_unreachable()
        jobs: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in requests:
            if request.key in wanted:
                jobs.put(request)
        outcomes: queue.SimpleQueue[tuple[str, Reply | Exception] | None] = queue.SimpleQueue()
        stop = threading.Event()
        # Daemon threads: Ctrl-C must not wait for replies that take minutes.
        workers = [
            threading.Thread(target=self._work, args=(jobs, outcomes, stop), daemon=True)
            for _ in range(min(self._choice.concurrency, len(wanted)))
        ]
        for worker in workers:
            worker.start()
        try:
            yield from _until_workers_end(outcomes, len(workers))
        finally:
            stop.set()

    def _work(
        self,
        jobs: queue.SimpleQueue[Request],
        outcomes: queue.SimpleQueue[tuple[str, Reply | Exception] | None],
        stop: threading.Event,
    ) -> None:
        while not stop.is_set():
            try:
                request = jobs.get_nowait()
            except queue.Empty:
                break
            try:
                outcomes.put((request.key, self.reply(request)))
            except Exception as error:  # noqa: BLE001 - raised again in the calling thread
                stop.set()
                outcomes.put((request.key, error))
        outcomes.put(None)

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
                completion = self._client.chat.completions.create(
                    model=self._choice.model,
                    messages=messages,
                    temperature=request.temperature,
                    extra_headers=self._headers,
                    **length,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                stop = stop_of_refusal(f"{error.code} {error}")
                if stop is not None:
                    return Reply("", stop, dialect.how)
                self._adapt(dialect, error)
            except (openai.OpenAIError, ValueError) as error:
                raise self._described(error) from error
            else:
                return self._read(completion, dialect.how)

    def _adapt(self, dialect: Dialect, error: openai.APIStatusError) -> None:
        """Change the dialect after a refusal, or raise UserError."""
        changed = dialect.after(str(error))
        if changed is None:
            raise UserError(
                f"{self.url}: {self._choice.model} refuses the request ({error.status_code}): {self._clean(error)}"
            ) from error
        with self._lock:
            if self._dialect != dialect:
                return  # another thread has changed it already
            self._dialect = changed
            logger.info("%s: %s", self._choice.model, changed.how)

    def _read(self, completion: Any, how: str) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
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
        return Reply(self._without_key((text or "").strip()), stop, how)

    def _refuse_unreachable(self) -> None:
        """Connect once, so that a server that is down is reported at once and not after all retries."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=20).close()
        except OSError as error:
            raise MachineError(
                f"{self.url}: cannot be reached ({error.strerror or error}); start the server or check "
                f"{self._choice.flag}, then run the same command again"
            ) from error

    def _described(self, error: Exception) -> UserError | MachineError:
        import openai

        key_name, cause = self._choice.key_name, self._clean(error)
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            remedy = f"check the key in {key_name}" if self._key else f"set its key in the variable {key_name}"
            return UserError(f"{self.url}: access denied ({error.status_code}): {cause}; {remedy}")
        if isinstance(error, openai.NotFoundError):
            return UserError(
                f"{self.url}: model {self._choice.model} not found (404): {cause}; check {self._choice.flag} (it often "
                "ends in /v1) and the model's name"
            )
        kept = "replies so far are kept; run the same command to resume"
        if isinstance(error, openai.RateLimitError):
            slower = "lower --requests-per-minute or --concurrency, or check the quota"
            return MachineError(f"{self.url}: rate limit (429) after {self._tries} tries: {cause}; {slower}; {kept}")
        if isinstance(error, openai.APIConnectionError):
            return MachineError(f"{self.url}: no complete reply after {self._tries} tries ({cause}); {kept}")
        if isinstance(error, openai.APIStatusError) and error.status_code in (408, 409, *range(500, 600)):
            return MachineError(f"{self.url}: {error.status_code} after {self._tries} tries: {cause}; {kept}")
        return UserError(f"{self.url}: not a chat-completions endpoint: {cause}")

    def _clean(self, error: Exception) -> str:
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        text = " ".join(f"{error}{cause}".split())
        return self._without_key(text)[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _until_workers_end(
    outcomes: queue.SimpleQueue[tuple[str, Reply | Exception] | None], workers: int
) -> Iterator[tuple[str, Reply]]:
    failure: Exception | None = None
    while workers:
        outcome = outcomes.get()
        if outcome is None:
            workers -= 1
        elif isinstance(outcome[1], Exception):
            failure = failure or outcome[1]
        else:
            yield outcome[0], outcome[1]
    if failure is not None:
        raise failure


def _client(url: str, key: str, requests_per_minute: float | None, retries: int, timeout: float) -> openai.OpenAI:
    import openai

    hooks = {"request": [Pace(requests_per_minute).wait]} if requests_per_minute else {}
    # trust_env: no proxies and no .netrc from the environment.
    client = openai.DefaultHttpxClient(trust_env=False, event_hooks=hooks, timeout=timeout)
    return openai.OpenAI(
        api_key=key or "none", admin_api_key="", base_url=url, max_retries=retries, timeout=timeout, http_client=client
    )


def _headers(key: str) -> dict[str, Any]:
    """Headers that the client must not send."""
    import openai

    left_out = [f"X-Stainless-{name}" for name in _MACHINE_HEADERS]
    return {name: openai.Omit() for name in (left_out if key else [*left_out, "Authorization"])}
