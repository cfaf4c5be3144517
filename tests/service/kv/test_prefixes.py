"""Prefixes over HTTP: computed, held for a time, let go."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.kv import prefixes
from service.openai.prompts import PromptEncoder
from service.openai.schemas import Message
from service.text.chat_templates import ChatTemplates
from service.text.tokenizer import Tokenizer
from tests.service.alora_service import HEADER, INVOCATION, alora_server, encode
from tests.service.kv.held_prefixes import error, get, gone, hold, in_flight, listed, post
from tests.service.live_server import LiveServer, wait_until

TURNS = [{"role": "user", "content": "hello, this is a conversation"}, {"role": "assistant", "content": "hello world"}]


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with alora_server(tiny_model, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays_held(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "live" in request.fixturenames:
        server: LiveServer = request.getfixturevalue("live")
        for prefix in listed(server):
            server.client.delete(f"/kv/prefixes/{prefix['id']}")


def test_a_prefix_is_held_until_it_is_deleted(live: LiveServer) -> None:
    response = post(live, prompt="twenty-one characters", ttl_seconds=60)
    assert response.status_code == 201
    prefix = response.json()
    assert response.headers["location"] == f"/kv/prefixes/{prefix['id']}"
    assert {key: prefix[key] for key in ("model", "digest", "tokens", "blocks", "cached_tokens")} == {
        "model": "tiny",
        "digest": None,
        "tokens": 21,
        "blocks": 2,
        "cached_tokens": 0,
    }
    assert 59 < prefix["expires_at"] - prefix["created_at"] < 62
    assert (get(live, prefix).json(), listed(live)) == (prefix, [prefix])
    again = hold(live, prompt="twenty-one characters, and some")
    assert again["cached_tokens"] == 16
    assert [each["id"] for each in listed(live)] == [prefix["id"], again["id"]]
    assert live.client.delete(f"/kv/prefixes/{prefix['id']}").status_code == 204
    assert gone(live, prefix, "released")
    assert live.client.delete(f"/kv/prefixes/{prefix['id']}").status_code == 404
    assert listed(live) == [again]


def test_five_minutes_are_the_default(live: LiveServer) -> None:
    prefix = hold(live, prompt=[5, 6, 7])
    assert 299 < prefix["expires_at"] - prefix["created_at"] < 302


def test_a_prefix_that_never_was_is_not_found(live: LiveServer) -> None:
    for method in ("GET", "DELETE"):
        assert error(live.client.request(method, "/kv/prefixes/nobody")) == (404, "prefix_not_found", "id")


def test_a_prefix_ends_when_its_time_is_over(live: LiveServer) -> None:
    prefix = hold(live, "plain", prompt="hello", ttl_seconds=0.3)
    assert in_flight(live, "plain") == 1
    wait_until(lambda: in_flight(live, "plain") == 0)
    assert gone(live, prefix, "time is over")
    wait_until(lambda: live.client.get("/kv").json()["blocks"]["held"] == 0)


def test_it_is_not_shown_beyond_its_time_though_the_engine_is_late(live: LiveServer) -> None:
    prefix = hold(live, prompt="hello", ttl_seconds=0.05)
    held = live.services.prefixes
    wait_until(lambda: gone(live, prefix, "time is over"))
    assert held.list() == []


def test_warming_holds_nothing(live: LiveServer) -> None:
    text = "a prefix that is computed, and not held"
    response = post(live, prompt=text, pin=False)
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["expires_at"]) == (None, None)
    assert response.json()["tokens"] > 32
    assert listed(live) == []
    assert live.client.get("/kv").json()["blocks"]["held"] == 0
    assert live.complete(text + " yet", max_tokens=1).headers["x-cached-tokens"] == "32"


def test_a_chat_prefix_is_what_later_requests_begin_with(live: LiveServer) -> None:
    prefix = hold(live, messages=TURNS)
    for more in ([], [{"role": "user", "content": "and then?"}], [{"role": "system", "content": "x"}]):
        answer = live.post("/v1/chat/completions", model="tiny", messages=[*TURNS, *more], max_tokens=1)
        assert int(answer.headers["x-cached-tokens"]) == prefix["tokens"] // 16 * 16


def test_a_chat_prefix_of_the_default_model_is_one_of_what_later_requests_render(default_model_path: Path) -> None:
    """With the tokenizer and the template that people use: the last token too is the later request's own."""
    tokenizer = Tokenizer(default_model_path)
    templates = ChatTemplates(tokenizer.chat_templates, tokenizer.special_tokens)
    prompts = PromptEncoder(tokenizer, templates, vocab_size=10**6, max_model_len=8192)
    turns = [Message(role=turn["role"], content=turn["content"]) for turn in TURNS]
    prefix = asyncio.run(prompts.chat_prefix(turns, None, None)).token_ids
    for more in ([], [Message(role="user", content="and then?")]):
        whole = asyncio.run(prompts.chat_prompt([*turns, *more], None, None)).token_ids
        assert whole[: len(prefix)] == prefix
        assert len(whole) > len(prefix)


def test_the_prefix_of_an_adapter_is_its_own(live: LiveServer) -> None:
    text = "one adapter and its prefix of some length"
    prefix = hold(live, "tiny:plain", prompt=text)
    assert prefix["digest"] == live.client.get("/adapters/plain").json()["digest"]
    assert (prefix["activation"], prefix["invocation"]) == (0, None)
    later = live.post("/v1/completions", model="plain", prompt=text + ".", max_tokens=1)
    assert later.headers["x-cached-tokens"] == "32"
    assert live.complete(text + ".", max_tokens=1).headers["x-cached-tokens"] == "0"


def test_the_prefix_of_an_adapter_that_leaves_k_and_v_alone_is_everybodys(live: LiveServer) -> None:
    text = "a late adapter and its prefix of some length"
    hold(live, "late", prompt=text)
    for model in ("late", "tiny"):
        later = live.post("/v1/completions", model=model, prompt=text + ".", max_tokens=1)
        assert later.headers["x-cached-tokens"] == "32"


def test_tenants_do_not_share_a_prefix(live: LiveServer) -> None:
    text = "one tenant and its prefix of some length"
    assert "cache_salt" not in hold(live, prompt=text, cache_salt="mine")
    assert live.complete(text + ".", max_tokens=1).headers["x-cached-tokens"] == "0"
    assert live.complete(text + ".", max_tokens=1, cache_salt="mine").headers["x-cached-tokens"] == "32"


def test_a_prefix_of_an_alora_needs_its_invocation_as_a_request_does(live: LiveServer) -> None:
    assert error(post(live, "check", prompt="hello")) == (400, "alora_invocation_missing", "prompt")
    assert error(post(live, "check", messages=TURNS)) == (400, "alora_invocation_missing", "messages")
    assert error(post(live, "plain", prompt="hello", alora={})) == (400, "alora_not_applicable", "alora")
    found = hold(live, "check", prompt=f"hello{INVOCATION}")
    assert (found["activation"], found["invocation"]) == (1, "found")
    base = hold(live, "check", prompt="hello", alora={"on_missing": "base"})
    assert (base["activation"], base["invocation"]) == (None, "base")
    appended = hold(live, "check", messages=TURNS, alora={"on_missing": "append"})
    length = len(encode(live, INVOCATION))
    assert (appended["activation"], appended["invocation"]) == (appended["tokens"] - length, "appended")
    later = live.post(
        "/v1/chat/completions", model="check", messages=TURNS, max_tokens=1, alora={"on_missing": "append"}
    )
    assert later.headers["x-alora-activation"] == str(appended["activation"])
    assert live.client.get("/kv/prefixes").json()["prefixes"][0]["model"] == "check"


@pytest.mark.parametrize("turns", [TURNS[:1], [*TURNS, TURNS[0]]], ids=["first turn", "later turn"])
def test_where_the_assistants_header_invokes_a_prefix_is_the_bases_up_to_the_next_answer(
    live: LiveServer, turns: list[dict[str, str]]
) -> None:
    """Whatever headers there are in a conversation, a later request begins its adapter at its own last one."""
    salt = f"header {len(turns)}"
    prefix = hold(live, "header", messages=turns, cache_salt=salt)
    assert (prefix["activation"], prefix["invocation"]) == (prefix["tokens"], "found")
    for model in ("header", "tiny"):
        answer = live.post("/v1/chat/completions", model=model, messages=turns, max_tokens=1, cache_salt=salt)
        assert answer.headers["x-cached-tokens"] == str(prefix["tokens"] // 16 * 16)
    appended = hold(live, "header", messages=turns, alora={"on_missing": "append"}, cache_salt=salt)
    answer = live.post("/v1/chat/completions", model="header", messages=turns, max_tokens=1, cache_salt=salt)
    assert answer.json()["usage"]["prompt_tokens"] == appended["tokens"]
    assert answer.headers["x-alora-activation"] == str(appended["activation"])
    assert appended["activation"] == prefix["tokens"]
    assert appended["tokens"] - appended["activation"] == len(encode(live, HEADER))


def test_an_invocation_among_the_messages_is_where_an_adapter_begins_in_a_prefix_too(live: LiveServer) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": f"well{INVOCATION}and so on"}]
    prefix = hold(live, "check", messages=turns)
    answer = live.post("/v1/chat/completions", model="check", messages=turns, max_tokens=1)
    assert answer.headers["x-alora-activation"] == str(prefix["activation"])
    assert answer.headers["x-cached-tokens"] == str(prefix["tokens"] // 16 * 16)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_field", "messages"),
        ({"prompt": "x", "messages": TURNS}, "invalid_field", "messages"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [-1]}, "invalid_field", "prompt[0]"),
        ({"prompt": [10**6]}, "invalid_token_id", "prompt"),
        ({"prompt": ["x"]}, "invalid_field", "prompt[0]"),
        ({"prompt": [5] * 200}, "context_length_exceeded", "prompt"),
        ({"messages": []}, "invalid_field", "messages"),
        ({"messages": [{"role": "critic", "content": "hm"}]}, "invalid_chat", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ({"prompt": "x", "ttl_seconds": 0}, "invalid_field", "ttl_seconds"),
        ({"prompt": "x", "ttl_seconds": 86_401}, "invalid_field", "ttl_seconds"),
        ({"prompt": "x", "ttl_seconds": "long"}, "invalid_field", "ttl_seconds"),
        ({"prompt": "x", "pin": "no"}, "invalid_field", "pin"),
        ({"prompt": "x", "cache_salt": 5}, "invalid_field", "cache_salt"),
        ({"prompt": "x", "alora": {"on_missing": 1}}, "invalid_field", "alora.on_missing"),
        ({"prompt": "x", "stream": True}, "unknown_field", "stream"),
    ],
)
def test_a_wrong_field_is_refused_by_name(live: LiveServer, body: dict, code: str, param: str) -> None:
    assert error(post(live, **body)) == (400, code, param)
    assert listed(live) == []


def test_an_unknown_model_is_not_found(live: LiveServer) -> None:
    assert error(post(live, "nobody", prompt="x")) == (404, "model_not_found", "model")
    assert error(live.post("/kv/prefixes", prompt="x")) == (400, "missing_field", "model")


def test_half_of_the_blocks_may_be_held_and_no_more(live: LiveServer) -> None:
    for tenant in ("a", "b"):
        hold(live, prompt=[5] * 199, cache_salt=tenant)
    assert error(post(live, prompt=[5] * 199, cache_salt="c"))[:2] == (409, "prefixes_full")
    assert len(listed(live)) == 2


def test_there_is_a_bound_to_prefixes_that_share_their_blocks(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "MAX_PREFIXES", 3)
    for _ in range(3):
        hold(live, prompt="hello")
    assert error(post(live, prompt="hello"))[:2] == (409, "prefixes_full")


def test_why_prefixes_ended_is_remembered_of_the_latest(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_ENDED", 2)
    monkeypatch.setattr(live.services.prefixes, "_ended", {})
    ended = [hold(live, prompt="hello") for _ in range(3)]
    for prefix in ended:
        live.client.delete(f"/kv/prefixes/{prefix['id']}")
    assert gone(live, ended[0], "no such prefix")
    assert gone(live, ended[1], "released")
    assert gone(live, ended[2], "released")


@pytest.mark.parametrize(
    ("code", "status"), [("queue_full", 429), ("adapter_failed", 503), ("prefix_dropped", 409), ("engine_error", 500)]
)
def test_a_refusal_of_the_engine_has_its_status(live: LiveServer, code: str, status: int) -> None:
    assert error(post(live, "plain", prompt="x", cache_salt=f"refuse {code}"))[:2] == (status, code)
    assert in_flight(live, "plain") == 0


def test_a_client_that_goes_away_while_it_is_computed_holds_nothing(live: LiveServer) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=live.url) as client:
            body = {"model": "plain", "prompt": "x", "cache_salt": "silent"}
            asked = asyncio.create_task(client.post("/kv/prefixes", json=body))
            await asyncio.to_thread(wait_until, lambda: in_flight(live, "plain") > 0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: in_flight(live, "plain") == 0)
    assert listed(live) == []
