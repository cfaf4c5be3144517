"""What happens to running requests when a client goes away, an adapter is replaced, or the engine dies."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.openapi.contract_hook import ASYNC_HOOKS
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until


@pytest.fixture
def mortal(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A service of one's own, to be hurt."""
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        yield live


def body(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "hello world", "max_tokens": 100, **fields}).encode()


def send_raw(server: LiveServer, content: bytes, length: int = 0) -> socket.socket:
    """Send a request over a bare socket, so that it can be cut off at any point."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    fields = (f"host: {host}", "connection: close", f"content-length: {length or len(content)}")
    connection.sendall("\r\n".join(("POST /v1/completions HTTP/1.1", *fields, "", "")).encode() + content)
    return connection


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", ["hold", "silent"])
def test_a_client_that_goes_away_ends_its_request(server: LiveServer, script: str, stream: bool, choices: int) -> None:
    with send_raw(server, body(cache_salt=script, stream=stream, n=choices)) as connection:
        wait_until(lambda: server.running() > 0)
        if stream and script == "hold":
            assert next(line for line in connection.makefile("rb") if line.startswith(b"data: "))
    wait_until(lambda: server.running() == 0)


def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing(server: LiveServer) -> None:
    content = body()
    send_raw(server, content[:-5], length=len(content)).close()
    assert server.complete("hello", max_tokens=1).status_code == 200
    assert server.running() == 0


def test_a_slow_reader_disturbs_nobody(server: LiveServer) -> None:
    with send_raw(server, body(cache_salt="hold", stream=True)):
        wait_until(lambda: server.running() == 1)
        assert server.complete("hello world", max_tokens=2).json()["choices"][0]["text"] == "hello world"
    wait_until(lambda: server.running() == 0)


def kill_engine(server: LiveServer) -> None:
    os.kill(server.services.engine.pid, signal.SIGKILL)


def test_when_the_engine_dies_its_requests_end_with_a_clear_error_and_it_is_restarted(mortal: LiveServer) -> None:
    before = mortal.services.engine.pid
    with mortal.client.stream("POST", "/v1/completions", content=body(cache_salt="hold", stream=True)) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert "hello" in next(lines)
        waiting = send_raw(mortal, body(cache_salt="silent"))
        wait_until(lambda: mortal.running() == 2)
        kill_engine(mortal)
        assert json.loads(next(lines).removeprefix("data: "))["error"]["code"] == "engine_died"
        assert list(lines) == []
    with waiting, waiting.makefile("rb") as file:
        answer = file.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"engine_died"' in answer
    wait_until(lambda: mortal.client.get("/health/ready").status_code == 200)
    assert mortal.services.engine.pid != before
    assert mortal.complete("hello world", max_tokens=2).json()["choices"][0]["text"] == "hello world"


def test_a_request_that_kills_the_engine_gets_a_503_and_health_says_so_meanwhile(mortal: LiveServer) -> None:
    response = mortal.complete("hello", cache_salt="die")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_died")
    assert mortal.client.get("/health").status_code == 200
    assert mortal.client.get("/metrics").status_code == 200
    ready = mortal.client.get("/health/ready")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_unavailable")
    refused = mortal.complete("hello")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert refused.headers["retry-after"]
    wait_until(lambda: mortal.client.get("/ping").status_code == 200)


def test_a_restarted_engine_knows_the_adapters_again(mortal: LiveServer) -> None:
    assert mortal.client.put("/adapters/turned", files=multipart(*bundle())).status_code == 201
    expected = mortal.post("/v1/completions", model="turned", prompt="hello world", max_tokens=2).json()
    assert expected["choices"][0]["text"] == " worldhello"
    kill_engine(mortal)
    wait_until(lambda: mortal.client.get("/health/ready").status_code == 503)
    wait_until(lambda: mortal.client.get("/health/ready").status_code == 200)
    again = mortal.post("/v1/completions", model="turned", prompt="hello world", max_tokens=2).json()
    assert again["choices"] == expected["choices"]


def test_a_request_keeps_the_version_it_began_with(mortal: LiveServer) -> None:
    first = mortal.client.put("/adapters/mine", files=multipart(*bundle(0))).json()["digest"]
    content = body(model="mine", cache_salt="hold", stream=True)
    with mortal.client.stream("POST", "/v1/completions", content=content) as stream:
        assert stream.headers["x-adapter-digest"] == first
        second = mortal.client.put("/adapters/mine", files=multipart(*bundle(1))).json()["digest"]
        assert second != first
        response = mortal.post("/v1/completions", model="mine", prompt="hello", max_tokens=1)
        assert response.headers["x-adapter-digest"] == second
        assert mortal.running() == 1
    wait_until(lambda: mortal.running() == 0)


def test_a_forced_delete_ends_the_requests_of_the_adapter_and_no_others(mortal: LiveServer) -> None:
    mortal.client.put("/adapters/mine", files=multipart(*bundle()))
    content = body(model="mine", cache_salt="hold", stream=True)
    with (
        send_raw(mortal, body(cache_salt="hold", stream=True)),
        mortal.client.stream("POST", "/v1/completions", content=content) as stream,
    ):
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        wait_until(lambda: mortal.running() == 2)
        assert mortal.client.delete("/adapters/mine?force=true").status_code == 204
        assert json.loads(next(lines).removeprefix("data: "))["error"]["code"] == "adapter_deleted"
        wait_until(lambda: mortal.running() == 1)


def test_many_requests_at_once_each_get_their_own_answer(server: LiveServer) -> None:
    words = [f"request number {i}" for i in range(40)]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=20, event_hooks=ASYNC_HOOKS) as client:
            asked = ({"model": "tiny", "prompt": word, "max_tokens": len(word)} for word in words)
            return await asyncio.gather(*(client.post("/v1/completions", json=each) for each in asked))

    answers = [response.json()["choices"][0]["text"] for response in asyncio.run(ask())]
    assert [answer[: len(word)] for answer, word in zip(answers, words, strict=True)] == words


def test_a_fault_of_ours_is_a_500_of_the_same_shape_and_the_service_goes_on(mortal: LiveServer) -> None:
    whole = mortal.services
    mortal.app.state.services = replace(whole, tokenizer=None)
    broken = mortal.complete("hello")
    mortal.app.state.services = whole
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal_error")
    assert "NoneType" not in broken.text
    assert mortal.complete("hello").status_code == 200
