"""The `openai` client's responses, unchanged, against a service on the fake engine, whose answer is the prompt."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent

from tests.openapi.contract_hook import HOOKS
from tests.service.live_server import LiveServer, wait_until

EVENT: pydantic.TypeAdapter = pydantic.TypeAdapter(ResponseStreamEvent)
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    judged = httpx.Client(event_hooks=HOOKS)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, http_client=judged) as client:
        yield client


def chat_of(server: LiveServer, messages: list[dict[str, Any]], **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text and the usage of a chat."""
    body = server.post("/v1/chat/completions", model="tiny", messages=messages, **fields).json()
    return body["choices"][0]["message"]["content"], body["usage"]


def without_repeats(kinds: list[str]) -> list[str]:
    return [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]


def test_a_response_is_what_a_chat_with_the_same_messages_answers(server: LiveServer, client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="tiny",
        instructions="be brief",
        input="hello world",
        max_output_tokens=30,
        metadata={"purpose": "test"},
        user="someone",
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]
    text, usage = chat_of(server, messages, max_tokens=30)
    assert response.output_text == text != ""
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage is not None
    assert response.usage.input_tokens == usage["prompt_tokens"]
    assert response.usage.output_tokens == usage["completion_tokens"]
    assert response.usage.total_tokens == usage["total_tokens"]
    assert (response.metadata, response.user, response.instructions) == ({"purpose": "test"}, "someone", "be brief")
    assert [item.type for item in response.output] == ["message"]


def test_the_official_types_accept_a_response_and_each_event(server: LiveServer) -> None:
    asked = {"model": "tiny", "input": "hello", "max_output_tokens": 4, "tools": [], "reasoning": {"effort": "low"}}
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": False}
    whole = server.post("/v1/responses", **asked)
    Response.model_validate(whole.json(), strict=True)
    with server.client.stream("POST", "/v1/responses", json={**asked, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert len(names) == len(events) == len(lines) / 2
    assert [event["type"] for event in events] == names
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_a_stream_tells_the_response_in_openais_order(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hello world", "max_output_tokens": 30}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert without_repeats([event.type for event in events]) == [*TEXT_EVENTS, "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1].response
    assert "".join(deltas) == last.output_text == whole.output_text
    assert len(deltas) > 3
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.status == "in_progress"
    assert events[0].response.output == []
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}
    text_done = next(event for event in events if event.type == "response.output_text.done")
    assert text_done.text == whole.output_text


def test_an_answer_that_is_cut_off_is_incomplete_and_says_why(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hello world", "max_output_tokens": 3}
    *_, last = client.responses.create(**asked, stream=True)
    assert last.type == "response.incomplete"
    for response in (client.responses.create(**asked), last.response):
        assert (response.status, response.completed_at) == ("incomplete", None)
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"
        assert response.usage.output_tokens == 3


def test_log_probabilities_are_those_of_the_chat(server: LiveServer, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": "hello world è",
        "max_output_tokens": 20,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    chat = server.chat("hello world è", max_tokens=20, logprobs=True, top_logprobs=2).json()
    wanted = chat["choices"][0]["logprobs"]["content"]
    events = list(client.responses.create(**asked, stream=True))
    for response in (client.responses.create(**asked), events[-1].response):
        assert [entry.to_dict() for entry in response.output[0].content[0].logprobs] == wanted
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    told = [entry.to_dict() for event in deltas for entry in event.logprobs]
    assert [(entry["token"], entry["logprob"]) for entry in told] == [(e["token"], e["logprob"]) for e in wanted]
    assert client.responses.create(model="tiny", input="x", max_output_tokens=2).output[0].content[0].logprobs == []


def test_a_response_goes_on_from_an_earlier_one_without_its_instructions(
    server: LiveServer, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="tiny", instructions="be brief", input="hello", max_output_tokens=30)
    second = client.responses.create(
        model="tiny", instructions="sing", input="world", previous_response_id=first.id, max_output_tokens=30
    )
    third = client.responses.create(model="tiny", input="x", previous_response_id=second.id, max_output_tokens=5)
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "world"},
    ]
    text, usage = chat_of(server, [{"role": "system", "content": "sing"}, *history], max_tokens=30)
    assert (second.output_text, second.usage.input_tokens) == (text, usage["prompt_tokens"])
    assert second.previous_response_id == first.id
    whole = [*history, {"role": "assistant", "content": second.output_text}, {"role": "user", "content": "x"}]
    _, usage = chat_of(server, whole, max_tokens=5)
    assert third.usage.input_tokens == usage["prompt_tokens"]


def test_a_stored_response_is_retrieved_as_it_was_and_deleted(server: LiveServer, client: openai.OpenAI) -> None:
    *_, last = client.responses.create(model="tiny", input="hello", max_output_tokens=20, stream=True)
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=20)
    for response in (made, last.response):
        assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    client.responses.delete(made.id)
    assert server.client.delete(f"/v1/responses/{last.response.id}").json() == {
        "id": last.response.id,
        "object": "response",
        "deleted": True,
    }
    for lost in (made, last.response):
        with pytest.raises(openai.NotFoundError, match="may have been forgotten") as missing:
            client.responses.retrieve(lost.id)
        assert (missing.value.code, missing.value.param) == ("response_not_found", "id")
        with pytest.raises(openai.BadRequestError, match="Send the whole conversation") as gone:
            client.responses.create(model="tiny", input="x", previous_response_id=lost.id)
        assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")
    server.services.responses.check()


def test_a_response_that_is_not_to_be_stored_is_not(server: LiveServer, client: openai.OpenAI) -> None:
    kept = len(server.services.responses)
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=2, store=False)
    *_, last = client.responses.create(model="tiny", input="hello", max_output_tokens=2, store=False, stream=True)
    assert (made.to_dict()["store"], len(server.services.responses)) == (False, kept)
    for response in (made, last.response):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_the_input_of_a_response_is_listed_in_pages(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="before", max_output_tokens=2)
    asked = [{"role": "user", "content": str(number)} for number in range(5)]
    asked.append({"type": "function_call_output", "call_id": "c", "output": "out", "id": "fco_1"})
    made = client.responses.create(model="tiny", input=asked, previous_response_id=first.id, max_output_tokens=2)
    page = client.responses.input_items.list(made.id, limit=4)
    ResponseItemList.model_validate(page.to_dict())
    assert (page.data[0].id, page.data[0].output, page.has_more) == ("fco_1", "out", True)
    assert [item.content[0].text for item in page.data[1:]] == ["4", "3", "2"]
    assert [item.id for item in page] == [item.id for item in client.responses.input_items.list(made.id, limit=100)]
    oldest = client.responses.input_items.list(made.id, order="asc", limit=100)
    assert [item.type for item in oldest.data] == ["message"] * 5 + ["function_call_output"]
    after = client.responses.input_items.list(made.id, order="asc", after=oldest.data[4].id)
    assert [item.id for item in after.data] == ["fco_1"]
    assert after.has_more is False
    for query, param in (({"after": "nothing"}, "after"), ({"limit": 0}, "limit"), ({"order": "up"}, "order")):
        with pytest.raises(openai.BadRequestError) as wrong:
            client.responses.input_items.list(made.id, extra_query=query)
        assert wrong.value.param == param


def test_what_only_background_responses_can_do_is_refused(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="only a background response can be cancelled") as refused:
        client.responses.cancel(made.id)
    assert refused.value.param == "background"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_nobody")
    with pytest.raises(openai.BadRequestError, match="stream: only a background response"):
        client.responses.retrieve(made.id, extra_query={"stream": "true"})


def test_a_failure_is_an_error_and_within_a_stream_the_last_event(server: LiveServer, client: openai.OpenAI) -> None:
    kept = len(server.services.responses)
    with pytest.raises(openai.RateLimitError):
        client.responses.create(
            model="tiny", input="hello", stream=True, extra_body={"cache_salt": "refuse queue_full"}
        )
    broken = {"cache_salt": "fail engine_error"}
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="tiny", input="hello", extra_body=broken)
    *_, last = client.responses.create(model="tiny", input="hello", stream=True, extra_body=broken)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "as scripted")
    assert len(server.services.responses) == kept


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_response_and_leaves_nothing(server: LiveServer, stream: bool) -> None:
    kept = len(server.services.responses)
    content = json.dumps({"model": "tiny", "input": "hello", "stream": stream, "cache_salt": "hold"}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/responses HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(lambda: server.running() > 0)
        if stream:
            assert next(line for line in connection.makefile("rb") if line.startswith(b"event: response.created"))
    wait_until(lambda: server.running() == 0)
    assert len(server.services.responses) == kept
