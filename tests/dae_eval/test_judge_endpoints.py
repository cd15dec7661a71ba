"""Judges behind an endpoint, against a real server process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dae_eval.judging.asking import FILTERED, LENGTH, NO_CHOICES, NO_CONTENT, NO_ROOM, Request
from dae_eval.judging.endpoints import Dialect, Endpoint
from judge_server import JudgeServer, rating_of

from kd.errors import MachineError, UserError
from kd.served.connection import EndpointChoice, Pace, plain_url


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def choice(server: JudgeServer, concurrency: int = 1) -> EndpointChoice:
    return EndpointChoice(server.url, "some-judge", "--judge-url", "OPENAI_API_KEY", None, concurrency)


def request(key: str, text: str = "", **settings: object) -> Request:
    messages = ({"role": "system", "content": "Judge."}, {"role": "user", "content": text or f"prompt {key}"})
    return Request(key, messages, **{"temperature": 0.0, "max_tokens": 12, **settings})  # type: ignore[arg-type]


def answers_of(endpoint: Endpoint, *requests: Request) -> dict[str, str]:
    return {key: reply.text for key, reply in endpoint.replies(requests, {r.key for r in requests})}


def test_a_request_is_what_was_asked_and_tells_nothing_of_the_machine(server: JudgeServer) -> None:
    server.behave()
    found = answers_of(Endpoint(choice(server)), request("1"))
    assert found == {"1": f"A fair answer. Rating: [[{rating_of('prompt 1')}]]"}
    (seen,) = server.requests()
    assert seen["body"] == {
        "model": "some-judge",
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "prompt 1"}],
        "temperature": 0.0,
        "max_tokens": 12,
    }
    assert "authorization" not in seen["headers"]
    assert not [name for name in seen["headers"] if "stainless" in name]


def test_proxies_of_the_environment_are_not_used(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(answers_of(Endpoint(choice(server)), request("1"))) == 1


def test_refusals_that_pass_are_asked_again(server: JudgeServer) -> None:
    server.behave(script=["429", "500", "cut", "429", "good"])
    assert answers_of(Endpoint(choice(server)), request("1"))["1"].endswith(f"[[{rating_of('prompt 1')}]]")
    assert [one["step"] for one in server.requests()] == ["429", "500", "cut", "429", "good"]


def test_a_slow_answer_is_given_up_and_asked_for_again(server: JudgeServer) -> None:
    server.behave(script=["hold", "good"])
    found = answers_of(Endpoint(choice(server), timeout=0.2), request("1"))
    server.release()
    assert list(found) == ["1"]
    assert [one["step"] for one in server.requests()] == ["hold", "good"]


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        (["500"] * 3, "500 after 3 tries"),
        (["cut"] * 3, "after 3 tries"),
    ],
)
def test_a_server_that_keeps_failing_is_a_machine_error(server: JudgeServer, script: list[str], cause: str) -> None:
    server.behave(script=script)
    with pytest.raises(MachineError, match=f"{server.url}: .*{cause}"):
        answers_of(Endpoint(choice(server), retries=2), request("1"))


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        ("404", "404.*--judge-url"),
        ("400", "temperature is out of range"),
        ("html", "--judge-url"),
    ],
)
def test_a_final_refusal_is_a_user_error_and_asked_once(server: JudgeServer, step: str, cause: str) -> None:
    server.behave(script=[step])
    with pytest.raises(UserError, match=f"{server.url}: .*{cause}"):
        answers_of(Endpoint(choice(server)), request("1"))
    assert len(server.requests()) == 1


@pytest.mark.parametrize("step", ["empty", "upstream", "null", "filtered", "blocked"])
def test_a_reply_without_a_text_is_asked_for_again(server: JudgeServer, step: str) -> None:
    server.behave(script=[step, step, "good"])
    assert answers_of(Endpoint(choice(server)), request("1"))["1"].endswith(f"[[{rating_of('prompt 1')}]]")
    assert [one["step"] for one in server.requests()] == [step, step, "good"]


@pytest.mark.parametrize(
    ("step", "stop", "asked"),
    [
        ("empty", NO_CHOICES, 3),
        ("upstream", NO_CHOICES, 3),
        ("null", NO_CONTENT, 3),
        ("filtered", FILTERED, 3),
        ("blocked", FILTERED, 3),
        ("reasoning", LENGTH, 1),
        ("truncated", LENGTH, 1),
        ("crowded", NO_ROOM, 1),
    ],
)
def test_one_request_without_a_reply_stops_no_other(server: JudgeServer, step: str, stop: str, asked: int) -> None:
    server.behave(always={"prompt 1": step})
    requests = [request(key) for key in "012"]
    replies = dict(Endpoint(choice(server)).replies(requests, {"0", "1", "2"}))
    assert [replies[key].stop for key in "012"] == ["stop", stop, "stop"]
    assert [one["step"] for one in server.requests()] == ["good", *[step] * asked, "good"]
    assert replies["1"].how == "", "no other dialect is tried"


def test_of_content_in_parts_the_text_is_read_and_not_the_reasoning(server: JudgeServer) -> None:
    server.behave(script=["parts"])
    assert (
        answers_of(Endpoint(choice(server)), request("1"))["1"] == f"A fair answer. Rating: [[{rating_of('prompt 1')}]]"
    )


@pytest.mark.parametrize("standing", [{"system": False}, {"max_tokens": False, "system": False}])
def test_a_judges_dialect_is_found_after_one_refusal_each(server: JudgeServer, standing: dict[str, bool]) -> None:
    server.behave(**standing)
    endpoint = Endpoint(choice(server))
    requests = [request("1"), request("2")]
    replies = dict(endpoint.replies(requests, {"1", "2"}))
    steps = [one["step"] for one in server.requests()]
    assert sorted(steps[:-2]) == sorted(f"no {name}" for name in standing)
    assert steps[-2:] == ["good", "good"]
    last = server.requests()[-1]["body"]
    assert ("max_completion_tokens" in last) == ("max_tokens" in standing)
    if "system" in standing:
        assert last["messages"] == [{"role": "user", "content": "Judge.\n\nprompt 2"}]
    dialect = Dialect("max_completion_tokens" if "max_tokens" in standing else "max_tokens", "system" not in standing)
    assert {reply.how for reply in replies.values()} == {dialect.how}
    assert dialect.how


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:pw@host/v1", "http://host/v1?key=1", "http://h:x"]
)
def test_addresses_that_are_invalid_or_contain_secrets(url: str) -> None:
    with pytest.raises(UserError, match="--judge-url"):
        plain_url(EndpointChoice(url, "m", "--judge-url", "OPENAI_API_KEY"))


def test_replies_under_way_when_one_request_fails_are_kept(server: JudgeServer) -> None:
    server.behave(script=["hold", "400"])
    endpoint = Endpoint(choice(server, concurrency=2))
    requests = [request(str(number)) for number in range(20)]
    server.release_when(["hold", "400"])
    found = []
    with pytest.raises(UserError, match="out of range"):  # noqa: PT012 - what came before the failure matters
        for key, _ in endpoint.replies(requests, {r.key for r in requests}):
            found.append(key)
    answered = [one["body"]["messages"][-1]["content"] for one in server.requests() if one["step"] != "400"]
    assert sorted(f"prompt {key}" for key in found) == sorted(answered)
    assert len(answered) < 19, "no new request is started"


def test_at_most_so_many_requests_at_a_time(server: JudgeServer) -> None:
    server.behave(script=["hold"] * 8)
    endpoint = Endpoint(choice(server, concurrency=3))
    requests = [request(str(number)) for number in range(8)]
    server.release_when(["hold"] * 3)
    assert {key for key, _ in endpoint.replies(requests, {r.key for r in requests})} == {r.key for r in requests}
    assert max(one["at_once"] for one in server.requests()) == 3
    assert len(server.requests()) == 8


def test_the_pace_spaces_requests_evenly() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(30.0, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        pace.wait()
    now[0] += 10  # late: the next one need not wait, and nothing is caught up
    pace.wait()
    pace.wait()
    assert slept == [2.0, 2.0, 2.0]
