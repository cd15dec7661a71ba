"""Many requests to a chat model, each asked once: every reply is logged as it arrives."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from kd.errors import UserError
from kd.runs.files import append_lines, cut_torn_line, disk_errors, fsync_path

logger = logging.getLogger("dae")

LENGTH = "length"  # stop reason of a reply truncated at max_tokens, as in the chat-completions protocol
NO_ROOM = "no room"  # the prompt alone fills the model's context
# Stop reasons of requests that the endpoint answered without a whole text.
FILTERED, NO_CHOICES, NO_CONTENT = "content_filter", "no choices", "no content"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """A conversation to continue. key: identifies its reply; temperature 0: greedy decoding."""

    key: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    seed: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of all that the reply depends on except the model."""
        parts = [[dict(message) for message in self.messages], self.temperature, self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """A model's text, why it stopped, and when (seconds since 1970).

    how: how the model was asked, if not the usual way (no system message, ...).
    """

    text: str
    stop: str
    how: str = ""
    tstamp: float = 0.0


class ChatModel(Protocol):
    """A model that answers requests: an endpoint or a local checkpoint."""

    def replies(self, requests: Sequence[Request], wanted: Collection[str]) -> Iterator[tuple[str, Reply]]:
        """Yield (key, reply) for the `wanted` keys as they arrive.

        All requests are passed, so that a model that answers in batches makes the same batches after a stop.
        """
        ...


class ReplyLog:
    """A file with one reply per line. An incomplete last line, left by a kill, is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replies: dict[tuple[str, str], Reply] = {}
        cut_torn_line(path)
        if path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    row = json.loads(line)
                    reply = Reply(row["reply"], row["stop"], row["how"], row["tstamp"])
                    if not all(isinstance(text, str) for text in (reply.text, reply.stop, reply.how)):
                        raise TypeError("reply, stop and how are texts")
                    self._replies[row["key"], row["request"]] = reply
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserError(
                        f"{path}:{number}: not a logged reply ({error!r}); remove the line to send its request again"
                    ) from error

    def find(self, request: Request) -> Reply | None:
        """The last reply to exactly this request."""
        return self._replies.get((request.key, request.digest))

    def add(self, request: Request, reply: Reply) -> None:
        """Log a reply; it is on disk when this returns."""
        row: dict[str, str | float] = {"key": request.key, "request": request.digest, "reply": reply.text}
        row |= {"stop": reply.stop, "how": reply.how, "tstamp": reply.tstamp}
        new = not self._path.exists()
        append_lines(self._path, json.dumps(row) + "\n")
        with disk_errors(self._path):
            fsync_path(self._path)
            if new:
                fsync_path(self._path.parent)
        self._replies[request.key, request.digest] = reply


def was_answered(reply: Reply) -> bool:
    """Whether the model wrote the reply to its end or to its limit."""
    return reply.stop not in (FILTERED, NO_CHOICES, NO_CONTENT)


def unanswered(requests: Sequence[Request], log: ReplyLog, usable: Callable[[Reply], bool]) -> list[Request]:
    """The requests without a usable logged reply."""
    return [request for request in requests if (found := log.find(request)) is None or not usable(found)]


def ask_all(
    open_model: Callable[[], ChatModel],
    requests: Sequence[Request],
    log: ReplyLog,
    what: str,
    usable: Callable[[Reply], bool] = was_answered,
) -> dict[str, Reply]:
    """The reply to every request, by its key: logged ones from the log, the others from the model.

    open_model: called only if requests are left. what: the replies' name on the progress display. usable: requests
    whose logged replies are not usable are sent again.

    Raises:
        UserError, MachineError: by the model. Earlier replies are in the log.
    """
    by_key = {request.key: request for request in requests}
    assert len(by_key) == len(requests), "keys are unique"
    wanted = {request.key for request in unanswered(requests, log, usable)}
    if wanted:
        console, done = Console(stderr=True), len(requests) - len(wanted)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=len(requests), completed=done)
            for key, reply in open_model().replies(requests, wanted):
                log.add(by_key[key], replace(reply, tstamp=time.time()))
                progress.advance(task)
    replies = {request.key: log.find(request) for request in requests}
    return {key: reply for key, reply in replies.items() if reply is not None}
