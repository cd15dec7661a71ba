"""What judges and servers reply, files of benchmarks with a judge, folders of evaluations, model cards."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import shutil
import socket
from typing import Any

import httpx2
import numpy as np
import openai
from dae_eval.folders import read_evaluation, write_evaluation
from dae_eval.judging.alpaca_scores import occurrences, read_annotations, win_rate
from dae_eval.judging.asking import LENGTH, Reply, ReplyLog, Request
from dae_eval.judging.endpoints import Endpoint
from dae_eval.judging.fastchat_files import read_answers, read_judge_prompts, read_questions
from dae_eval.judging.mt_bench_results import judgments_of, pair_judgments_of, values_of
from dae_eval.judging.readings import has_several, rating_of, ratings_in, verdict_of, verdicts_in
from dae_eval.rendering.card import read_card
from evaluations import models
from fuzzing.mutations import Choose, json_document, json_lines, mutated_bytes, one_of, text_document
from fuzzing.targets import Target, parts_of, together, workplace, written

from kd.cache.served_answers import ServedAnswers
from kd.config.served_recipe import ServedTeacher
from kd.errors import UserError
from kd.served.connection import EndpointChoice

STOPS = ("stop", LENGTH, "content_filter", "None")
REPLIES = [
    "Good. Rating: [[7]]", "[[7.5]] or [8]", "<think>[[1]]</think> Rating: [[10]]", "[[A]]", "A is better: [[B]] [[C]]",
    "<|channel|>analysis<|message|>hm<|channel|>final<|message|>[[9]]", "[think] no end [[3]]", "[[99999999999999]]",
    "analysisThe answer is poor.assistantfinal[[2]]", "◁think▷ [[4]] ◁/think▷", "",
]  # fmt: skip
QUESTION = {"question_id": 81, "category": "writing", "turns": ["a?", "b?"], "reference": ["x", "y"]}
ANSWER = {"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}], "tstamp": 1.0}
PROMPT = {
    "name": "single-v1", "type": "single", "system_prompt": "s", "prompt_template": "{question} {answer}",
    "output_format": "[[rating]]",
}  # fmt: skip
JUDGMENT = {
    "question_id": 81, "model": "m", "judge": ["gpt", "single-v1"], "user_prompt": "u", "judgment": "[[7]]", "score": 7,
    "turn": 1, "tstamp": 1.0,
}  # fmt: skip
PAIR = {
    "question_id": 81, "model_1": "m", "model_2": "n", "g1_winner": "model_1", "g2_winner": "tie",
    "judge": ["gpt", "pair-v2"], "g1_user_prompt": "u", "g1_judgment": "[[A]]", "g2_user_prompt": "u",
    "g2_judgment": "[[C]]", "turn": 1, "tstamp": 1.0,
}  # fmt: skip
ANNOTATION = {
    "instruction": "i", "output_1": "a", "generator_1": "b", "dataset": "d", "output_2": "c", "generator_2": "m",
    "annotator": "w", "preference": 2.0,
}  # fmt: skip
LOGGED = {"key": "81-1", "request": "0" * 64, "reply": "[[7]]", "stop": "stop", "how": "", "tstamp": 1.0}
COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "[[7]]"}}],
}  # fmt: skip
POSITIONS = [None, *({str(t): {"logprob": -0.1 - t, "rank": t, "decoded_token": "a"} for t in range(4)} for _ in "ab")]
LOGPROBS = {
    "id": "x", "object": "text_completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_logprobs": POSITIONS}],
}  # fmt: skip
CARD = (
    "---\nlicense: mit\nmodel-index:\n- name: s\n  results:\n  - task: {type: text-generation}\n    dataset: {type: a, "
    "name: a}\n    metrics: [{type: acc, value: 1.0}]\n    source: {name: dae-align, url: u}\n---\n\n# s\n\n"
    "<!-- dae report: begin -->\nx\n<!-- dae report: end -->\n"
)


# -- replies -----------------------------------------------------------------------------------------------------------


def _reply(choose: Choose) -> bytes:
    return bytes([choose(len(STOPS))]) + text_document(REPLIES, choose)


def _read_reply(content: bytes) -> None:
    stop = STOPS[content[0] % len(STOPS)] if content else "stop"
    reply = Reply(content[1:].decode("utf-8", "replace"), stop)
    for strictly in (True, False):
        rating, problem = rating_of(reply, strictly)
        assert isinstance(rating, float) and isinstance(problem, str)
        winner, problem = verdict_of(reply, "model_1", "model_2", strictly)
        assert winner in ("model_1", "model_2", "tie", "error") and isinstance(problem, str)
    has_several(reply.text, ratings_in)
    has_several(reply.text, verdicts_in)


@functools.cache
def _listening() -> tuple[socket.socket, str]:
    """Connections are taken and never answered: the client below has its own transport."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    return server, f"http://127.0.0.1:{server.getsockname()[1]}/v1"


class _Replies(httpx2.BaseTransport):
    """Answers every request with the same status and bytes."""

    def __init__(self) -> None:
        self.status, self.content = 200, b""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(self.status, content=self.content, headers={"content-type": "application/json"})


@functools.cache
def _servers() -> tuple[_Replies, Any, Any]:
    transport = _Replies()
    _, url = _listening()
    judge = Endpoint(EndpointChoice(url, "m", "--judge-url", "DAE_NO_KEY"), retries=0)
    teacher = ServedAnswers("teacher", ServedTeacher(url=url, model="m", top_k=2), 8, lambda _token: "a")
    for one in (judge, teacher):
        one._server.client = openai.OpenAI(
            base_url=url, api_key="-", max_retries=0, http_client=httpx2.Client(transport=transport)
        )
    return transport, judge, teacher


def _served(choose: Choose) -> bytes:
    status = (200, 200, 200, 200, 400, 401, 404, 429, 500, 204)[choose(10)]
    seeds = [COMPLETION, LOGPROBS, {"error": {"message": "context_length_exceeded", "code": "x"}}]
    return status.to_bytes(2, "big") + json_document(seeds, choose)


def _read_served(content: bytes) -> None:
    transport, judge, teacher = _servers()
    status = int.from_bytes(content[:2], "big")
    transport.status, transport.content = status if 200 <= status < 600 else 200, content[2:]
    for ask in (
        lambda: judge.reply(Request("k", ({"role": "user", "content": "x"},), 0.0, 8)),
        lambda: teacher.answer((np.array([1, 2, 3], np.int32), np.array([False, True, True]))),
    ):
        _or_refused(ask)


def _or_refused(act: Any) -> None:
    from kd.errors import MachineError

    try:
        act()
    except (UserError, MachineError):
        return


# -- files of benchmarks -----------------------------------------------------------------------------------------------

FILES: list[tuple[str, Any, Any]] = [
    ("questions.jsonl", QUESTION, read_questions),
    ("answers.jsonl", ANSWER, read_answers),
    ("prompts.jsonl", PROMPT, read_judge_prompts),
    ("judgments.jsonl", JUDGMENT, lambda path: values_of([judgments_of(path, None).judgments])),
    ("pairs.jsonl", PAIR, lambda path: values_of([pair_judgments_of(path, None).judgments])),
    ("replies.jsonl", LOGGED, ReplyLog),
    ("annotations.json", ANNOTATION, lambda path: (win_rate(a := read_annotations(path)), occurrences(a))),
]


def _judge_file(choose: Choose) -> bytes:
    which = choose(len(FILES))
    name, seed, _ = FILES[which]
    content = json_document([[seed, seed]], choose) if name.endswith(".json") else json_lines([seed], choose)
    return bytes([which]) + content


def _read_judge_file(content: bytes) -> None:
    name, _, read = FILES[content[0] % len(FILES)] if content else FILES[0]
    read(written(name, content[1:]))


# -- folders of evaluations --------------------------------------------------------------------------------------------


@functools.cache
def _evaluation() -> tuple[Any, str, list[Any]]:
    """evaluation.json, the name of its file of documents, and the documents."""
    folder = workplace() / "evaluation"
    student = models()["student"]
    kept = dict(list(student.tasks.items())[:1])
    write_evaluation(folder, type(student)(student.model, kept, student.conditions))
    facts = json.loads((folder / "evaluation.json").read_text())
    name = facts["tasks"][0]["file"]
    lines = gzip.decompress((folder / name).read_bytes()).decode().splitlines()[:3]
    return facts, name, [json.loads(line) for line in lines]


def _evaluation_folder(choose: Choose) -> bytes:
    facts, _, documents = _evaluation()
    if choose(2):
        return together(json_document([facts], choose), gzip.compress(json_lines([documents[0]], lambda _: 0)))
    packed = gzip.compress(json_lines(documents, choose), compresslevel=1)
    packed = mutated_bytes(packed, choose) if choose(4) == 0 else packed
    task = {**facts["tasks"][0], "sha256": hashlib.sha256(packed).hexdigest()}
    return together(json.dumps({**facts, "tasks": [task]}).encode(), packed)


def _read_evaluation_folder(content: bytes) -> None:
    folder = workplace() / "read"
    shutil.rmtree(folder, ignore_errors=True)
    parts = parts_of(content, "evaluation.json", "documents")
    (folder / "documents").mkdir(parents=True)
    (folder / "evaluation.json").write_bytes(parts["evaluation.json"])
    (folder / _evaluation()[1]).write_bytes(parts.get("documents", b""))
    found = read_evaluation(folder)
    assert all(task.mean >= 0 for task in found.tasks.values())


def _card(choose: Choose) -> bytes:
    return text_document([CARD, one_of([CARD.split("---\n", 2)[2], "# x\n"], choose)], choose)


def _read_card(content: bytes) -> None:
    read_card(written("student/README.md", content))


TARGETS = [
    Target("judges' replies", _reply, _read_reply),
    Target("servers' replies", _served, _read_served, slow=True),
    Target("files of judges", _judge_file, _read_judge_file),
    Target("folders of evaluations", _evaluation_folder, _read_evaluation_folder),
    Target("model cards", _card, _read_card),
]
