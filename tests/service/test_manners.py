"""What clients and browsers expect of every answer: a request id, OPTIONS, and CORS where an option allows it."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import routes
from service.services import Services
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

ORIGIN, KEY = "https://app.example.org", "secret"
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def open_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A service with a key that pages of one origin may call."""
    settings = fake_settings(tiny_model, tmp_path_factory.mktemp("data"), api_key=KEY, cors_origins=(ORIGIN,))
    with live_server(settings) as live:
        yield live


def test_every_answer_has_a_request_id_of_its_own(server: LiveServer) -> None:
    answers = [
        server.client.get("/health"),
        server.client.get("/nowhere"),
        server.post("/v1/completions", **COMPLETION),
        server.post("/v1/completions", **COMPLETION, stream=True),
        server.post("/v1/completions", **COMPLETION | {"model": "nobody"}),
        server.client.get("/health", headers={"x-request-id": "two words"}),
        server.client.get("/health", headers={"x-request-id": "x" * 129}),
    ]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(answers)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_the_request_id_of_a_client_comes_back(server: LiveServer) -> None:
    for path in ("/v1/models", "/nowhere"):
        assert server.client.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("fault", [AssertionError("a fault"), OSError("of no kind that is known"), RuntimeError("a")])
def test_a_fault_of_ours_is_answered_as_all_else_and_logged(
    open_server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    def fail(self: object, name: str) -> None:
        raise fault

    caplog.set_level(logging.ERROR, "uvicorn.error")  # other tests' servers share the logger and are quiet
    monkeypatch.setattr(Services, "__getattribute__", fail)
    headers = {"x-request-id": "mine-2", "origin": ORIGIN, "authorization": f"Bearer {KEY}"}
    answer = open_server.client.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert (answer.headers["x-request-id"], answer.headers["access-control-allow-origin"]) == ("mine-2", ORIGIN)
    # uvicorn logs it after the answer
    wait_until(lambda: any(record.exc_info and record.exc_info[1] is fault for record in list(caplog.records)))
    monkeypatch.undo()
    assert open_server.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/chat/completions", {"OPTIONS", "POST"}),
        ("/adapters", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("/adapters/poet", {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "PUT"}),
    ],
)
def test_options_tells_the_methods_of_a_path(server: LiveServer, path: str, methods: set[str]) -> None:
    answer = httpx.options(f"{server.url}{path}", headers={"origin": ORIGIN})
    assert (answer.status_code, answer.content) == (204, b"")
    assert set(answer.headers["allow"].split(", ")) == methods
    assert not [name for name in answer.headers if name.startswith("access-control")]
    wrong = httpx.request("TRACE", f"{server.url}{path}")
    assert (wrong.status_code, set(wrong.headers["allow"].split(", "))) == (405, methods)
    assert httpx.options(f"{server.url}/nowhere").status_code == 404


def test_a_method_that_a_path_has_not_is_told_all_that_it_has(server: LiveServer) -> None:
    for path in {re.sub("{.*?}", "x", route.path) for route in routes}:
        allowed = {"OPTIONS"}.union(*(route.methods or () for route in routes if route.path_regex.match(path)))
        answer = httpx.request("TRACE", f"{server.url}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed"), path
        assert set(answer.headers["allow"].split(", ")) == allowed, path


def test_no_origin_is_allowed_by_default(server: LiveServer) -> None:
    answer = server.client.get("/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_browser_may_ask_without_the_key_and_call_with_it(open_server: LiveServer) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "PUT"}
    asked["access-control-request-headers"] = "authorization, content-type"
    preflight = httpx.options(f"{open_server.url}/adapters/poet", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    assert preflight.headers["x-request-id"]

    key = {"origin": ORIGIN, "authorization": f"Bearer {KEY}"}
    for stream in (False, True):
        answer = open_server.client.post("/v1/completions", json=COMPLETION | {"stream": stream}, headers=key)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_a_browser_may_read_why_it_was_refused(open_server: LiveServer) -> None:
    answer = open_server.client.post("/v1/completions", json=COMPLETION, headers={"origin": ORIGIN})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_every_status_may_be_read_by_a_page_that_is_allowed(open_server: LiveServer) -> None:
    key = {"origin": ORIGIN, "authorization": f"Bearer {KEY}"}
    too_large = b"x" * (open_server.services.settings.max_body_bytes + 1)
    paused = COMPLETION | {"cache_salt": "refuse adapter_failed"}
    calls = {
        200: ("GET", "/v1/models", {}),
        400: ("POST", "/v1/completions", {"content": b"{"}),
        404: ("GET", "/nowhere", {}),
        405: ("TRACE", "/v1/models", {}),
        413: ("POST", "/v1/completions", {"content": too_large}),
        503: ("POST", "/v1/completions", {"json": paused}),
    }
    for status, (method, path, body) in calls.items():
        answer = open_server.client.request(method, path, **body, headers=key)
        assert answer.status_code == status, answer.text
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["x-request-id"]


def test_another_origin_is_refused(open_server: LiveServer) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    answer = httpx.options(f"{open_server.url}/v1/completions", headers=asked)
    assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (400, False)


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://a,https://b", "", "null"])
def test_what_is_no_origin_is_refused_at_the_start(tiny_model: Path, tmp_path: Path, origin: str) -> None:
    with pytest.raises(ValueError, match="an origin is"):
        fake_settings(tiny_model, tmp_path, cors_origins=(origin,))
