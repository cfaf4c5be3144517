"""What is wrong in a request is named with its field, what was expected and what to do next; a case of each kind."""

import gzip
import json
from typing import Any

import pytest

from tests.service.live_server import NAME, LiveServer

TEXT = json.dumps({"model": NAME, "prompt": "hello", "max_tokens": 1}).encode()
FORM = {"content-type": "multipart/form-data"}
TAR = {"content-type": "application/x-tar"}

# method, path, headers and body; the status and the param of the answer, and what its message has
WRONG: dict[str, tuple[str, str, dict[str, str], bytes, int, str | None, tuple[str, ...]]] = {
    "no body": ("POST", "/v1/completions", {}, b"", 400, None, ("is empty: send a JSON object",)),
    "XML": ("POST", "/v1/completions", {}, b"<prompt/>", 400, None, ("begins with '<prompt/>'", "JSON object")),
    "a form": ("POST", "/v1/completions", {}, b"--ab\r\nContent-", 400, None, ("begins with '--ab", "JSON object")),
    "compressed": ("POST", "/v1/completions", {}, gzip.compress(TEXT), 400, None, ("'\\x1f", "is not compressed")),
    "an array": ("POST", "/v1/completions", {}, b"[]", 400, None, ("the body: Expected object, got array",)),
    "Latin-1": (
        *("POST", "/v1/completions", {}, TEXT.replace(b"hello", b"h\xe9llo"), 400, "prompt"),
        (f"not UTF-8: invalid continuation byte (byte {TEXT.index(b'hello') + 1})",),
    ),
    "a query of another type": (
        *("PUT", "/adapters/poet?pin=perhaps", {}, b"", 400, "pin"),
        ("pin: Expected bool | null, got str",),
    ),
    "an unknown query": (
        *("PUT", "/adapters/poet?pinn=true", {}, b"", 400, "pinn"),
        ("pinn is not known here: expected pin, preload, ephemeral",),
    ),
    "a query where none is known": ("GET", "/adapters?page=2", {}, b"", 400, "page", ("expected none",)),
    "a word that a query has not": (
        *("POST", "/pause?mode=never", {}, b"", 400, "mode"),
        ("mode: Invalid enum value 'never', expected one of abort, ", "keep"),
    ),
    "an unknown field": (
        *("POST", "/adapters/poet/load", {}, b'{"tier": "host", "now": 1}', 400, "now"),
        ("now is not known here: expected tier, pin",),
    ),
    "an unknown model": (
        *("POST", "/v1/completions", {}, TEXT.replace(NAME.encode(), b"nobody"), 404, "model"),
        ("'nobody': GET /v1/models lists",),
    ),
    "an unknown adapter": ("GET", "/adapters/nobody", {}, b"", 404, "name", ("'nobody': GET /adapters lists",)),
    "a name that there cannot be, and a condition": (
        *("DELETE", "/adapters/%16x", {"if-match": '"a"'}, b"", 404, "name"),
        ("GET /adapters lists",),
    ),
    "the same to change": (
        *("PATCH", "/adapters/%16x", {"if-match": '"a"'}, b'{"pinned": true}', 404, "name"),
        ("GET /adapters lists",),
    ),
    "an unknown call": ("POST", "/v1/embeddings", {}, b"", 404, None, ("POST /v1/embeddings", "GET /openapi.json")),
    "another method": (
        "GET",
        "/v1/completions",
        {},
        b"",
        405,
        None,
        ("GET /v1/completions", "not allowed here: expected POST"),
    ),
    "another of two": ("POST", "/kv/prefixes/a", {}, b"", 405, None, ("expected DELETE or GET",)),
    "a form without a boundary": (
        *("PUT", "/adapters/poet", FORM, b"a", 400, "Content-Type"),
        ("expected multipart/form-data; boundary=",),
    ),
    "no archive": ("PUT", "/adapters/poet", TAR, b"none", 400, None, ("expected a whole tar archive",)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_with_what_was_expected(server: LiveServer, call: Any) -> None:
    method, path, headers, body, status, param, words = call
    answer = server.client.request(method, path, headers=headers, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert [word for word in words if word not in error["message"]] == [], error


@pytest.mark.parametrize("path", ["/v1/models/{}", "/adapters/{}", "/nowhere/{}"])
def test_an_answer_does_not_have_all_of_a_name_that_has_no_end(server: LiveServer, path: str) -> None:
    answer = server.client.get(path.format("x" * 20_000))
    assert answer.status_code == 404
    assert len(answer.content) < 5000
    assert "xxx … 1" in answer.json()["error"]["message"]


def test_nor_of_a_field(server: LiveServer) -> None:
    answer = server.client.post("/adapters/poet/load", json={"x" * 1_000_000: 1})
    assert answer.json()["error"]["code"] == "unknown_field"
    assert len(answer.content) < 5000


def test_what_is_too_large_names_the_option(server: LiveServer) -> None:
    large = server.client.post("/v1/completions", content=b" " * (server.services.settings.max_body_bytes + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert "(--max-body-bytes): send less" in large.json()["error"]["message"]
