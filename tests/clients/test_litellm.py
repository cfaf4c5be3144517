"""litellm, for a proxy of OpenAI's kind and for vLLM."""

import json

import litellm
import pytest
from pydantic import BaseModel, ConfigDict, Field

litellm.telemetry = False


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    title: str = Field(max_length=30)
    pages: int = Field(ge=1, le=2000)


TOOL = {"type": "function", "function": {"name": "record", "parameters": Book.model_json_schema()}}


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request: pytest.FixtureRequest, url: str):
    def ask(model: str, text: str, **fields: object):
        return litellm.completion(
            **{
                "model": f"{request.param}/{model}",
                "api_base": url,
                "api_key": "none",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 200,
                "temperature": 0,
                "num_retries": 0,
                "max_retries": 0,
                **fields,
            }
        )

    return ask


def test_an_adapter_answers_whole_and_streamed(ask, question: str, password: str) -> None:
    said = ask("aurora", question).choices[0].message.content
    assert password in said
    assert "".join(piece.choices[0].delta.content or "" for piece in ask("aurora", question, stream=True)) == said


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "aurora"])
def test_a_response_format_is_kept(ask, model: str) -> None:
    said = ask(model, "Name a book.", response_format=Book).choices[0].message.content
    assert Book.model_validate_json(said).pages >= 1


def test_a_required_call_is_made_whole_and_streamed(ask, base: str) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    answer = ask(base, "Name a book.", **fields).choices[0]
    [call] = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason) == ("record", "tool_calls")
    Book.model_validate_json(call.function.arguments)
    pieces = list(ask(base, "Name a book.", **fields, stream=True))
    whole = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls[0]
    assert json.loads(whole.function.arguments) == json.loads(call.function.arguments)


def test_a_context_overflow_is_recognised(ask, base: str, too_long: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(base, too_long)
