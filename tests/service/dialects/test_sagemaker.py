"""POST /invocations: chats and completions as SageMaker asks for them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import error
from tests.service.live_server import LiveServer, fake_settings, live_server

HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A service with two adapters."""
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"))) as live:
        for seed, name in enumerate(("first", "second")):
            assert live.client.put(f"/adapters/{name}", files=multipart(*bundle(seed))).status_code == 201
        yield live


def invoke(server: LiveServer, adapter: str | None = None, **body: Any) -> httpx.Response:
    return server.client.post("/invocations", json=body, headers={} if adapter is None else {HEADER: adapter})


def test_a_prompt_is_completed_and_messages_are_answered(server: LiveServer) -> None:
    completion = invoke(server, prompt="hello world", max_tokens=2)
    assert (completion.json()["object"], completion.json()["model"]) == ("text_completion", "tiny")
    assert "x-adapter-digest" not in completion.headers
    chat = invoke(server, messages=MESSAGES, max_tokens=2, model="tiny")
    assert chat.json()["object"] == "chat.completion"


def test_the_header_names_the_adapter(server: LiveServer) -> None:
    digest = server.client.get("/adapters/first").json()["digest"]
    for body in ({"prompt": "hello"}, {"messages": MESSAGES}, {"prompt": "hello", "adapter_id": "first"}):
        response = invoke(server, "first", max_tokens=2, **body)
        assert (response.status_code, response.headers["x-adapter-digest"]) == (200, digest)
    assert "x-adapter-digest" not in invoke(server, "", prompt="hello", max_tokens=2).headers
    elsewhere = server.client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 2}, headers={HEADER: "first"}
    )
    assert "x-adapter-digest" not in elsewhere.headers


def test_answers_are_streamed_as_elsewhere(server: LiveServer) -> None:
    response = invoke(server, "first", prompt="hello", max_tokens=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("adapter", "body", "answer"),
    [
        (None, {}, (400, "invalid_field", "messages")),
        (None, {"prompt": "x", "messages": MESSAGES}, (400, "invalid_field", "messages")),
        (None, {"prompt": "x", "max_tokens": -1}, (400, "invalid_field", "max_tokens")),
        (None, {"messages": "x"}, (400, "invalid_field", "messages")),
        (None, {"prompt": "x", "model": None}, (400, "invalid_field", "model")),
        (None, {"prompt": "x", "model": "nobody"}, (404, "model_not_found", "model")),
        ("nobody", {"prompt": "x"}, (404, "model_not_found", "adapter_id")),
        ("first", {"prompt": "x", "adapter_id": "second"}, (400, "conflicting_adapters", "adapter_id")),
        ("first", {"prompt": "x", "model": "second"}, (400, "conflicting_adapters", "adapter_id")),
    ],
)
def test_what_is_wrong_is_named(
    server: LiveServer, adapter: str | None, body: dict[str, Any], answer: tuple[int, str, str]
) -> None:
    assert error(invoke(server, adapter, **body)) == answer


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'"prompt"', b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(server: LiveServer, content: bytes) -> None:
    response = server.client.post("/invocations", content=content)
    assert error(response)[0] == 400
