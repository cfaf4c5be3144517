"""Two servers on one store: what a client has written by one of them, it gets from the other at once."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.catalog.lookups import LOOKUPS_PER_SECOND, Lookups
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server

NEVER = 3600.0  # seconds: neither follows the store by itself


@pytest.fixture(scope="module")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, LiveServer]]:
    settings = fake_settings(tiny_model, tmp_path_factory.mktemp("store"), refresh_seconds=NEVER)
    with live_server(settings) as one, live_server(settings) as other:
        yield one, other


@pytest.fixture(autouse=True)
def rested(servers: tuple[LiveServer, LiveServer]) -> None:
    """Each test has all the reads of a rested server."""
    for server in servers:
        server.services.catalog._lookups = Lookups()


def upload(server: LiveServer, name: str, seed: int = 0, **headers: str) -> httpx.Response:
    response = server.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)), headers=headers)
    assert response.status_code in (200, 201), response.text
    return response


def complete(server: LiveServer, model: str, **headers: str) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": 1}
    return server.client.post("/v1/completions", json=body, headers=headers)


def failed(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


CALLS = [
    ("POST", "/v1/completions", {"model": "{name}", "prompt": "hello", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": f"{NAME}:{{name}}", "prompt": "hello", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": NAME, "lora_path": ["{name}", None], "prompt": ["a", "b"], "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": NAME, "adapters": {"{name}": 1.0}, "prompt": "hello", "max_tokens": 1}),
    ("POST", "/v1/chat/completions", {"model": "{name}", "messages": [{"role": "user", "content": "hello"}]}),
    ("POST", "/v1/responses", {"model": "{name}", "input": "hello"}),
    ("POST", "/invocations", {"model": "{name}", "prompt": "hello", "max_tokens": 1}),
    ("POST", "/tokenize", {"model": "{name}", "prompt": "hello"}),
    ("POST", "/detokenize", {"model": "{name}", "tokens": [5]}),
    ("POST", "/kv/prefixes", {"model": "{name}", "prompt": "hello hello", "pin": False}),
    ("GET", "/v1/models/{name}", None),
    ("GET", "/adapters/{name}", None),
    ("PATCH", "/adapters/{name}", {"pinned": False}),
    ("POST", "/adapters/{name}/load", {"tier": "host"}),
    ("POST", "/adapters/{name}/unload", {"tier": "host"}),
    ("DELETE", "/kv/namespaces/{name}", None),
    ("DELETE", "/adapters/{name}", None),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "{name}"}),
]


def named(value: object, name: str) -> object:
    if isinstance(value, dict):
        return {named(key, name): named(each, name) for key, each in value.items()}
    if isinstance(value, list):
        return [named(each, name) for each in value]
    return value.replace("{name}", name) if isinstance(value, str) else value


@pytest.mark.parametrize("call", range(len(CALLS)))
def test_every_call_finds_a_name_that_the_other_server_has_just_got(
    servers: tuple[LiveServer, LiveServer], call: int
) -> None:
    one, other = servers
    method, path, body = CALLS[call]
    upload(one, f"new-{call}")
    response = other.client.request(method, path.format(name=f"new-{call}"), json=named(body, f"new-{call}"))
    assert response.is_success, response.text
    unknown = other.client.request(method, path.format(name="nobody"), json=named(body, "nobody"))
    assert unknown.status_code == 404


def test_a_name_and_its_digest_are_known_to_both_and_a_replaced_one_is_by_its_generation(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    one, other = servers
    first = upload(one, "poet")
    assert first.headers["x-adapter-generation"] == "1"
    answered = complete(other, "poet")
    assert answered.headers["x-adapter-digest"] == first.json()["digest"]
    assert answered.headers["x-adapter-generation"] == "1"

    second = upload(one, "poet", seed=1)
    digest, generation = second.json()["digest"], second.headers["x-adapter-generation"]
    assert generation == "2"
    assert complete(other, "poet").headers["x-adapter-digest"] == first.json()["digest"], "as it was known"
    asked = complete(other, "poet", **{"X-Adapter-Generation": generation})
    assert asked.headers["x-adapter-digest"] == digest
    shown = other.client.get("/adapters/poet", headers={"X-Adapter-Generation": "2"})
    assert shown.headers["x-adapter-generation"] == "2"

    third = upload(one, "poet", seed=2).json()["digest"]
    assert complete(other, f"poet@{third}").headers["x-adapter-digest"] == third


def test_a_generation_that_nobody_has_is_a_failed_precondition(servers: tuple[LiveServer, LiveServer]) -> None:
    one, other = servers
    upload(one, "early")
    for response in (
        complete(other, "early", **{"X-Adapter-Generation": "7"}),
        other.client.get("/adapters/early", headers={"X-Adapter-Generation": "7"}),
    ):
        assert failed(response) == (412, "generation_not_reached")
        assert response.json()["error"]["param"] == "X-Adapter-Generation"
        assert "generation 1" in response.json()["error"]["message"]
    assert failed(complete(other, "nobody", **{"X-Adapter-Generation": "1"})) == (404, "model_not_found")
    for bad in ("0", "-1", "two", "1.0", ""):
        assert failed(complete(other, "early", **{"X-Adapter-Generation": bad})) == (400, "invalid_header")
    assert complete(other, NAME, **{"X-Adapter-Generation": "3"}).status_code == 200, "the base has no generations"
    several = {"model": NAME, "lora_path": ["early", "poet"], "prompt": ["a", "b"]}
    response = other.client.post("/v1/completions", json=several, headers={"X-Adapter-Generation": "1"})
    assert failed(response) == (400, "invalid_header")


def test_a_deleted_name_is_gone_from_the_other_server_for_those_who_ask_for_more_than_it_knows(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    one, other = servers
    upload(one, "brief")
    assert complete(other, "brief").status_code == 200
    assert one.client.delete("/adapters/brief").status_code == 204
    assert failed(complete(other, "brief", **{"X-Adapter-Generation": "2"})) == (404, "model_not_found")
    assert failed(other.client.get("/adapters/brief")) == (404, "adapter_not_found")


def test_conditions_are_those_of_the_store(servers: tuple[LiveServer, LiveServer]) -> None:
    one, other = servers
    first = upload(one, "kept").headers["etag"]
    second = upload(other, "kept", seed=1, **{"if-match": first})
    assert second.headers["x-adapter-generation"] == "2"
    assert one.client.delete("/adapters/kept", headers={"if-match": second.headers["etag"]}).status_code == 204
    again = other.client.put("/adapters/kept", files=multipart(*bundle()), headers={"if-none-match": "*"})
    assert again.status_code == 201


def test_where_too_many_names_were_looked_up_a_generation_is_not_denied_but_unknown(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    one, other = servers
    upload(one, "late")
    other.services.catalog._lookups = Lookups(lambda: 0.0)  # a second that never ends
    for guess in range(LOOKUPS_PER_SECOND):
        assert failed(complete(other, f"guess-{guess}")) == (404, "model_not_found")
    assert failed(complete(other, "late")) == (404, "model_not_found")
    response = complete(other, "late", **{"X-Adapter-Generation": "1"})
    assert failed(response) == (503, "generation_unknown")
    assert response.headers["retry-after"] == "1"
