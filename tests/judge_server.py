"""A judge behind HTTP: a process of its own on loopback that speaks the chat-completions protocol, well or badly.

    with JudgeServer() as server:
        server.behave(script=["429", "500", "good"])   # the next requests, in this order; after that all are good
        ...
        server.requests()                              # what came in

Steps of a script: good, malformed (no rating), html, 429 (with Retry-After), 500, 401, 404, 400 (for no known reason),
cut (in the middle of the body), hold (answered after `release`). Without a text: empty (no choices), upstream (an error
instead of choices), null (no content), reasoning (no content beside its reasoning), filtered (as finish_reason),
blocked (400 of a content filter), crowded (400, the prompt is too long). truncated: at the length limit; parts: the
content is a list of parts.
Standing behaviour: `needs_key` (401 without it), `echo_key` (replies repeat the key), `max_tokens: false` and
`system: false` (400 with the usual words), `malformed: TEXT` (no rating where the prompt holds TEXT), `fixed` (always
the same reply), `always: {TEXT: STEP}` (that step where the prompt holds TEXT).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

STANDING = {
    "needs_key": None, "echo_key": False, "max_tokens": True, "system": True, "malformed": None, "fixed": None,
    "always": {},
}  # fmt: skip


def rating_of(prompt: str) -> int:
    """The rating that the server gives to a prompt: 1 to 10."""
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def verdict_of(prompt: str) -> str:
    """The verdict that the server gives to a prompt with two answers: A, B or C."""
    return "ABC"[int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 3]


class JudgeServer:
    """The process, from the test's side."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-u", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def behave(self, **behaviour: Any) -> None:
        """Forget requests and script; `script` and standing behaviour from now on."""
        self._post("behave", behaviour)

    def release(self) -> None:
        """Let go of requests that are held."""
        self._post("release", {})

    def requests(self) -> list[dict[str, Any]]:
        """Every chat request since `behave`: headers and body, refused ones too."""
        return self._post("requests", {})

    def release_when(self, steps: Sequence[str]) -> None:
        """Let go once requests with all of these steps have come in (in a thread of its own)."""

        def wait() -> None:
            while Counter(steps) - Counter(one["step"] for one in self.requests()):
                pass
            self.release()

        threading.Thread(target=wait, daemon=True).start()

    def prompts(self) -> list[str]:
        """The last message of every request that was answered well."""
        return [one["body"]["messages"][-1]["content"] for one in self.requests() if one["step"] == "good"]

    def _post(self, what: str, content: Any) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{what}", json.dumps(content).encode())
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.loads(answer.read())


# -- in the process ----------------------------------------------------------------------------------------------------


class State:
    """What the server is told to do and what it has seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = 0
        self.released = threading.Event()
        self.behave({})

    def behave(self, behaviour: dict[str, Any]) -> None:
        with self.lock:
            self.script: list[str] = list(behaviour.get("script", []))
            self.standing = {**STANDING, **{key: value for key, value in behaviour.items() if key != "script"}}
            self.seen: list[dict[str, Any]] = []
            self.released.clear()

    def next_step(self, headers: dict[str, str], body: dict[str, Any]) -> str:
        with self.lock:
            step = self.refusal(headers, body) or (self.script.pop(0) if self.script else self.usual(body))
            self.active += 1
            self.seen.append({"headers": headers, "body": body, "step": step, "at_once": self.active})
        return step

    def usual(self, body: dict[str, Any]) -> str:
        prompt, always = body["messages"][-1]["content"], self.standing["always"]
        return next((step for text, step in always.items() if text in prompt), "good")

    def ended(self) -> None:
        with self.lock:
            self.active -= 1

    def refusal(self, headers: dict[str, str], body: dict[str, Any]) -> str | None:
        if self.standing["needs_key"] and headers.get("authorization") != f"Bearer {self.standing['needs_key']}":
            return "401"
        if not self.standing["max_tokens"] and "max_tokens" in body:
            return "no max_tokens"
        if not self.standing["system"] and body["messages"][0]["role"] == "system":
            return "no system"
        return None


STATE = State()
ERRORS = {
    "400": (400, "temperature is out of range"),
    "401": (401, "Incorrect API key provided: {key}"),
    "404": (404, "The model does not exist"),
    "429": (429, "Rate limit reached"),
    "500": (500, "The server had an error"),
    "no max_tokens": (400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    "no system": (400, "System role not supported"),
    "blocked": (400, "The response was filtered due to the prompt triggering the content management policy."),
    "crowded": (400, "This model's maximum context length is 512 tokens; max_completion_tokens is too large"),
}
# Choices without a whole text: content, finish_reason.
UNFINISHED: dict[str, tuple[str | None, str]] = {
    "null": (None, "stop"),
    "reasoning": (None, "length"),
    "filtered": ("I would say", "content_filter"),
    "truncated": ("For example [[3]] would be", "length"),
}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client was killed meanwhile
            return
        body = json.loads(data)
        if self.path == "/v1/chat/completions":
            headers = {name.lower(): value for name, value in self.headers.items()}
            step = STATE.next_step(headers, body)
            try:
                self.chat(step, body)
            finally:
                STATE.ended()
        elif self.path == "/behave":
            self.answer(200, STATE.behave(body))
        elif self.path == "/release":
            self.answer(200, STATE.released.set())
        elif self.path == "/requests":
            self.answer(200, STATE.seen)
        else:
            self.answer(404, {"detail": "Not Found"})

    def chat(self, step: str, body: dict[str, Any]) -> None:
        key = self.headers.get("Authorization", "")
        if step in ERRORS:
            status, message = ERRORS[step]
            self.answer(status, {"error": {"message": message.format(key=key), "type": "test"}})
        elif step == "cut":
            self.answer(200, completion("never read to its end"), cut=True)
        elif step == "html":
            self.send_response(200)
            page = b"<html>hello</html>"
            for name, value in (("Content-Type", "text/html"), ("Content-Length", str(len(page)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)
        elif step == "empty":
            self.answer(200, {**completion(""), "choices": []})
        elif step == "upstream":
            self.answer(200, {"error": {"message": "the provider is gone", "code": 502}})
        elif step in UNFINISHED:
            whole = completion(*UNFINISHED[step])
            whole["choices"][0]["message"]["reasoning_content"] = "Perhaps [[3]]."
            self.answer(200, whole)
        elif step == "parts":
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": "[[3]]"}]}
            self.answer(200, completion([thought, {"type": "text", "text": self.text(step, body, key)}]))
        else:
            if step == "hold":
                STATE.released.wait(60)
            self.answer(200, completion(self.text(step, body, key)))

    def text(self, step: str, body: dict[str, Any], key: str) -> str:
        prompt = body["messages"][-1]["content"]
        standing = STATE.standing
        if standing["fixed"] is not None:
            return str(standing["fixed"])
        if step == "malformed" or (standing["malformed"] and standing["malformed"] in prompt):
            return "I would rather not say."
        said = f"I was asked with {key}. " if standing["echo_key"] else ""
        if "Assistant B" in prompt:
            return f"{said}Both have merits. [[{verdict_of(prompt)}]]"
        return f"{said}A fair answer. Rating: [[{rating_of(prompt)}]]"

    def answer(self, status: int, content: Any, cut: bool = False) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (429, 500):
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def completion(content: Any, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)  # noqa: T201 - the test reads it
    server.serve_forever()
