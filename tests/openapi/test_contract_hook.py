"""What the hook refuses: responses that the contract does not describe."""

from typing import Any

import httpx
import pytest

from tests.openapi.contract_hook import hold_to_contract


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": "no", "type": "server_error", "param": None, "code": code}}


ERROR = error("engine_died")
MODELS = {"object": "list", "data": []}


def response(method: str, path: str, status: int, **content: Any) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request(method, f"http://server{path}"), **content)


def events(*data: str) -> httpx.Response:
    text = "".join(f"data: {each}\n\n" for each in data)
    headers = {"content-type": "text/event-stream"}
    return response("POST", "/v1/completions", 200, stream=httpx.ByteStream(text.encode()), headers=headers)


@pytest.mark.parametrize(
    "described",
    [
        response("GET", "/v1/models", 200, json=MODELS),
        response("POST", "/v1/completions", 503, json=ERROR),
        response("GET", "/nowhere", 404, json=error("not_found")),
        response("PUT", "/v1/models", 405, json=error("method_not_allowed")),
        response("DELETE", "/adapters/poet", 204),
        response("GET", "/metrics", 200, text="up 1"),
    ],
)
def test_what_is_described_passes(described: httpx.Response) -> None:
    hold_to_contract(described)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (response("GET", "/v1/models", 200, json={"object": "list"}), "'data' is a required property"),
        (response("GET", "/v1/models", 200, json=MODELS | {"more": 1}), "'more' was unexpected"),
        (response("GET", "/v1/models", 202, json=MODELS), "GET /v1/models: 202"),
        (response("GET", "/v1/models", 200, text="none"), "content type 'text/plain'"),
        (response("GET", "/v1/models", 409, json=ERROR), "does not have this status"),
        (response("GET", "/v1/models", 503, json=ERROR), "does not have the code engine_died"),
        (response("GET", "/nowhere", 200, json={}), "no such call"),
        (response("GET", "/nowhere", 404, text="Not Found"), "content type 'text/plain'"),
        (
            response("GET", "/adapters", 401, json={"error": ERROR["error"] | {"type": "sorry"}}),
            "'sorry' is not one of",
        ),
        (response("DELETE", "/adapters/poet", 204, text="gone"), "no body"),
    ],
)
def test_what_is_not_described_is_refused(wrong: httpx.Response, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        hold_to_contract(wrong)


@pytest.mark.parametrize(("data", "complaint"), [("{}", "not valid"), ('{"error": "no"}', "not valid")])
def test_an_event_that_is_not_described_is_refused_when_it_is_read(data: str, complaint: str) -> None:
    hold_to_contract(whole := events("[DONE]"))
    assert whole.read() == b"data: [DONE]\n\n"
    hold_to_contract(broken := events(data))
    with pytest.raises(AssertionError, match=complaint):
        broken.read()
