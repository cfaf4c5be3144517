"""The access log: one line for each request, when its answer has ended."""

import json
import logging
import re
import socket
from pathlib import Path

import pytest

from runtime.output.logs import TextLines
from service.logs import Few
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

REQUEST = {"model": "tiny", "prompt": "hello world", "max_tokens": 3}


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> "Log":
    return Log(caplog)


class Log:
    """The lines of the access log in words. A line is written after its answer, so whoever reads one waits for it."""

    def __init__(self, caplog: pytest.LogCaptureFixture):
        self._caplog = caplog

    def lines(self, path: str = "") -> list[str]:
        written = [record for record in list(self._caplog.records) if record.name == "service.access"]
        lines = [TextLines().format(record).split(": request ", 1)[1] for record in written]
        return [line for line in lines if path in line]

    def line(self, path: str) -> str:
        """The only line with a path."""
        wait_until(lambda: bool(self.lines(path)))
        [line] = self.lines(path)
        return line


def test_a_generation_is_logged_with_its_id_model_tokens_and_first_token(server: LiveServer, log: Log) -> None:
    answer = server.post("/v1/completions", **REQUEST, cache_salt="a")
    form = r"method=POST path=/v1/completions status=200 ms=[\d.]+ id=(\S+) model=tiny prompt_tokens=2 cached_tokens=0 "
    form += r"generated_tokens=3 first_token_ms=[\d.]+ queue_ms=250.0 finish=length request_id=\w{32} client=127.0.0.1"
    found = re.fullmatch(form, log.line("/v1/completions"))
    assert found, log.lines()
    assert found[1] == answer.json()["id"]


def test_a_chat_is_logged_with_its_cached_tokens(server: LiveServer, log: Log) -> None:
    for _ in range(2):
        answer = server.chat("hello " * 20, max_tokens=3, cache_salt="b")
    usage = answer.json()["usage"]
    wait_until(lambda: len(log.lines("/v1/chat/completions")) == 2)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    counts = f" prompt_tokens={usage['prompt_tokens']} cached_tokens={cached} generated_tokens=3 "
    assert counts in log.lines("/v1/chat/completions")[1]


def test_other_requests_are_logged_by_their_routes_path_and_status_alone(server: LiveServer, log: Log) -> None:
    rest = r" ms=[\d.]+ request_id=\w{32} client=127.0.0.1"
    server.client.put("/adapters/logged", files=multipart(*bundle()))
    assert re.fullmatch(r"method=PUT path=/adapters/{name} status=201" + rest, log.line("/adapters"))
    server.client.get("/v1/models/a/b")
    assert re.fullmatch(r"method=GET path=/v1/models/{model} status=404" + rest, log.line("/v1/models"))
    server.client.get("/nowhere")
    assert re.fullmatch(r"method=GET path=/nowhere status=404" + rest, log.line("/nowhere"))


def test_a_generation_by_an_adapter_is_logged_with_its_digest_and_why_each_sequence_ended(
    server: LiveServer, log: Log
) -> None:
    digest = server.client.put("/adapters/logged", files=multipart(*bundle())).json()["digest"]
    server.post("/v1/completions", model="logged", prompt=[[5, 6], [2, 6]], max_tokens=2)
    line = log.line("/v1/completions")
    assert f" model=logged adapter={digest} " in line
    assert ' finish="length,stop" ' in line


def test_a_refused_generation_is_logged_with_what_is_known_of_it(server: LiveServer, log: Log) -> None:
    server.post("/v1/completions", **REQUEST | {"model": "nobody"})
    form = (
        r"method=POST path=/v1/completions status=404 ms=[\d.]+ id=\S+ model=nobody request_id=\w{32} client=127.0.0.1"
    )
    assert re.fullmatch(form, log.line("/v1/completions")), log.lines()


def test_the_request_id_of_the_client_is_logged(server: LiveServer, log: Log) -> None:
    server.client.get("/health", headers={"x-request-id": "from-a-proxy-1"})
    assert log.line("/health").endswith(" request_id=from-a-proxy-1 client=127.0.0.1")
    server.client.get("/version", headers={"x-request-id": "two words"})
    assert "two" not in log.line("/version")


def test_no_path_model_or_header_can_write_a_line_of_its_own(server: LiveServer, log: Log) -> None:
    forged = "INFO service.access: GET '/health' 200"
    server.client.get(f"/a%0A{forged}")
    server.post("/v1/completions", **REQUEST | {"model": f"b\n{forged}"})
    server.client.get("/version", headers={"x-request-id": f"c\t{forged}"})
    for path in ('path="/a', "/v1/completions", "/version"):
        assert log.line(path).isprintable()


def test_a_line_is_short_whatever_the_client_sends(server: LiveServer, log: Log) -> None:
    server.client.get("/nowhere/" + "a" * 10_000)
    server.post("/v1/completions", **REQUEST | {"model": "b" * 100_000})
    assert len(log.line("/nowhere")) < 500
    assert len(log.line("/v1/completions")) < 500


def test_a_stream_is_logged_when_it_ends(server: LiveServer, log: Log) -> None:
    with server.client.stream("POST", "/v1/completions", json=REQUEST | {"cache_salt": "hold", "stream": True}) as held:
        lines = held.iter_lines()
        next(lines)
        server.client.get("/health")
        log.line("/health")
        assert log.lines("/v1/completions") == []
    form = r" status=200 .* prompt_tokens=2 cached_tokens=0 generated_tokens=1 .* finish=abort "
    assert re.search(form, log.line("/v1/completions"))


def test_a_client_that_goes_away_before_its_answer_is_logged_as_499(server: LiveServer, log: Log) -> None:
    content = json.dumps(REQUEST | {"cache_salt": "silent"}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(lambda: server.running() == 1)
    assert re.search(
        r"^method=POST path=/v1/completions status=499 ms=[\d.]+ id=\S+ model=tiny", log.line("/v1/completions")
    )


def test_nothing_is_logged_above_its_level(server: LiveServer, log: Log, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "service.access")
    server.client.get("/version")
    caplog.set_level(logging.INFO, "service.access")
    server.client.get("/health")
    log.line("/health")
    assert log.lines("/version") == []


def test_who_has_no_key_writes_few_lines_where_one_is_needed(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "service")
    strange = logging.getLogger("service.access.strangers")
    monkeypatch.setattr(strange, "filters", [Few()])  # the process has one, which other tests have used up
    with live_server(fake_settings(tiny_model, tmp_path, api_key="secret")) as live:
        for path in ["/health", "/version"] * 20:
            live.client.get(path)
        live.client.delete("/adapters/none", headers={"authorization": "Bearer secret"})
        wait_until(lambda: any(record.name == "service.access" for record in list(caplog.records)))
    strangers = [record for record in caplog.records if record.name == "service.access.strangers"]
    assert 20 <= len(strangers) < 30
    lines = [TextLines().format(record) for record in caplog.records]
    assert sum(" key=api-key " in line for line in lines) == 1
    assert sum(" who=api-key@127.0.0.1 " in line for line in lines) == 1
    assert not any("secret" in line for line in lines)
