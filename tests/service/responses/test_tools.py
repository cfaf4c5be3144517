"""Responses of a given form and with tools, by the real engine on a tiny model whose free text is noise."""

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from runtime.messages import TokenLogprobs
from service.openai.chat import Chat
from service.openai.generation import Delta
from service.openai.models import Adapters
from service.openai.schemas import ChatRequest, Function, Message, Tool
from service.responses.output import Output
from service.tool_calls.syntax import SYNTAXES
from tests.openapi.contract_hook import HOOKS
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server
from tests.service.tiny_model import make_tokenizer, write_tiny_model

ENGINE = (sys.executable, "-m", "runtime.process")
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
STOP: dict[str, Any] = {"type": "function", "name": "stop", "parameters": None, "strict": None}
# Random weights write for ever: what closes is made likely, and white space impossible.
WEIGHTS = {'"': 4, "}": 4, "f": 4, "n": 6, "Ġ": -100, "Ċ": -100, "ĉ": -100, "č": -100}
ENDS = {str(make_tokenizer().token_to_id(token)): bias for token, bias in WEIGHTS.items()}
COMMA = {str(make_tokenizer().token_to_id(",")): 8}
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    sex: Literal["f", "m"]
    age: int = pydantic.Field(ge=0, le=150)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    options = {
        "load_format": "dummy",
        "kv_cache_bytes": 4 << 20,
        "adapter_bytes": 1 << 20,
        "host_adapter_bytes": 1 << 20,
    }
    settings = fake_settings(model, tmp_path_factory.mktemp("data"), engine_command=ENGINE, **options)
    with live_server(settings) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    judged = httpx.Client(event_hooks=HOOKS)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, http_client=judged) as client:
        yield client


def prompt_tokens(server: LiveServer, messages: list[dict[str, Any]], **fields: Any) -> int:
    """Of a chat."""
    chat = server.post("/v1/chat/completions", model=NAME, messages=messages, max_tokens=1, **fields)
    tokens: int = chat.json()["usage"]["prompt_tokens"]
    return tokens


def without_repeats(kinds: list[str]) -> list[str]:
    return [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]


@pytest.mark.parametrize("seed", range(3))
def test_it_parses_an_answer_into_a_model(client: openai.OpenAI, seed: int) -> None:
    extra = {"seed": seed, "logit_bias": ENDS}
    parsed = client.responses.parse(
        model=NAME, input="hello", text_format=Person, max_output_tokens=400, extra_body=extra
    )
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Person)
    assert json.loads(parsed.output_text) == parsed.output_parsed.model_dump()
    assert parsed.text.to_dict()["format"]["schema"] == Person.model_json_schema()
    with client.responses.stream(
        model=NAME, input="hello", text_format=Person, max_output_tokens=400, extra_body=extra
    ) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_any_json_object_and_the_forms_of_other_servers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "hello", "max_output_tokens": 6}
    assert client.responses.create(**asked, text={"format": {"type": "json_object"}}).output_text.startswith("{")
    text = client.responses.create(**asked, extra_body={"regex": "[ab]{3}", "seed": 1}).output_text
    assert text.strip("ab") == ""
    assert len(text) == 3


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call_follows_its_schema_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        asked: dict[str, Any] = {
            "model": NAME,
            "input": "hello",
            "tools": [WEATHER],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "max_output_tokens": 400,
            "extra_body": {"seed": seed, "logit_bias": ENDS},
        }
        response = client.responses.create(**asked)
        [call] = response.output
        assert (response.status, call.type, call.name, call.status) == (
            "completed",
            "function_call",
            "weather",
            "completed",
        )
        jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
        assert [tool.to_dict() for tool in response.tools] == [WEATHER]
        assert response.parallel_tool_calls is False
        first, second, *middle, last = client.responses.create(**asked, stream=True)
        assert [first.type, second.type, last.type] == [
            "response.created",
            "response.in_progress",
            "response.completed",
        ]
        assert without_repeats([event.type for event in middle]) == CALL_EVENTS
        deltas = [event.delta for event in middle if event.type == "response.function_call_arguments.delta"]
        assert len(deltas) > 1
        assert "".join(deltas) == call.arguments == last.response.output[0].arguments
        assert (middle[0].item.arguments, middle[0].item.status) == ("", "in_progress")
        assert middle[0].item.call_id == last.response.output[0].call_id
        assert middle[-1].item == last.response.output[0]


def test_several_calls_are_items_of_their_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": NAME,
        "input": "hello",
        "tools": [STOP],
        "tool_choice": "required",
        "temperature": 0,
        "max_output_tokens": 120,
        "extra_body": {"logit_bias": ENDS | COMMA},
    }
    *_, last = client.responses.create(**asked, stream=True)
    assert last.type == "response.incomplete"
    calls = [item for item in last.response.output if item.type == "function_call"]
    assert len(calls) > 1
    assert {call.name for call in calls} == {"stop"}
    assert len({call.id for call in calls}) == len({call.call_id for call in calls}) == len(calls)
    assert {call.status for call in calls[:-1]} == {"completed"}
    assert len(client.responses.create(**asked, parallel_tool_calls=False).output) == 1


def test_a_loop_of_tools_gives_the_prompt_of_the_chat_with_the_same_messages(
    server: LiveServer, client: openai.OpenAI
) -> None:
    """By the earlier response's id, and by sending its output back."""
    asked: dict[str, Any] = {"model": NAME, "tools": [WEATHER], "max_output_tokens": 400}
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "extra_body": {"seed": 1, "logit_bias": ENDS}}
    first = client.responses.create(**asked, **forced, input="hello")
    [call] = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    asked["max_output_tokens"] = 1
    by_id = client.responses.create(**asked, input=[output], previous_response_id=first.id)
    sent = client.responses.create(**asked, input=[{"role": "user", "content": "hello"}, *first.output, output])
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]
    named = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    wanted = prompt_tokens(server, messages, tools=[{"type": "function", "function": named}])
    assert by_id.usage.input_tokens == sent.usage.input_tokens == wanted
    assert wanted > prompt_tokens(server, messages)


def test_a_call_that_was_cut_off_is_no_conversation_to_go_on_from(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "tools": [WEATHER], "max_output_tokens": 40}
    begun = len('[{"name":"weather","arguments":{"city":"B')  # a token is a character or two
    cut = client.responses.create(
        **{**asked, "max_output_tokens": begun},
        input="x",
        tool_choice="required",
        extra_body={"seed": 1, "logit_bias": ENDS},
    )
    assert (cut.status, cut.output[-1].type, cut.output[-1].status) == ("incomplete", "function_call", "incomplete")
    with pytest.raises(openai.BadRequestError, match="no JSON object") as refused:
        client.responses.create(**asked, input="go on", previous_response_id=cut.id)
    assert refused.value.param == "previous_response_id"


def test_what_tools_and_forms_exclude_is_refused_by_name(client: openai.OpenAI) -> None:
    impossible = {**WEATHER, "parameters": {"not": {}}}
    for fields, code, param in (
        ({"text": {"format": {"type": "json_object"}}, "tools": [WEATHER]}, "invalid_field", "text.format"),
        ({"tools": [impossible]}, "invalid_grammar", "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=NAME, input="x", tool_choice="required", extra_body=fields)
        assert (refused.value.code, refused.value.param) == (code, param)


def output_of(server: LiveServer, *texts: str, several: bool = True) -> tuple[Output, list[Any]]:
    """The output and the events of an answer that comes in these pieces, one token each, with log-probabilities."""
    tool = Tool(type="function", function=Function(name="f"))
    chat = ChatRequest(
        model=NAME,
        messages=[Message(role="user", content="x")],
        tools=[tool],
        parallel_tool_calls=several,
        logprobs=True,
    )
    answering = Chat(server.services, chat)
    asyncio.run(answering.inputs(Adapters((None,))))
    output = Output(answering)
    events = []
    for index, text in enumerate(texts):
        reason = "stop" if index == len(texts) - 1 else None
        entry = TokenLogprobs(-float(index), [], [])
        events += list(output.push(Delta(0, text, [5], [entry], reason)))  # type: ignore[arg-type]
    return output, events


def test_text_and_calls_are_items_in_the_order_in_which_they_were_written(server: LiveServer) -> None:
    begin, end, _ = SYNTAXES["hermes"]
    call = f'{begin}{{"name": "f", "arguments": {{"x": 1}}}}{end}'
    for pieces in (["before", call, "after"], list(f"before{call}after"), [f"before{call}after"]):
        output, events = output_of(server, *pieces)
        shown = [getattr(item, "arguments", None) or item.content[0].text for item in output.items]
        assert shown == ["before", '{"x": 1}', "after"]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        added = [event for event in events if event.type == "response.output_item.added"]
        done = [event for event in events if event.type == "response.output_item.done"]
        assert [event.output_index for event in added] == [event.output_index for event in done] == [0, 1, 2]
        assert [event.item.id for event in added] == [event.item.id for event in done]
    output, _ = output_of(server, call, "\n", call, several=False)
    assert len(output.items) == 1


def test_the_log_probabilities_of_a_call_belong_to_no_text(server: LiveServer) -> None:
    begin, end, _ = SYNTAXES["hermes"]
    output, events = output_of(server, "be", "fore", begin, '{"name": "f", "arguments": {', "}}", end, "after", "")
    told = [(item.content[0].text, [entry.logprob for entry in item.content[0].logprobs]) for item in output.items[::2]]
    assert told[0] == ("before", [0.0, -1.0])
    assert told[1][0] == "after"
    assert told[1][1][-2:] == [-6.0, -7.0]
    assert not {-2.0, -3.0, -4.0} & set(told[1][1])
    added = next(event for event in events if event.type == "response.content_part.added")
    assert (added.part.text, added.part.logprobs) == ("", [])


def test_an_answer_of_nothing_is_a_message_without_text(server: LiveServer) -> None:
    output, events = output_of(server, "")
    assert [item.content[0].text for item in output.items] == [""]
    assert [event.type for event in events] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_items_of_every_kind_become_the_messages_of_a_chat(server: LiveServer, client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=NAME,
        max_output_tokens=2,
        store=False,
        input=[
            {"role": "developer", "content": "be good"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "calling", "annotations": []},
                    {"type": "refusal", "refusal": "not twice"},
                ],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
            {"type": None, "role": "user", "content": "b"},
        ],
    )
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]
    messages = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "calling\nnot twice", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "user", "content": "b"},
    ]
    assert response.usage.input_tokens == prompt_tokens(server, messages)
    alone = client.responses.create(
        model=NAME,
        max_output_tokens=1,
        input=[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}],
    )
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert alone.usage.input_tokens == prompt_tokens(server, [{"role": "assistant", "tool_calls": [call]}])
