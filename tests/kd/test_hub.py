"""Data sets on the hub: one request, one message, and the cache where the hub does not answer."""

from __future__ import annotations

import http.server
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import datasets
import huggingface_hub.constants
import pytest

from kd.data import hub
from kd.data.fingerprint import data_sha256
from kd.errors import UserError


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.why_no_answer.cache_clear()


def at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)


@pytest.fixture
def empty_hub() -> Iterator[tuple[str, list[str]]]:
    """A server that has nothing, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_hub_that_is_not_there_is_asked_once(
    online: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at(monkeypatch, "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        for ask in (data_sha256, lambda name: hub.hub_dataset(name, "train")):
            with pytest.raises(UserError, match=r"^data/train: no such file or folder, nor .* hub does not answer"):
                ask("data/train")
    assert not [record for record in caplog.records if "Retry" in record.getMessage()]
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_has_no_such_data_set_is_believed(empty_hub: tuple[str, list[str]]) -> None:
    script = "from kd.data.hub import hub_dataset; hub_dataset('data/train', 'test')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"HF_ENDPOINT": empty_hub[0]},
        capture_output=True,
        text=True,
        check=False,
    )
    message = done.stderr.splitlines()[-1]
    assert "UserError: data/train: no such file or folder" in message and "(split 'test')" in message
    assert "doesn't exist on the Hub" in message
    assert any("data/train" in path for path in empty_hub[1])


@pytest.mark.parametrize("path", ["data/my--rows", "data/a..b", "data/x-", f"data/{'x' * 100}"])
def test_a_name_that_no_hub_has_is_a_path(path: str) -> None:
    assert not hub.could_be_on_the_hub(path)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        data_sha256(path)


def test_without_an_answer_the_cache_is_read(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "http://127.0.0.1:9")
    offline = []

    def load_dataset(_name: str, split: str) -> datasets.Dataset:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.Dataset.from_list([{"text": split}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(hub.hub_dataset("owner/name", "test")) == [{"text": "test"}]
    assert offline == [True] and not datasets.config.HF_HUB_OFFLINE


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, empty_hub: tuple[str, list[str]]) -> None:
    at(monkeypatch, empty_hub[0])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data/train: .*Offline"):
        data_sha256("data/train")
    assert not empty_hub[1]
