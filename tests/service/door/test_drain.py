"""A service that is asked to end: it is not ready, refuses what is new, and lets end what it has begun."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server, wait_until

HELD = {"model": NAME, "prompt": "hello", "cache_salt": "hold", "stream": True}


@pytest.fixture
def draining(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(fake_settings(tiny_model, tmp_path, drain_seconds=60.0)) as live:
        yield live
        stop(live), stop(live)


def stop(live: LiveServer) -> None:
    """What uvicorn's handler of SIGTERM does, which a thread cannot install."""
    live.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def stream(live: LiveServer, **body: object) -> Iterator[Iterator[str]]:
    """The lines of a stream, whose first has come."""
    with live.client.stream("POST", "/v1/completions", json=HELD | body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield (line for line in lines if line)


def test_what_is_new_is_refused_while_a_stream_goes_on_to_its_end(draining: LiveServer) -> None:
    loop = draining.server._loop
    assert loop is not None
    engine = draining.services.engine
    asyncio.run_coroutine_threadsafe(engine.pause(), loop).result(10)
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(draining.complete("hello", max_tokens=5)))
    running.start()
    wait_until(engine.busy)
    stop(draining)
    for path in ("/health/ready", "/ping"):
        refused = draining.client.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert draining.client.get("/health").status_code == 200
    assert draining.client.get("/metrics").status_code == 200
    refused = draining.complete("hello")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    assert refused.headers["connection"] == "close"
    asyncio.run_coroutine_threadsafe(engine.resume(), loop).result(10)
    running.join(20)
    assert answers[0].json()["usage"]["completion_tokens"] == 5


def test_the_service_ends_with_its_last_stream(draining: LiveServer) -> None:
    with stream(draining):
        stop(draining)
        time.sleep(0.3)
        assert draining.services.engine.busy()
    wait_until(lambda: not draining.server.server_state.connections, 10)


def test_a_second_signal_ends_a_stream_with_an_error_event(draining: LiveServer) -> None:
    with stream(draining) as lines:
        stop(draining)
        stop(draining)
        assert '"code":"shutting_down"' in list(lines)[-1]


def test_the_end_of_the_time_ends_a_stream_with_an_error_event(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path, drain_seconds=0.2)) as live, stream(live) as lines:
        stop(live)
        assert '"code":"shutting_down"' in list(lines)[-1]


def test_a_running_upload_may_end(draining: LiveServer) -> None:
    content = httpx.Request("PUT", draining.url, files=multipart(*bundle()))
    body, kind = content.read(), content.headers["content-type"]
    top = f"PUT /adapters/late HTTP/1.1\r\nhost: here\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    with draining.connect(top.encode() + body[:100]) as connected:
        wait_until(lambda: bool(draining.app.state.gate._in_flight))
        stop(draining)
        wait_until(lambda: draining.client.get("/health/ready").status_code == 503)
        connected.sendall(body[100:])
        assert connected.recv(1 << 16).startswith(b"HTTP/1.1 201")


def test_an_upload_that_is_cut_gets_our_error(draining: LiveServer) -> None:
    top = b"PUT /adapters/cut HTTP/1.1\r\nhost: here\r\ncontent-type: application/x-tar\r\ncontent-length: 1000\r\n\r\n"
    with draining.connect(top) as connected:
        wait_until(lambda: bool(draining.app.state.gate._in_flight))
        stop(draining)
        stop(draining)
        answer = b"".join(iter(lambda: connected.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"shutting_down"' in answer
