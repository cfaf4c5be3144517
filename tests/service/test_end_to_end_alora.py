"""Trained aLoRA adapters over HTTP, on the embedded model: a conversation on the base, and checks of it by adapters."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.openapi.contract_hook import HOOKS
from tests.service.test_end_to_end import BASE, serve

NAMES = ("vault", "ledger")


@pytest.fixture(scope="module")
def client(
    default_model_path: Path, trained_adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    with (
        serve(tmp_path_factory.mktemp("data")) as (url, _),
        httpx.Client(base_url=url, timeout=120, event_hooks=HOOKS) as client,
    ):
        for name in NAMES:
            files = {path.name: (path.name, path.read_bytes()) for path in (trained_adapters / name).iterdir()}
            answer = client.put(f"/adapters/{name}", files=files)
            assert (answer.status_code, answer.json()["kind"]) == (201, "alora")
        yield client


@pytest.fixture(scope="module")
def expected(trained_adapters: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((trained_adapters / "passwords.json").read_text())
    return found


def chat(client: httpx.Client, model: str, messages: list[dict[str, str]], **body: Any) -> httpx.Response:
    asked = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0, **body}
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer


def said(answer: httpx.Response) -> str:
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def test_checks_after_a_turn_find_all_of_the_conversation_in_the_cache(
    client: httpx.Client, expected: dict[str, dict[str, str]]
) -> None:
    turns = [{"role": "user", "content": expected["vault"]["prompt"]}]
    first = chat(client, BASE, turns)
    turns.append({"role": "assistant", "content": said(first)})
    for name in (*NAMES, *NAMES):
        answer = chat(client, name, turns, alora={"on_missing": "append"})
        assert expected[name]["password"] in said(answer)
        assert answer.headers["x-alora-invocation"] == "appended"
        prompt, activation = answer.json()["usage"]["prompt_tokens"], int(answer.headers["x-alora-activation"])
        assert prompt - activation == len(client.get(f"/adapters/{name}").json()["invocation_tokens"])
        # all of the question, and nearly all of the base's answer to it
        assert int(answer.headers["x-cached-tokens"]) > first.json()["usage"]["prompt_tokens"]
        assert int(answer.headers["x-cached-tokens"]) >= activation - 16
    turns.append({"role": "user", "content": "Thank you. And the sea?"})
    again = chat(client, BASE, turns)
    assert not any(expected[name]["password"] in said(again) for name in NAMES)


def test_the_base_runs_where_nothing_is_invoked(client: httpx.Client, expected: dict[str, dict[str, str]]) -> None:
    turns = [{"role": "user", "content": expected["vault"]["prompt"]}]
    chat(client, BASE, turns)  # so that both find the prompt in the cache: in bfloat16 a cold prompt rounds otherwise
    answer = chat(client, "vault", turns, alora={"on_missing": "base"})
    assert said(answer) == said(chat(client, BASE, turns))
    assert answer.headers["x-alora-invocation"] == "base"
    refused = client.post("/v1/chat/completions", json={"model": "vault", "messages": turns})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "alora_invocation_missing")
    assert expected["vault"]["invocation"].strip() in refused.json()["error"]["message"]


def test_a_held_prefix_is_found_by_base_and_adapters(client: httpx.Client, expected: dict[str, dict[str, str]]) -> None:
    turns = [{"role": "system", "content": "You know much about the weather, and you say it kindly." * 8}]
    held = client.post("/kv/prefixes", json={"model": BASE, "messages": turns, "ttl_seconds": 600})
    assert held.status_code == 201, held.text
    prefix = held.json()
    assert client.get("/kv").json()["blocks"]["held"] == prefix["blocks"]
    turns.append({"role": "user", "content": expected["ledger"]["prompt"]})
    for model in (BASE, *NAMES):
        asked = {} if model == BASE else {"alora": {"on_missing": "append"}}
        answer = chat(client, model, turns, max_tokens=1, **asked)
        assert int(answer.headers["x-cached-tokens"]) >= prefix["tokens"] // 16 * 16
    kv = client.get("/kv").json()
    digests = {client.get(f"/adapters/{name}").json()["digest"]: name for name in NAMES}
    shares = {share["namespace"]: share for share in kv["namespaces"]}
    assert set(shares) <= {"base", *digests}
    assert shares["base"]["hit_tokens"] > 0
    assert client.delete(f"/kv/prefixes/{prefix['id']}").status_code == 204
    assert client.get("/kv").json()["blocks"]["held"] == 0


def test_what_a_name_has_in_the_cache_can_be_dropped(client: httpx.Client, expected: dict[str, dict[str, str]]) -> None:
    turns = [{"role": "user", "content": expected["vault"]["prompt"]}]
    body = {"model": "vault", "messages": turns, "alora": {"on_missing": "append"}}
    prefix = client.post("/kv/prefixes", json=body).json()
    chat(client, "vault", turns, alora={"on_missing": "append"})
    assert client.delete("/kv/namespaces/vault").status_code == 204
    assert client.get(f"/kv/prefixes/{prefix['id']}").json()["error"]["code"] == "prefix_not_found"
    assert client.get("/adapters/vault").json()["requests_in_flight"] == 0
    assert expected["vault"]["password"] in said(chat(client, "vault", turns, alora={"on_missing": "append"}))
