"""Putting many requests to a chat model so that each reply is had once: every reply is logged as it comes."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from kd.errors import UserError
from kd.runs.files import append_lines, cut_torn_line, disk_errors, fsync_path

logger = logging.getLogger("dae")

LENGTH = "length"  # why a reply stops that was cut at max_tokens; also the word of the chat-completions protocol
NO_ROOM = "no room"  # the prompt alone fills the model's context

Message = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """A conversation to be continued. key: what its reply is found again by; temperature 0: the likeliest token."""

    key: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    seed: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of all that the reply depends on, the model aside."""
        parts = [[dict(message) for message in self.messages], self.temperature, self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def characters(self) -> int:
        """Length of the prompt."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """What the model said, why it stopped there, and when (seconds since 1970).

    how: how it had to be asked, where that was not the usual way (no system message, ...).
    """

    text: str
    stop: str
    how: str = ""
    tstamp: float = 0.0


class ChatModel(Protocol):
    """A model that can be asked: an endpoint or a local checkpoint."""

    def replies(self, requests: Sequence[Request], wanted: Collection[str]) -> Iterator[tuple[str, Reply]]:
        """Yield (key, reply) for the `wanted` keys as they come.

        All requests are given, so that a model that answers in batches makes the same batches after a stop.
        """
        ...


class ReplyLog:
    """A file with one reply a line. A line that a kill tore is cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replies: dict[tuple[str, str], Reply] = {}
        cut_torn_line(path)
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                self._remember(line, number)

    def _remember(self, line: str, number: int) -> None:
        try:
            row = json.loads(line)
            reply = Reply(row["reply"], row["stop"], row["how"], row["tstamp"])
            self._replies[row["key"], row["request"]] = reply
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path}:{number}: is no logged reply ({error!r}); remove the line, and its request is put again"
            ) from error

    def find(self, request: Request) -> Reply | None:
        """The reply to exactly this request; the last one, where there are several."""
        return self._replies.get((request.key, request.digest))

    def add(self, request: Request, reply: Reply) -> None:
        """Log a reply; it is on the disk when this returns."""
        row = {
            "key": request.key,
            "request": request.digest,
            "reply": reply.text,
            "stop": reply.stop,
            "how": reply.how,
            "tstamp": reply.tstamp,
        }
        new = not self._path.exists()
        append_lines(self._path, json.dumps(row) + "\n")
        with disk_errors(self._path):
            fsync_path(self._path)
            if new:
                fsync_path(self._path.parent)
        self._replies[request.key, request.digest] = reply


def unanswered(requests: Sequence[Request], log: ReplyLog, usable: Callable[[Reply], bool]) -> list[Request]:
    """The requests that have no logged reply, or none that is usable."""
    return [request for request in requests if (found := log.find(request)) is None or not usable(found)]


def ask_all(
    open_model: Callable[[], ChatModel],
    requests: Sequence[Request],
    log: ReplyLog,
    what: str,
    usable: Callable[[Reply], bool] = lambda _: True,
) -> dict[str, Reply]:
    """The reply to every request, by its key: logged ones from the log, the others from the model.

    open_model: called only where something is left to be asked. what: the replies' name on the progress display.
    usable: logged replies for which it is false are asked for once more.

    Raises:
        UserError, MachineError: see the model. Replies that came before are in the log.
    """
    by_key = {request.key: request for request in requests}
    assert len(by_key) == len(requests), "keys are unique"
    wanted = {request.key for request in unanswered(requests, log, usable)}
    if wanted:
        with _progress(what, len(requests)) as show:
            model = open_model()
            show(len(requests) - len(wanted))
            for done, (key, reply) in enumerate(model.replies(requests, wanted), len(requests) - len(wanted) + 1):
                log.add(by_key[key], replace(reply, tstamp=time.time()))
                show(done)
    replies = {request.key: log.find(request) for request in requests}
    return {key: reply for key, reply in replies.items() if reply is not None}


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
