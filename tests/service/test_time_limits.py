"""Requests that take too long, or would wait too long."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.service.live_server import NAME, LiveServer, fake_settings, live_server, wait_until


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    limits = {"request_timeout_seconds": 15.0, "max_queue_seconds": 0.5, "max_running": 2}
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"), **limits)) as running:
        yield running


def test_a_request_that_is_not_done_in_its_time_is_ended_and_says_so(server: LiveServer) -> None:
    started = time.monotonic()
    answer = server.complete("hello", cache_salt="silent", timeout=0.3)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert "0.3 s" in answer.json()["error"]["message"]
    assert time.monotonic() - started < 10, "the server's own limit is longer"
    wait_until(lambda: server.running() == 0)
    in_time = server.complete("hello", max_tokens=3, timeout=15)
    assert (in_time.status_code, in_time.json()["usage"]["completion_tokens"]) == (200, 3)


def test_a_stream_gets_what_came_in_time_and_then_the_error(server: LiveServer) -> None:
    body = {"model": NAME, "prompt": "hello", "stream": True, "cache_salt": "hold", "n": 2, "timeout": 1.0}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert [choice["index"] for choice in events[0]["choices"]] == [0]
    assert events[-1]["error"]["code"] == "timeout"
    wait_until(lambda: server.running() == 0)


def test_every_kind_of_generation_has_the_field(server: LiveServer) -> None:
    silent = {"cache_salt": "silent", "timeout": 0.2}
    message = {"role": "user", "content": "hello"}
    for path, body in (
        ("/v1/chat/completions", {"model": NAME, "messages": [message], **silent}),
        ("/v1/responses", {"model": NAME, "input": "hello", **silent}),
        ("/invocations", {"model": NAME, "prompt": "hello", **silent}),
        ("/inference/v1/generate", {"token_ids": [5], "cache_salt": "silent", "sampling_params": {"timeout": 0.2}}),
    ):
        answer = server.post(path, **body)
        assert (path, answer.status_code, answer.json()["error"]["code"]) == (path, 504, "timeout")


@pytest.mark.parametrize("timeout", [0, -1, "soon"])
def test_a_time_that_is_none_is_refused(server: LiveServer, timeout: object) -> None:
    answer = server.complete("hello", timeout=timeout)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout")


def test_the_servers_limit_ends_what_has_none_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path, request_timeout_seconds=0.3)) as server:
        for own in ({}, {"timeout": 1000}):
            answer = server.complete("hello", cache_salt="silent", **own)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_request_that_would_wait_too_long_is_refused_at_once(server: LiveServer) -> None:
    answers: list[httpx.Response] = []

    def hang() -> None:
        answers.append(server.complete("hello", cache_salt="silent", timeout=15))

    with ExitStack() as ends:
        for _ in range(2):
            thread = threading.Thread(target=hang)
            thread.start()
            ends.callback(thread.join)
        refused: list[httpx.Response] = []

        def is_refused() -> bool:
            refused.append(server.complete("hello", max_tokens=1, cache_salt="silent", timeout=0.1))
            return refused[-1].status_code == 429

        wait_until(is_refused, seconds=14)
        body = refused[-1].json()["error"]
        assert (body["code"], body["type"]) == ("queue_full", "rate_limit_error")
        assert int(refused[-1].headers["retry-after"]) >= 1
        assert "0.5 s allowed" in body["message"]
        os.kill(server.services.engine.pid, signal.SIGKILL)
    assert [answer.status_code for answer in answers] == [503, 503]
    wait_until(lambda: server.complete("hello", max_tokens=1).status_code == 200)
