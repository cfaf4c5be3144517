"""Responses of models that think, on the fake engine, whose answer is the prompt over again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent

from tests.openapi.contract_hook import HOOKS
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server

EVENT: pydantic.TypeAdapter = pydantic.TypeAdapter(ResponseStreamEvent)
# What the model would write comes from the prompt's last message
THINKS = "{# <think></think> #}{{ messages[-1].content }}"
SHOWS = (
    "{% for m in messages %}{{ m.role }}[{{ m.reasoning_content }}]{{ m.content }}{{ m.tool_calls or '' }};{% endfor %}"
)
TEXT = "<think>\nTwo and two, 🌟.\n</think>\n\nFour 🌟."
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = fake_settings(tiny_model, tmp_path_factory.mktemp("data"), allow_request_chat_template=True)
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    judged = httpx.Client(event_hooks=HOOKS)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, http_client=judged) as client:
        yield client


def asked(text: str = TEXT, **fields: Any) -> dict[str, Any]:
    """A request whose answer is the text."""
    return {"model": NAME, "input": f"{text}$", "stop": "$", "max_output_tokens": 90, "chat_template": THINKS, **fields}


def told(live: LiveServer, **body: Any) -> dict[str, Any]:
    """A response, the same whole and streamed."""
    whole = live.post("/v1/responses", **body)
    assert whole.status_code == 200, whole.text
    streamed: dict[str, Any] = events_of(live, **body)[-1]["response"]
    for response in (whole.json(), streamed):
        Response.model_validate(response, strict=True)
    assert parts(streamed) == parts(whole.json())
    assert streamed["usage"]["output_tokens_details"] == whole.json()["usage"]["output_tokens_details"]
    return streamed


def events_of(live: LiveServer, **body: Any) -> list[dict[str, Any]]:
    lines = live.post("/v1/responses", **body, stream=True).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def parts(response: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The kind, the text and the status of each item."""
    return [
        (
            item["type"],
            item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"],
            item["status"],
        )
        for item in response["output"]
    ]


def count(live: LiveServer, text: str) -> int:
    tokens: int = live.post("/tokenize", prompt=text).json()["count"]
    return tokens


def test_thoughts_are_an_item_before_the_message(live: LiveServer) -> None:
    response = told(live, **asked())
    assert parts(response) == [("reasoning", "Two and two, 🌟.", "completed"), ("message", "Four 🌟.", "completed")]
    assert response["output"][0]["summary"] == []
    assert response["status"] == "completed"
    for text in ("Four.", "<think>\n\n</think>\n\nFour."):
        assert parts(told(live, **asked(text))) == [("message", "Four.", "completed")]


def test_the_events_of_thoughts_are_those_of_the_official_types(live: LiveServer) -> None:
    events = [EVENT.validate_python(event, strict=True) for event in events_of(live, **asked())]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind] == EVENTS
    pieces = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert len(pieces) > 1
    [whole] = [event for event in events if event.type == "response.reasoning_text.done"]
    assert "".join(pieces) == whole.text == "Two and two, 🌟."
    parts = [event.part for event in events if event.type.startswith("response.content_part.")]
    assert [part.text for part in parts] == ["", "Two and two, 🌟.", "", "Four 🌟."]
    assert [part.type for part in parts] == ["reasoning_text"] * 2 + ["output_text"] * 2
    thoughts = [event for event in events if getattr(event, "output_index", None) == 0]
    ids = {getattr(event, "item_id", None) or event.item.id for event in thoughts}
    assert len(ids) == 1
    added = next(event for event in events if event.type == "response.output_item.added")
    assert (added.item.content, added.item.status) == ([], "in_progress")


def test_thoughts_that_were_cut_off_are_all_of_an_incomplete_response(live: LiveServer) -> None:
    response = told(live, **asked(max_output_tokens=12))
    assert parts(response) == [("reasoning", "Two ", "incomplete")]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    # thoughts that a stop string ends lead to no message
    assert parts(told(live, **asked("<think>a"))) == [("reasoning", "a", "completed")]


def test_thoughts_may_be_left_out_or_stay_in_the_text(live: LiveServer) -> None:
    left_out = told(live, **asked(include_reasoning=False))
    assert parts(left_out) == [("message", "Four 🌟.", "completed")]
    assert left_out["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert parts(told(live, **asked("<think>a", include_reasoning=False))) == [("message", "", "completed")]
    assert parts(told(live, **asked(separate_reasoning=False))) == [("message", TEXT, "completed")]


@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_thoughts_are_counted_in_responses_and_chats(live: LiveServer, stream: bool) -> None:
    for text, thoughts in (
        (TEXT, TEXT.partition("\n\n")[0]),
        ("\n<think>a</think>", "\n<think>a</think>"),
        ("\n Four", ""),
    ):
        counted = count(live, thoughts) if thoughts else 0
        usage = told(live, **asked(text))["usage"]
        assert usage["output_tokens_details"]["reasoning_tokens"] == counted
        fields = {"chat_template": THINKS, "stop": "$", "max_tokens": 90, "n": 2, "stream": stream}
        answer = live.chat(f"{text}$", **fields, stream_options={"include_usage": True})
        last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1] if stream else answer.text
        chat = json.loads(last.removeprefix("data: "))
        assert chat["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * counted}
        assert chat["usage"]["completion_tokens"] == 2 * usage["output_tokens"]


def test_thoughts_have_no_log_probabilities(live: LiveServer) -> None:
    body = asked(include=["message.output_text.logprobs"])
    message = told(live, **body)["output"][1]["content"][0]
    assert len(message["logprobs"]) == count(live, "\n\nFour 🌟.$")


def test_a_call_comes_after_thoughts(live: LiveServer) -> None:
    text = '<think><tool_call>{</think>\n<tool_call>{"name": "f", "arguments": {"x":1}}</tool_call>'
    body = asked(text, chat_template="{# tools tool_calls #}" + THINKS, tools=[{"type": "function", "name": "f"}])
    assert parts(told(live, **body)) == [
        ("reasoning", "<tool_call>{", "completed"),
        ("function_call", '{"x":1}', "completed"),
    ]


def test_the_client_gathers_a_stream_and_sends_its_items_back(live: LiveServer, client: openai.OpenAI) -> None:
    extra = {"chat_template": THINKS, "stop": "$"}
    text = "<think>ab</think>c$"
    with client.responses.stream(model=NAME, input=text, max_output_tokens=90, extra_body=extra) as stream:
        kinds = {event.type for event in stream}
        first = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= kinds
    assert [item.type for item in first.output] == ["reasoning", "message"]
    assert first.output_text == "c"
    asked_next: dict[str, Any] = {"model": NAME, "max_output_tokens": 90, "store": True}
    asked_next["extra_body"] = {"chat_template": SHOWS, "stop": ";user[]b"}
    shown = f"user[]{text};assistant[ab]c"
    sent = [{"role": "user", "content": text}, *first.output, {"role": "user", "content": "b"}]
    again = client.responses.create(input=sent, **asked_next)
    assert again.output_text == shown
    assert client.responses.create(input="b", previous_response_id=first.id, **asked_next).output_text == shown
    kept = client.responses.input_items.list(again.id, order="asc")
    ResponseItemList.model_validate(kept.to_dict(), strict=True)
    assert [item.type for item in kept.data] == ["message", "reasoning", "message", "message"]
    assert client.responses.retrieve(first.id).output[0] == first.output[0]


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def thinking(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "id": "rs",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
        **fields,
    }


@pytest.mark.parametrize(
    ("items", "shown"),
    [
        ([thinking("a"), {"role": "assistant", "content": "b"}], "assistant[a]b"),
        (
            [thinking("a"), {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
            "user[]b;assistant[]c",
        ),
        ([{"role": "assistant", "content": "b"}, thinking("a")], "assistant[]b"),
        (
            [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"role": "assistant", "content": "b"}],
            "assistant[]b",
        ),
        (
            [
                thinking("a", summary=[{"type": "summary_text", "text": "s"}], content=None),
                {"role": "assistant", "content": "b"},
            ],
            "assistant[s]b",
        ),
        ([thinking("a"), CALL], "assistant[a][{'id'"),
        ([thinking("a"), {"role": "assistant", "content": "b"}, CALL], "assistant[a]b[{'id'"),
        ([{"role": "assistant", "content": "b"}, thinking("a"), CALL], "assistant[]b;assistant[a][{'id'"),
    ],
)
def test_thoughts_of_the_input_belong_to_what_they_led_to(live: LiveServer, items: list[Any], shown: str) -> None:
    body = {"model": NAME, "input": items, "chat_template": SHOWS, "max_output_tokens": len(shown)}
    assert parts(live.post("/v1/responses", **body).json())[0][1] == shown


def test_effort_reaches_the_template_and_a_summary_may_be_asked_for(live: LiveServer) -> None:
    def answer(template: str, reasoning: Any, **fields: Any) -> dict[str, Any]:
        body = {"model": NAME, "input": "x", "chat_template": template, "max_output_tokens": 9, **fields}
        found: dict[str, Any] = live.post("/v1/responses", **body, reasoning=reasoning, stop=";").json()
        return found

    low = answer("{{ reasoning_effort }};", {"effort": "low", "summary": "detailed"})
    assert parts(low)[0][1] == "low"
    assert low["reasoning"] == {"effort": "low", "summary": "detailed", "generate_summary": None}
    switch = "{{ enable_thinking }};"
    assert parts(answer(switch, {"effort": "none"}))[0][1] == "False"
    assert parts(answer(switch, {"effort": "high"}))[0][1] == ""
    assert parts(answer(switch, {"effort": "none"}, chat_template_kwargs={"enable_thinking": True}))[0][1] == "True"
