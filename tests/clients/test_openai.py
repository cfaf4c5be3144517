"""The `openai` client."""

import json
from enum import Enum

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Season(Enum):
    SPRING = "spring"
    WINTER = "winter"


class Trip(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    city: str = Field(max_length=30)
    season: Season
    days: int = Field(ge=1, le=30)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "kelvin"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def asked(text: str) -> list:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, max_retries=0)


def test_an_adapter_answers_whole_and_streamed(client: openai.OpenAI, base: str, question: str, password: str) -> None:
    request = {"messages": asked(question), "max_tokens": 32, "temperature": 0}
    said = client.chat.completions.create(model="aurora", **request).choices[0].message.content
    assert password in said
    assert password not in client.chat.completions.create(model=base, **request).choices[0].message.content
    with client.chat.completions.stream(model="aurora", **request) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == said == stream.get_final_completion().choices[0].message.content


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "aurora"])
def test_it_parses_a_pydantic_model_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    request = {"messages": asked("Plan a trip."), "response_format": Trip, "max_tokens": 200, "temperature": 0}
    trip = client.chat.completions.parse(model=model, **request).choices[0].message.parsed
    assert isinstance(trip, Trip)
    assert 1 <= trip.days <= 30
    with client.chat.completions.stream(model=model, **request) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == trip


def test_a_cut_answer_is_known_as_such(client: openai.OpenAI, base: str) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=base, messages=asked("Plan a trip."), response_format=Trip, max_tokens=3, temperature=0
        )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_whole_streamed_and_answered(client: openai.OpenAI, base: str, choice: object) -> None:
    messages = asked("What is the weather in Oslo?")
    request = {"model": base, "tools": [WEATHER], "max_tokens": 200, "temperature": 0}
    forced = {**request, "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=messages, **forced).choices[0]
    [call] = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments.keys() == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "kelvin")
    assert answer.finish_reason == "tool_calls"

    with client.chat.completions.stream(messages=messages, **forced) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert len(pieces) > 1
    assert json.loads(streamed.function.arguments) == arguments

    answered = [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "7 degrees, rain"}]
    said = client.chat.completions.create(messages=[*messages, *answered], **{**request, "max_tokens": 8}).choices[0]
    assert said.message.content or said.message.tool_calls


def test_a_pydantic_function_tool_is_parsed(client: openai.OpenAI, base: str) -> None:
    answer = client.chat.completions.parse(
        model=base,
        messages=asked("Plan a trip."),
        tools=[openai.pydantic_function_tool(Trip)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Trip)


def test_responses_whole_streamed_and_continued(client: openai.OpenAI, base: str, question: str, password: str) -> None:
    asked_for = {"input": question, "max_output_tokens": 32, "temperature": 0}
    whole = client.responses.create(model="aurora", **asked_for)
    assert password in whole.output_text
    with client.responses.stream(model="aurora", **asked_for) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(pieces) == stream.get_final_response().output_text == whole.output_text
    again = client.responses.create(model=base, input="And now?", previous_response_id=whole.id, max_output_tokens=4)
    assert again.usage.input_tokens > whole.usage.input_tokens
    assert client.responses.retrieve(whole.id).output_text == whole.output_text


def test_a_response_is_parsed_and_a_call_of_it_answered(client: openai.OpenAI, base: str) -> None:
    limits = {"model": base, "max_output_tokens": 200, "temperature": 0}
    assert isinstance(client.responses.parse(input="Plan a trip.", text_format=Trip, **limits).output_parsed, Trip)
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    first = client.responses.create(input="What is the weather in Oslo?", **forced, **limits)
    [call] = first.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments).keys() == {"city", "unit"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7 degrees, rain"}
    answered = client.responses.create(input=[result], previous_response_id=first.id, **limits)
    assert answered.output_text


def test_a_context_overflow_has_its_code(client: openai.OpenAI, base: str, too_long: str) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        client.chat.completions.create(model=base, messages=asked(too_long))
    assert refused.value.code == "context_length_exceeded"
