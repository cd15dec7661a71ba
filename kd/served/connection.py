"""A model behind an OpenAI-compatible server: retries, rate limit, bounded concurrency, and errors in plain words.

The key is read from the environment and sent to the server only; it is never written to a file or a message.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from kd.config.address import plain_address
from kd.errors import MachineError, UserError

if TYPE_CHECKING:
    import openai

TRIES_AGAIN = 10  # retries of the client: 0.5 s, 1 s, 2 s, ... 8 s with jitter, or what Retry-After says
TIMEOUT = 600.0  # seconds for one reply
# Headers by which the client would describe the machine it runs on, and that are for its own maker's servers.
_MACHINE_HEADERS = (
    "Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async", "Retry-Count", "Read-Timeout",
)  # fmt: skip

Job = TypeVar("Job")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class EndpointChoice:
    """A server and a model there. flag: for messages; key_name: environment variable of its key."""

    url: str
    model: str
    flag: str
    key_name: str
    requests_per_minute: float | None = None
    concurrency: int = 4


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
    """Scheme, host and path of the server: the part that may be written to files.

    Raises:
        UserError: it is not an http(s) address, or contains a login or parameters.
    """
    try:
        return plain_address(choice.url, choice.key_name)
    except ValueError as error:
        raise UserError(f"{choice.flag}: {error}") from error


@dataclass(frozen=True)
class Wording:
    """What messages say of a server. protocol: what it is expected to speak; kept: what a failure leaves; slower: what
    to change after error 429.
    """

    protocol: str
    kept: str
    slower: str


class Connection:
    """A server, and one model there."""

    def __init__(
        self, choice: EndpointChoice, wording: Wording, retries: int = TRIES_AGAIN, timeout: float = TIMEOUT
    ) -> None:
        self.url = plain_url(choice)
        self.choice = choice
        self._wording = wording
        self._key = os.environ.get(choice.key_name, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"{choice.key_name}: has a line break or a character beyond ASCII, which no key has; set it again"
            )
        self.client = _client(self.url, self._key, choice.requests_per_minute, retries, timeout)
        self.headers = _headers(self._key)
        self._tries = retries + 1

    def refuse_unreachable(self) -> None:
        """Connect once, so that a server that is down is reported at once and not after all retries."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=20).close()
        except OSError as error:
            raise MachineError(
                f"{self.url}: cannot be reached ({error.strerror or error}); start the server or check "
                f"{self.choice.flag}, then run the same command again"
            ) from error

    def described(self, error: Exception) -> UserError | MachineError:
        """An error of the client, as one for the user."""
        import openai

        key_name, cause, words = self.choice.key_name, self.clean(error), self._wording
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            remedy = f"check the key in {key_name}" if self._key else f"set its key in the variable {key_name}"
            return UserError(f"{self.url}: access denied ({error.status_code}): {cause}; {remedy}")
        if isinstance(error, openai.NotFoundError):
            return UserError(
                f"{self.url}: model {self.choice.model} not found (404): {cause}; check {self.choice.flag} (it often "
                "ends in /v1) and the model's name"
            )
        if isinstance(error, openai.RateLimitError):
            times = f"after {self._tries} tries"
            return MachineError(f"{self.url}: rate limit (429) {times}: {cause}; {words.slower}; {words.kept}")
        if isinstance(error, openai.APIConnectionError):
            return MachineError(f"{self.url}: no complete reply after {self._tries} tries ({cause}); {words.kept}")
        if isinstance(error, openai.APIStatusError) and error.status_code in (408, 409, *range(500, 600)):
            return MachineError(f"{self.url}: {error.status_code} after {self._tries} tries: {cause}; {words.kept}")
        if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            return self.refused(error)
        return UserError(f"{self.url}: not a {words.protocol} endpoint: {cause}")

    def refused(self, error: openai.APIStatusError) -> UserError:
        """An error 400 or 422."""
        return UserError(
            f"{self.url}: {self.choice.model} refuses the request ({error.status_code}): {self.clean(error)}"
        )

    def clean(self, error: Exception) -> str:
        """An error's text on one line, without the key."""
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        text = " ".join(f"{error}{cause}".split())
        return self.without_key(text)[:300]

    def without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def concurrent_answers(
    ask: Callable[[Job], Answer], jobs: Sequence[Job], concurrency: int
) -> Iterator[tuple[Job, Answer]]:
    """Ask in several threads, and yield (job, answer) as answers arrive.

    After a job has failed no new one is started; those under way are still yielded. Then raises what `ask` raised.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    outcomes: queue.SimpleQueue[tuple[Job, Answer | Exception] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                outcomes.put((job, ask(job)))
            except Exception as error:  # noqa: BLE001 - raised again in the calling thread
                stop.set()
                outcomes.put((job, error))
        outcomes.put(None)

    # Daemon threads: Ctrl-C must not wait for replies that take minutes.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, len(jobs)))]
    for worker in workers:
        worker.start()
    try:
        yield from _until_workers_end(outcomes, len(workers))
    finally:
        stop.set()


def _until_workers_end(
    outcomes: queue.SimpleQueue[tuple[Job, Answer | Exception] | None], workers: int
) -> Iterator[tuple[Job, Answer]]:
    failure: Exception | None = None
    while workers:
        outcome = outcomes.get()
        if outcome is None:
            workers -= 1
            continue
        job, answer = outcome
        if isinstance(answer, Exception):
            failure = failure or answer
        else:
            yield job, answer
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

    left_out = [f"X-Stainless-{name}" for name in _MACHINE_HEADERS] + ["OpenAI-Organization", "OpenAI-Project"]
    return {name: openai.Omit() for name in (left_out if key else [*left_out, "Authorization"])}
