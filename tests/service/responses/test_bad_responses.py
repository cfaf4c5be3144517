"""What a client can get wrong in a response, and what is not built: a 4xx that names the field."""

from typing import Any

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from service.openai.known_fields import IGNORED, REFUSED
from service.openai.schemas import ChatRequest
from service.responses.requests import UNBUILT
from service.responses.schemas import ResponsesRequest
from tests.service.live_server import LiveServer

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def test_every_field_of_the_official_client_is_built_refused_or_harmless() -> None:
    known = {name for kind in ResponseCreateParamsStreaming.__mro__ for name in getattr(kind, "__annotations__", ())}
    known |= set(ResponseCreateParamsStreaming.__annotations__)
    assert {"input", "stream", "truncation", "conversation"} <= known
    assert known - {*ResponsesRequest.__struct_fields__, *REFUSED, *IGNORED} == set()
    assert set(ChatRequest.__struct_fields__) - set(ResponsesRequest.__struct_fields__) == set()
    assert UNBUILT.keys() <= set(ResponsesRequest.__struct_fields__)


def refusal(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/responses", **{"model": "tiny", "input": "hello", **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("field", UNBUILT)
def test_what_is_not_built_is_refused_by_name_unless_it_asks_for_nothing(server: LiveServer, field: str) -> None:
    typed = {"max_tokens": 5, "n": 2, "response_format": {"type": "json_object"}}
    error = refusal(server, **{field: typed.get(field, ["something"])})
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert error["message"].startswith(f"{field} is not supported: ")
    for value in (None, *UNBUILT[field].harmless):
        sent = {"type": "text"} if field == "response_format" and value is not None else value
        response = server.post("/v1/responses", model="tiny", input="x", max_output_tokens=1, **{field: sent})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "invalid_field", "input"),
        ({"input": []}, "invalid_field", "input"),
        ({"input": [5]}, "invalid_field", "input[0]"),
        ({"input": [{"role": "user"}]}, "missing_field", "input[0].content"),
        ({"input": [{"role": "critic", "content": "x"}]}, "invalid_field", "input[0].role"),
        ({"input": [{"content": "x"}]}, "missing_field", "input[0].role"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "invalid_field", "input[0].type"),
        ({"input": [{"type": 5}]}, "invalid_field", "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "invalid_field",
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "missing_field", "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": "x"}, {**CALL, "arguments": "[1]"}]},
            "invalid_field",
            "input[1].arguments",
        ),
        ({"input": [{**CALL, "arguments": {}}]}, "invalid_field", "input[0].arguments"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "missing_field", "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "missing_field", "input[0].output"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_parameter", "input[0]"),
        ({"input": "hello" * 200}, "context_length_exceeded", "input"),
        ({"model": 5}, "invalid_field", "model"),
        ({"instructions": ["x"]}, "invalid_field", "instructions"),
        ({"max_output_tokens": 0}, "invalid_field", "max_output_tokens"),
        ({"max_output_tokens": 1000}, "context_length_exceeded", "max_output_tokens"),
        ({"temperature": 3}, "invalid_field", "temperature"),
        ({"top_p": 2}, "invalid_field", "top_p"),
        ({"min_tokens": 5, "max_output_tokens": 4}, "invalid_field", "min_tokens"),
        ({"top_logprobs": 21}, "invalid_field", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_field", "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "invalid_field", "include[0]"),
        ({"reasoning": "low"}, "invalid_field", "reasoning"),
        ({"reasoning": {"effort": 5}}, "invalid_field", "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "invalid_field", "reasoning.summary"),
        ({"input": [{"type": "reasoning", "content": [{"type": "x"}]}]}, "invalid_field", "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "content": [{"text": "x"}]}]}, "invalid_field", "input"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "invalid_field", "input[0].content"),
        ({"chat_template_kwargs": {"tools": []}}, "invalid_field", "chat_template_kwargs.tools"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"truncation": "middle"}, "invalid_field", "truncation"),
        ({"metadata": {"a": 5}}, "invalid_field", "metadata[...]"),
        ({"metadata": {"a": "x" * 513}}, "invalid_field", "metadata[...]"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "invalid_field", "metadata"),
        ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "invalid_field", "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "missing_field", "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "invalid_grammar",
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "invalid_field", "regex"),
        ({"tools": [{"type": "web_search"}]}, "invalid_field", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "missing_field", "tools[0].name"),
        ({"tools": [FUNCTION, FUNCTION]}, "invalid_field", "tools[1].name"),
        ({"tools": [{**FUNCTION, "name": "a b"}]}, "invalid_field", "tools[0].name"),
        ({"tool_choice": "required"}, "invalid_field", "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]}, "invalid_field", "tool_choice.name"),
        ({"tool_choice": {"type": "web_search"}}, "invalid_field", "tool_choice.type"),
        ({"previous_response_id": "resp_1"}, "previous_response_not_found", "previous_response_id"),
        ({"max_new_tokens": 5}, "unsupported_parameter", "max_new_tokens"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"alora": {"on_missing": "append"}}, "alora_not_applicable", "alora"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_refused_by_name(
    server: LiveServer, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    error = refusal(server, **fields, stream=stream)
    assert (error["code"], error["param"]) == (code, param)
    assert "messages" not in error["message"]
    assert "response_format" not in error["message"]
    assert "max_completion_tokens" not in error["message"]
    assert server.running() == 0


def test_an_unknown_model_is_not_found(server: LiveServer) -> None:
    response = server.post("/v1/responses", model="nobody", input="hello")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    response = server.post("/v1/responses", model="tiny", input="hello", lora_path="nobody")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_path")


def test_messages_say_what_is_expected_in_the_clients_own_words(server: LiveServer) -> None:
    message = refusal(server, input="hello" * 200, max_output_tokens=5)["message"]
    assert message.startswith("This model's maximum context length is 200 tokens. However, ")
    assert "5 of max_output_tokens were asked for" in message
    assert message.endswith("Please reduce the length of the input or max_output_tokens.")
    message = refusal(server, tools=[{"type": "file_search"}])["message"]
    assert message == "tools[0].type: Invalid enum value 'file_search', expected one of function"
    message = refusal(server, input=[{"type": "computer_call"}])["message"]
    assert message.endswith(
        "Invalid value 'computer_call', "
        "expected one of message, function_call, function_call_output, reasoning, item_reference"
    )
    part = {"type": "input_image", "image_url": "x"}
    message = refusal(server, input=[{"role": "user", "content": [part]}])["message"]
    assert message.endswith("Invalid value 'input_image', expected one of input_text, text, output_text, refusal")
    message = refusal(server, input=[{"type": "reasoning", "content": [part]}])["message"]
    assert message.endswith("Invalid value 'input_image', expected one of reasoning_text")
    broken = b'{"model": "tiny", "input": "x", "truncation": "middle", '
    error = server.client.post("/v1/responses", content=broken).json()["error"]
    assert error["message"].endswith("expected one of auto, disabled")


def test_fields_that_change_no_answer_are_taken(server: LiveServer) -> None:
    response = server.post(
        "/v1/responses",
        model="tiny",
        input="hello",
        max_output_tokens=2.0,
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        stream_options={"include_obfuscation": False},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        **dict.fromkeys(("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), "x"),
        max_tool_calls=5,
        prompt_cache_options={"mode": "implicit"},
        truncation="disabled",
        tool_choice="none",
        nobody_knows=[1],
    )
    assert (response.status_code, response.json()["usage"]["output_tokens"]) == (200, 2)
