"""Clients that send too much, too slowly or nonsense, on real sockets: what they get, and that others are served."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from service.door import bodies, connection, gate
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

KEY = "secret"
HOST = "host: here\r\n"


@pytest.fixture(scope="module")
def closed_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A service with a key and few places."""
    settings = fake_settings(
        tiny_model, tmp_path_factory.mktemp("data"), api_key=KEY, max_connections=8, max_body_bytes=1 << 20
    )
    with live_server(settings) as live:
        yield live


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: here", *headers, "", ""]).encode()


def rest(connected: socket.socket) -> bytes:
    """Everything until the server closes; a reset ends it too."""
    received = b""
    try:
        while piece := connected.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


def answer(connected: socket.socket) -> bytes:
    """One answer with a length, from a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connected.recv(1 << 16)
    top, _, body = received.partition(b"\r\n\r\n")
    length = int(top.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    while len(body) < length:
        body += connected.recv(1 << 16)
    return top + body


def keep_sending(connected: socket.socket, piece: bytes, pause: float, most: int = 1000) -> int:
    """Send a piece again and again until the server has closed; returns how often."""
    for sent in range(most):
        try:
            connected.sendall(piece)
        except ConnectionError:
            return sent
        time.sleep(pause)
    raise AssertionError("the server took everything")


def refused(answer: bytes) -> tuple[int, str]:
    """The status and the code of a JSON error that closes its connection."""
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = top.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    return int(status.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "content",
    [
        head("GET", "/health", "x-long: " + "a" * (70 << 10)),
        head("GET", "/health", *(f"x-{number}: {'a' * 100}" for number in range(1000))),
        head("GET", "/" + "a" * (70 << 10)),
        head("POST", "/tokenize", "transfer-encoding: chunked") + b"0\r\nx: " + b"a" * (400 << 10),
    ],
    ids=["one header", "many headers", "path", "trailer"],
)
def test_a_head_over_its_limit_is_refused(server: LiveServer, content: bytes) -> None:
    with server.connect() as connected:
        with suppress(ConnectionError):  # refused already
            connected.sendall(content)
        assert refused(rest(connected)) == (431, "head_too_large")


def test_an_endless_header_is_given_up_soon(server: LiveServer) -> None:
    with server.connect(b"GET / HTTP/1.1\r\nx: ") as connected:
        sent = keep_sending(connected, b"a" * (1 << 20), 0.0, 100)
    assert sent < 16, "a few buffers of the system, no more"


def test_what_is_no_http_is_refused_with_our_error(server: LiveServer) -> None:
    for content in (b"NONSENSE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n"):
        with server.connect(content) as connected:
            assert refused(rest(connected)) == (400, "bad_request")


def test_a_broken_body_is_refused_before_its_answer(server: LiveServer) -> None:
    with server.connect(head("POST", "/tokenize", "transfer-encoding: chunked") + b"zzz\r\n") as connected:
        assert refused(rest(connected)) == (400, "bad_request")


def test_half_a_head_and_silence_are_given_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with server.connect(b"GET /heal") as half, server.connect() as silent:
        assert refused(rest(half)) == (408, "head_too_slow")
        assert rest(silent) == b""


def test_empty_lines_do_not_keep_a_connection(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    answered = head("GET", "/health")
    for content in (b"", answered):
        with server.connect(content) as connected:
            if content:
                assert connected.recv(1 << 16).startswith(b"HTTP/1.1 200")
            keep_sending(connected, b"\r\n", 0.02)


def test_a_head_that_comes_in_pieces_is_served(server: LiveServer) -> None:
    content = head("GET", "/health", "connection: close")
    with server.connect() as connected:
        for place in range(len(content)):
            connected.sendall(content[place : place + 1])
        assert rest(connected).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_given_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PATIENCE_SECONDS", 0.2)
    for path in ("/v1/chat/completions", "/tokenize", "/kv/prefixes", "/invocations", "/adapters"):
        with server.connect(head("POST", path, "content-length: 100") + b'{"model"') as connected:
            assert refused(rest(connected)) == (408, "body_too_slow")
    upload = head("PUT", "/adapters/slow", "content-type: application/x-tar", "content-length: 100") + b"a"
    with server.connect(upload) as connected:
        assert refused(rest(connected)) == (408, "body_too_slow")
    wait_until(lambda: not server.services.imports._of_clients)


def test_a_body_that_trickles_is_given_up(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PATIENCE_SECONDS", 0.3)
    with server.connect(head("POST", "/tokenize", "content-length: 100000")) as connected:
        keep_sending(connected, b" ", 0.02)


def test_a_body_that_comes_fast_enough_is_taken(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second in all, of which the client is never late by more than the patience."""
    monkeypatch.setattr(gate, "PATIENCE_SECONDS", 0.3)
    content = json.dumps({"prompt": "hello"}).encode() + b" " * (20 * 8192)
    with server.connect(head("POST", "/tokenize", f"content-length: {len(content)}", "connection: close")) as connected:
        for start in range(0, len(content), 8192):
            connected.sendall(content[start : start + 8192])
            time.sleep(0.025)
        assert rest(connected).startswith(b"HTTP/1.1 200")


def test_the_rest_of_a_body_whose_answer_was_sent_is_dropped_for_a_while(
    closed_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.3)
    with closed_server.connect(head("POST", "/tokenize", "content-length: 100000000")) as connected:
        assert connected.recv(1 << 16).startswith(b"HTTP/1.1 401")
        keep_sending(connected, b"a" * 1000, 0.01)


def test_a_connection_goes_on_after_an_early_answer_whose_body_comes(closed_server: LiveServer) -> None:
    with closed_server.connect(head("POST", "/tokenize", "content-length: 3")) as connected:
        assert answer(connected).startswith(b"HTTP/1.1 401")
        connected.sendall(b"{} " + head("GET", "/health"))
        assert answer(connected).startswith(b"HTTP/1.1 200")


def test_the_connection_that_waits_longest_makes_room_for_another(closed_server: LiveServer) -> None:
    wait_until(lambda: len(closed_server.server.server_state.connections) <= 1)
    closed_server.client.get("/health")
    with ExitStack() as opened:
        idle = []
        for _ in range(12):
            idle.append(opened.enter_context(closed_server.connect()))
            assert httpx.get(f"{closed_server.url}/health").status_code == 200
        assert len(closed_server.server.server_state.connections) <= 8
        assert rest(idle[0]) == b""


def test_a_connection_is_refused_while_all_have_requests(closed_server: LiveServer) -> None:
    hold = json.dumps({"model": "tiny", "prompt": "hello", "cache_salt": "silent"}).encode()
    request = head("POST", "/v1/completions", f"content-length: {len(hold)}", f"authorization: Bearer {KEY}") + hold
    with ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(closed_server.connect(request))
        wait_until(lambda: len(closed_server.services.engine._streams) == 8)
        with closed_server.connect() as connected:
            assert refused(rest(connected)) == (503, "too_many_connections")
    wait_until(lambda: httpx.get(f"{closed_server.url}/health").status_code == 200)


def test_large_bodies_have_a_room_and_small_ones_need_none(closed_server: LiveServer) -> None:
    with ExitStack() as opened:
        request = head("POST", "/tokenize", "content-length: 1000000", f"authorization: Bearer {KEY}") + b" " * 999_000
        for _ in range(4):
            opened.enter_context(closed_server.connect(request))
        body_room = closed_server.services.bodies
        wait_until(lambda: body_room._room < 1 << 20)
        key = {"authorization": f"Bearer {KEY}"}
        large = httpx.post(f"{closed_server.url}/tokenize", content=b" " * 999_000, headers=key)
        assert (large.status_code, large.json()["error"]["code"]) == (503, "too_many_bodies")
        assert httpx.post(f"{closed_server.url}/tokenize", json={"prompt": "hello"}, headers=key).status_code == 200
    wait_until(lambda: body_room._room == 4 << 20)


@pytest.mark.parametrize("value", ["[]", "{}", "1"])
def test_a_body_of_too_many_values_is_refused_before_they_are_made(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES", 1000)
    monkeypatch.setattr(bodies, "MAX_CONTAINERS", 1000)
    content = '{"model": "tiny", "prompt": [' + ",".join([value] * 1100) + "]}"
    answer = server.client.post("/v1/completions", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_values")


def test_requests_in_a_row_are_answered_in_a_row_up_to_a_limit(server: LiveServer) -> None:
    with server.connect(head("GET", "/health") * 9 + head("GET", "/health", "connection: close")) as connected:
        assert rest(connected).count(b"HTTP/1.1 200") == 10
    with server.connect(head("GET", "/health") * 2000) as connected:
        answers = rest(connected)
        assert answers.count(b"HTTP/1.1 200") == connection.MAX_PIPELINED + 1
        assert answers.count(b"HTTP/1.1") == answers.count(b"HTTP/1.1 200")


def test_who_asks_for_another_protocol_is_answered_in_http(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect(head("GET", "/health", "connection: upgrade", "upgrade: h2c")) as connected:
        assert connected.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert "pip install" not in caplog.text
