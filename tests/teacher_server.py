"""A server that answers `prompt_logprobs` of a real checkpoint as vLLM does, well or badly; a thread on loopback.

    with TeacherServer(folder) as server:
        server.behave("429", "nan")   # the next requests, in this order; after that all are good

Steps: good, 429 (with Retry-After), 500, 401, 404, 400 (too long), cut (in the middle of the body), html, and answers
that are wrong: shifted (about other tokens), missing (a position is null), short (too few positions), nan, positive,
few (not all that were asked for), first (probabilities at the first position), prompt (a token of the prompt is
another), cut_off (-9999), null, foreign (a token that the student does not have), heavy (probabilities above 1),
plain (without prompt_logprobs), empty (no choices).
"""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ERRORS = {
    "400": (400, "This model's maximum context length is 8 tokens"),
    "401": (401, "Incorrect API key provided: {key}"),
    "404": (404, "The model `other` does not exist"),
    "429": (429, "Rate limit reached"),
    "500": (500, "The server had an error"),
}


class TeacherServer:
    """What it is asked is in `requests`: headers and body; `texts` may be changed to those of another tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.serve(folder)
        self.texts = {token: self.tokenizer.decode([token]) for token in range(len(self.tokenizer))}
        self.script: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def serve(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def __enter__(self) -> Self:
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                ours.respond(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def behave(self, *script: str) -> None:
        with self.lock:
            self.script, self.requests = list(script), []

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            step = self.script.pop(0) if self.script else "good"
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.requests.append({"path": handler.path, "headers": headers, "body": body, "step": step})
        if step in ERRORS:
            status, message = ERRORS[step]
            key = handler.headers.get("Authorization", "")
            send(handler, status, {"error": {"message": message.format(key=key), "type": "test"}})
        elif step == "html":
            send(handler, 200, b"<html>hello</html>")
        else:
            send(handler, 200, self.completion(step, body), cut=step == "cut")

    def completion(self, step: str, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if step != "plain":
            choice["prompt_logprobs"] = spoiled(step, self.prompt_logprobs(body["prompt"], body["prompt_logprobs"]))
        choices = [] if step == "empty" else [choice]
        return {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices}

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        with torch.no_grad():
            log_q_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[dict[str, Any] | None] = [None]
        for log_q_V, own in zip(log_q_TV, ids[1:], strict=False):
            ranked = log_q_V.argsort(descending=True).tolist()
            tokens = dict.fromkeys([*ranked[:k], own])
            found.append({str(token): self.entry(log_q_V, token, ranked.index(token) + 1) for token in tokens})
        return found

    def entry(self, log_q_V: torch.Tensor, token: int, rank: int) -> dict[str, Any]:
        return {"logprob": float(log_q_V[token]), "rank": rank, "decoded_token": self.texts.get(token, "")}


def spoiled(step: str, positions: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    last = positions[-1]
    assert last is not None
    first = next(iter(last))
    if step == "shifted":
        return [None, *positions[2:], {"1": {"logprob": -1.0}}]
    if step == "first":
        return [last, *positions[1:]]
    if step == "prompt":
        return [None, {"1": {"logprob": -1.0}}, *positions[2:]]
    if step in ("cut_off", "null"):
        value = -9999.0 if step == "cut_off" else None
        return [*positions[:-1], {token: {"logprob": value} for token in last}]
    if step == "missing":
        return [*positions[:-1], None]
    if step == "short":
        return positions[:-1]
    if step in ("nan", "positive"):
        return [*positions[:-1], {**last, first: {"logprob": math.nan if step == "nan" else 3.0}}]
    if step == "few":
        return [*positions[:-1], dict(list(last.items())[-2:])]
    if step == "foreign":
        return [*positions[:-1], {**last, "123456": {"logprob": -1.0}}]
    if step == "heavy":
        return [*positions[:-1], {token: {"logprob": -0.1} for token in last}]
    return positions


def send(handler: BaseHTTPRequestHandler, status: int, content: Any, cut: bool = False) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if isinstance(content, bytes) else "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status in (429, 500):
            handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
    except (BrokenPipeError, ConnectionResetError):
        handler.close_connection = True
    handler.close_connection |= cut
