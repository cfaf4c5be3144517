"""A key with a prefix sees its own adapters only, and what a key has made is its own."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.service.keys.keyed_server import Client, Keyed, keyed_server, refusal
from tests.service.live_server import wait_until

BOTH = ["generate", "manage"]
OURS, THEIRS = "red/poet", "blue/poet"
LONG = "hello " * 40  # several blocks of K/V


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keys = {
        "red": {"scopes": BOTH, "adapter_prefix": "red/"},
        "red-2": {"scopes": BOTH, "adapter_prefix": "red/"},
        "blue": {"scopes": BOTH, "adapter_prefix": "blue/"},
        "all": {"scopes": [*BOTH, "admin"]},
    }
    directory = tmp_path_factory.mktemp("keyed")
    source = directory / "sources" / "an-adapter"
    source.mkdir(parents=True)
    allowed = (f"file://{directory / 'sources'}",)
    with keyed_server(tiny_model, directory, keys, allowed_sources=allowed) as keyed:
        assert keyed["red"].upload(OURS, 1).status_code == 201
        assert keyed["blue"].upload(THEIRS, 2).status_code == 201
        yield keyed


@pytest.fixture
def red(server: Keyed) -> Client:
    return server["red"]


@pytest.fixture
def digest(server: Keyed) -> str:
    """Of the other team's adapter."""
    digest: str = server["all"].get(f"/adapters/{THEIRS}").json()["digest"]
    return digest


def test_lists_have_the_adapters_of_the_prefix(server: Keyed, red: Client) -> None:
    assert [each["id"] for each in red.get("/v1/models").json()["data"]] == ["tiny", OURS]
    assert [each["name"] for each in red.get("/adapters").json()["adapters"]] == [OURS]
    assert list(red.get("/v1/loras").json()["loras"]) == [OURS]
    loaded = red.post("/unload_lora_adapter", json={"lora_name": "red/none"}).json()
    assert list(loaded["loaded_adapters"]) == [OURS]
    everybody = server["all"]
    assert [each["id"] for each in everybody.get("/v1/models").json()["data"]] == ["tiny", THEIRS, OURS]
    assert [each["name"] for each in everybody.get("/adapters").json()["adapters"]] == [THEIRS, OURS]


# Calls on an adapter by its name, which is put in place of NAME
CALLS = [
    ("GET", "/v1/models/NAME", None),
    ("GET", "/adapters/NAME", None),
    ("PATCH", "/adapters/NAME", {"pinned": True}),
    ("DELETE", "/adapters/NAME", None),
    ("POST", "/adapters/NAME/load", {"tier": "device"}),
    ("POST", "/adapters/NAME/load", {"tier": "device", "pin": True}),
    ("POST", "/adapters/NAME/unload", {"tier": "device"}),
    ("DELETE", "/v1/loras/NAME", None),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "NAME"}),
    ("POST", "/unload_lora_adapter", {"lora_name": "NAME"}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "tiny:NAME", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "NAME@DIGEST", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "NAME@00000000", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "tiny", "lora_path": "NAME", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "tiny", "lora_path": ["NAME"], "prompt": ["hello"]}),
    ("POST", "/v1/completions", {"model": "tiny", "adapter_id": "NAME", "prompt": "hello"}),
    ("POST", "/v1/completions", {"model": "tiny", "adapters": {"NAME": 0.5, OURS: 0.5}, "prompt": "hello"}),
    ("POST", "/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "hello"}]}),
    ("POST", "/v1/responses", {"model": "NAME", "input": "hello"}),
    ("POST", "/invocations", {"model": "NAME", "prompt": "hello"}),
    ("POST", "/invocations", {"inputs": "hello", "adapters": "NAME"}),
    ("POST", "/inference/v1/generate", {"model": "NAME", "token_ids": [5], "sampling_params": {}}),
    ("POST", "/tokenize", {"model": "NAME", "prompt": "hello"}),
    ("POST", "/detokenize", {"model": "NAME", "tokens": [5]}),
    ("POST", "/kv/prefixes", {"model": "NAME", "prompt": "hello"}),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_name_that_a_key_may_not_see_is_answered_as_one_that_does_not_exist(
    red: Client, digest: str, method: str, path: str, body: object
) -> None:
    def answer(name: str) -> tuple[int, str]:
        def put(value: object) -> object:
            if isinstance(value, dict):
                return {put(key): put(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [put(inner) for inner in value]
            return value.replace("NAME", name).replace("DIGEST", digest[:8]) if isinstance(value, str) else value

        found = red.request(method, path.replace("NAME", name), json=put(body))
        return found.status_code, found.text.replace(name, "NAME")

    shown, missing = answer(THEIRS), answer("blue/none")
    assert shown == missing
    assert shown[0] in (400, 404)
    assert digest[:8] not in shown[1].replace(f"@{digest[:8]}", "")


def test_a_header_may_not_name_it_either(red: Client) -> None:
    header = {"X-Amzn-SageMaker-Adapter-Identifier": THEIRS}
    assert refusal(red.post("/invocations", json={"prompt": "hello"}, headers=header)) == (404, "model_not_found")


def test_a_new_name_outside_the_prefix_is_refused_with_the_prefix(server: Keyed, red: Client) -> None:
    url = f"file://{server.file.parent}/sources/an-adapter"
    for name in (THEIRS, "blue/none", "poet"):
        answers = [
            red.upload(name),
            red.post("/adapters", json={"name": name, "src": url}),
            red.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": url}),
            red.post("/load_lora_adapter", json={"lora_name": name, "lora_path": url}),
            red.post("/v1/loras", json={"lora_name": name, "source": {"uri": url}}),
        ]
        for answer in answers:
            assert refusal(answer) == (403, "name_outside_prefix"), answer.request.url
            assert "'red/'" in answer.json()["error"]["message"]
    assert server["all"].get(f"/adapters/{THEIRS}").json()["generation"] == 1


def test_a_name_of_the_same_content_is_not_told(server: Keyed, red: Client) -> None:
    assert server["blue"].upload("blue/copy", 7).status_code == red.upload("red/copy", 7).status_code == 201
    answer = red.delete("/adapters/red/copy", params={"force": True})
    assert refusal(answer) == (409, "adapter_is_shared")
    assert "blue" not in answer.text
    for client, name in ((red, "red/copy"), (server["blue"], "blue/copy")):
        assert client.delete(f"/adapters/{name}").status_code == 204


def test_imports_of_others_are_not_shown(server: Keyed, red: Client) -> None:
    """The source has no files, so the import fails, which its own key is shown."""
    url = f"file://{server.file.parent}/sources/an-adapter"
    started = server["blue"].post("/adapters", json={"name": "blue/late", "src": url}, params={"wait": False})
    assert started.status_code == 202
    assert "blue/late" in [each["name"] for each in server["blue"].get("/adapters").json()["adapters"]]
    assert [each["name"] for each in red.get("/adapters").json()["adapters"]] == [OURS]
    assert refusal(red.get("/adapters/blue/late")) == (404, "adapter_not_found")
    assert refusal(red.delete("/adapters/blue/late")) == (404, "adapter_not_found")
    assert server["blue"].delete("/adapters/blue/late").status_code == 204


def test_the_kv_cache_is_shown_as_far_as_its_adapters_go(server: Keyed, red: Client, digest: str) -> None:
    for id, name in (("red", OURS), ("blue", THEIRS)):
        assert server[id].complete(LONG, model=name).status_code == 200
    mine = red.get(f"/adapters/{OURS}").json()["digest"]
    shown = red.get("/kv").json()
    assert ([each["names"] for each in shown["namespaces"]], shown["namespaces"][0]["namespace"]) == ([[OURS]], mine)
    assert (shown["blocks"], shown["host"]) == (None, None)
    assert shown["query_tokens"] == shown["namespaces"][0]["query_tokens"] > 0
    assert digest not in str(shown)
    whole = server["all"].get("/kv").json()
    assert {"base", mine, digest} <= {each["namespace"] for each in whole["namespaces"]}
    assert whole["blocks"]["total"] > 0
    assert refusal(red.delete(f"/kv/namespaces/{OURS}")) == (403, "missing_scope")


def test_a_held_prefix_is_its_keys_own(server: Keyed, red: Client) -> None:
    made = red.post("/kv/prefixes", json={"model": OURS, "prompt": LONG})
    assert made.status_code == 201
    id = made.json()["id"]
    assert [each["id"] for each in red.get("/kv/prefixes").json()["prefixes"]] == [id]
    for other in ("red-2", "blue", "all"):
        assert server[other].get("/kv/prefixes").json() == {"prefixes": []}
        missing = server[other].get("/kv/prefixes/prefix-none")
        for answer in (server[other].get(f"/kv/prefixes/{id}"), server[other].delete(f"/kv/prefixes/{id}")):
            assert refusal(answer) == (404, "prefix_not_found")
            assert answer.text.replace(id, "prefix-none") == missing.text
    assert red.delete(f"/kv/prefixes/{id}").status_code == 204
    assert "it was released" in red.get(f"/kv/prefixes/{id}").text
    assert "it was released" not in server["blue"].get(f"/kv/prefixes/{id}").text


def test_a_response_is_its_keys_own(server: Keyed, red: Client) -> None:
    id = red.post("/v1/responses", json={"model": "tiny", "input": "hello", "max_output_tokens": 16}).json()["id"]
    again = {"model": "tiny", "input": "and?", "max_output_tokens": 16, "previous_response_id": id}
    assert red.post("/v1/responses", json=again).status_code == 200
    for other in ("red-2", "blue", "all"):
        client = server[other]
        for answer in (
            client.get(f"/v1/responses/{id}"),
            client.delete(f"/v1/responses/{id}"),
            client.post(f"/v1/responses/{id}/cancel"),
            client.get(f"/v1/responses/{id}/input_items"),
        ):
            assert refusal(answer) == (404, "response_not_found")
        assert refusal(client.post("/v1/responses", json=again)) == (400, "previous_response_not_found")
    assert red.get(f"/v1/responses/{id}/input_items").json()["data"]


def cached(answer: httpx.Response) -> int:
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_cached_tokens_tell_nothing_of_other_keys(server: Keyed) -> None:
    prompt = "a secret that one asks about " * 4
    for salt in ({}, {"cache_salt": "ours"}):
        assert [cached(server["red"].complete(prompt, **salt)) > 0 for _ in range(2)] == [False, True]
    assert cached(server["blue"].complete(prompt)) == 0
    assert cached(server["blue"].complete(prompt, cache_salt="ours")) == 0
    assert cached(server["red-2"].complete(prompt, cache_salt="red/ours")) == 0
    held = server["all"].post("/kv/prefixes", json={"model": "tiny", "prompt": prompt, "pin": False})
    assert held.json()["cached_tokens"] == 0


def test_keys_that_may_share_find_what_others_have_computed(tiny_model: Path, tmp_path: Path) -> None:
    keys: dict[str, dict[str, object]] = {"red": {}, "blue": {}}
    with keyed_server(tiny_model, tmp_path, keys, share_cache_between_keys=True) as server:
        assert cached(server["red"].complete(LONG)) == 0
        assert cached(server["blue"].complete(LONG)) > 0
        assert cached(server["blue"].complete(LONG, cache_salt="own")) == 0


def test_a_key_has_one_turn_however_many_salts_it_sends(server: Keyed, red: Client) -> None:
    """The tenant of the fair queue is the key, and no other key's salt can be its own."""
    with ExitStack() as streams:
        for salt in ("a", "b"):
            asked = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "stream": True, "cache_salt": salt}
            server["all"].post("/pause", params={"mode": "keep"})
            streams.callback(server["all"].post, "/resume")
            content = json.dumps(asked).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {red.key}\r\n"
            head += f"content-length: {len(content)}\r\n\r\n"
            streams.enter_context(server.live.connect(head.encode() + content))
        backlog = server.live.services.engine._backlog
        wait_until(lambda: backlog.waiting == 2)
        assert {groups[0] for groups in backlog._waiting.values()} == {("red",)}
