"""Answers of a given form over HTTP, by the real engine on a tiny model whose free text is noise."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.service.live_server import NAME, LiveServer, fake_settings, live_server
from tests.service.tiny_model import make_tokenizer, write_tiny_model

ENGINE = (sys.executable, "-m", "runtime.process")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["leaf", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
GROW = {"type": "function", "function": {"name": "grow", "parameters": TREE}}
STOP = {"type": "function", "function": {"name": "stop"}}
ANY = {"type": "function", "function": {"name": "any", "parameters": {}}}


def biases(**tokens: float) -> dict[str, float]:
    """A logit_bias by tokens of one character."""
    return {str(make_tokenizer().token_to_id(token)): bias for token, bias in tokens.items()}


# Random weights write for ever: what closes is made likely, and white space impossible.
ENDS = biases(**{'"': 4, "}": 4, "f": 4, "n": 6, "Ġ": -100, "Ċ": -100, "ĉ": -100, "č": -100})


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


def content_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
@pytest.mark.parametrize(
    "asked",
    [
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        lambda schema: {"structured_outputs": {"json": schema}},
        lambda schema: {"guided_json": schema},
        lambda schema: {"json_schema": json.dumps(schema)},
    ],
    ids=["openai", "vllm", "older vllm", "sglang"],
)
def test_every_dialect_of_a_schema_gives_an_answer_that_validates(
    server: LiveServer, asked: Any, schema: dict[str, Any], seed: int
) -> None:
    for response in (
        server.chat("hello", seed=seed, max_tokens=400, logit_bias=ENDS, **asked(schema)),
        server.complete("hello", seed=seed, max_tokens=400, logit_bias=ENDS, **asked(schema)),
    ):
        jsonschema.validate(json.loads(content_of(response)), schema)


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}}, "[ab]{3}-[0-9]{2}"),
        ({"guided_regex": "(yes|no)!"}, "(yes|no)!"),
        ({"regex": r"\d{4}"}, r"\d{4}"),
        ({"structured_outputs": {"choice": ["hello world", "è 🎉", 'say "no"\n\\']}}, None),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"ebnf": 'root ::= "cat" | "dog"'}, "cat|dog"),
        ({"guided_grammar": 'start: "cat" | "dog"'}, "cat|dog"),
    ],
)
def test_forms_other_than_schemas(server: LiveServer, asked: dict[str, Any], form: str | None) -> None:
    for seed in range(4):
        text = content_of(server.chat("hello", seed=seed, max_tokens=40, **asked))
        if form is None:
            assert text in asked["structured_outputs"]["choice"]
        else:
            assert re.fullmatch(form, text)


def test_any_json_object_and_a_form_beside_stop_strings_and_choices(server: LiveServer) -> None:
    response = server.chat("hello", n=4, seed=1, max_tokens=8, regex="[a-z]{3,6}", stop=["zz"])
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{0,6}", text) for text in texts)
    text = server.chat("hello", max_tokens=6, response_format={"type": "json_object"}).json()["choices"][0]["message"]
    assert text["content"].startswith("{")
    assert server.chat("hello", max_tokens=3, response_format={"type": "text"}).status_code == 200


def test_a_stream_has_the_text_of_the_whole_answer(server: LiveServer) -> None:
    asked = {"seed": 3, "max_tokens": 60, "regex": "[a-z]{5} [a-z]{5}"}
    whole = content_of(server.chat("hello", **asked))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chunks = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            seed=3,
            max_tokens=60,
            extra_body={"regex": asked["regex"]},
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "stop", "grow"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "stop"}}, {"stop"}),
        ({"type": "function", "function": {"name": "grow"}}, {"grow"}),
    ],
)
def test_forced_calls_follow_their_schemas_whole_and_streamed(
    server: LiveServer, choice: Any, names: set[str], seed: int
) -> None:
    tools = [WEATHER, STOP, GROW]
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in tools}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {
            "model": NAME,
            "messages": [{"role": "user", "content": "hello"}],
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "seed": seed,
            "max_tokens": 400,
            "logit_bias": ENDS,
        }
        answer = client.chat.completions.create(**asked).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        [call] = answer.message.tool_calls
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        name, arguments, ids, reasons = "", "", set(), set()
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta
            reasons.add(chunk.choices[0].finish_reason)
            assert not delta.content
            assert len(delta.tool_calls or ()) <= 1  # clients take two parts of one call in a chunk for two calls
            for part in delta.tool_calls or ():
                assert part.index == 0
                ids |= {part.id} - {None}
                name += part.function.name or ""
                arguments += part.function.arguments or ""
        assert (name, arguments) == (call.function.name, call.function.arguments)
        assert len(ids) == 1
        assert reasons == {None, "tool_calls"}
        with client.chat.completions.stream(**asked) as stream:
            [gathered] = stream.get_final_completion().choices[0].message.tool_calls
        assert gathered.function.arguments == call.function.arguments


def test_arguments_are_an_object_whatever_the_schema_leaves_open(server: LiveServer) -> None:
    for seed in range(4):
        asked = {"tools": [ANY], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        choice = server.chat("hello", **asked, max_tokens=300, logit_bias=ENDS).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")


def test_a_schema_that_is_nested_too_deeply_is_the_clients_fault(server: LiveServer) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    for fields in (
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [tool]},
        {"guided_json": deep},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
    ):
        response = server.chat("hello", max_tokens=1, **fields)
        assert response.status_code == 400, response.text


def test_several_forced_calls_come_in_order(server: LiveServer) -> None:
    """After a call a comma is likelier than the end."""
    asked = {"tools": [STOP], "tool_choice": "required", "max_tokens": 120, "temperature": 0}
    asked["logit_bias"] = ENDS | biases(**{",": 8})
    calls = server.chat("hello", **asked).json()["choices"][0]["message"]["tool_calls"]
    assert len(calls) > 1
    assert {call["function"]["name"] for call in calls} == {"stop"}
    assert len({call["id"] for call in calls}) == len(calls)
    alone = server.chat("hello", **asked, parallel_tool_calls=False).json()["choices"][0]
    assert len(alone["message"]["tool_calls"]) == 1


def test_tools_that_need_not_be_called_leave_text_as_it_is(server: LiveServer) -> None:
    for choice in ("auto", "none", None):
        message = server.chat("hello", tools=[WEATHER], tool_choice=choice, max_tokens=5, seed=1).json()["choices"][0][
            "message"
        ]
        assert "tool_calls" not in message
        assert message["content"]


def test_the_model_is_told_of_tools_and_of_earlier_calls(server: LiveServer) -> None:
    """The tiny model's chat template knows nothing of tools."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 1}'}}
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]

    def prompt_tokens(messages: list[dict[str, Any]], **more: Any) -> int:
        response = server.post("/v1/chat/completions", model=NAME, messages=messages, max_tokens=1, **more)
        assert response.status_code == 200, response.text
        tokens: int = response.json()["usage"]["prompt_tokens"]
        return tokens

    assert prompt_tokens(history) > prompt_tokens([history[0], {"role": "assistant", "content": ""}, history[2]]) + 40
    assert prompt_tokens(history[:1], tools=[WEATHER]) > prompt_tokens(history[:1]) + 100
    assert prompt_tokens(history[:1], tools=[WEATHER], tool_choice="none") == prompt_tokens(history[:1])


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "invalid_field", "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_field", "tools[0].function.name"),
        ({"tools": [{"type": "browser"}]}, "invalid_field", "tools[0].type"),
        ({"tool_choice": "required"}, "invalid_field", "tool_choice"),
        ({"tool_choice": "weather", "tools": [WEATHER]}, "invalid_field", "tool_choice"),
        (
            {"tools": [STOP], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "invalid_field",
            "tool_choice.function.name",
        ),
        ({"tools": [STOP], "tool_choice": "required", "regex": "a"}, "invalid_field", "regex"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "invalid_grammar",
            "tools",
        ),
    ],
)
def test_a_wrong_tool_is_refused_by_name(server: LiveServer, fields: dict[str, Any], code: str, param: str) -> None:
    response = server.chat("hello", **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages[0].content"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_history_that_cannot_be_used_is_named(server: LiveServer, message: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", model=NAME, messages=[message])
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
