"""langchain-openai: ChatOpenAI."""

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field


class Meal(BaseModel):
    """A meal."""

    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    dish: str = Field(max_length=30)
    minutes: int = Field(ge=1, le=240)


@tool
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, model=model, temperature=0, max_tokens=200, max_retries=0)


def test_an_adapter_answers_whole_and_streamed(url: str, question: str, password: str) -> None:
    said = chat(url, "aurora").invoke(question)
    assert password in said.content
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(piece.content for piece in chat(url, "aurora").stream(question)) == said.content


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "aurora"])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_a_model(url: str, model: str, method: str) -> None:
    made = chat(url, model).with_structured_output(Meal, method=method).invoke("What is for dinner?")
    assert isinstance(made, Meal)
    assert 1 <= made.minutes <= 240


def test_json_mode_is_an_object(url: str, base: str) -> None:
    made = chat(url, base).with_structured_output(None, method="json_mode", include_raw=True)
    said = made.invoke('Write {"a": 1} as JSON.')
    assert said["raw"].content.lstrip().startswith("{")


def test_a_required_call_is_made_whole_and_streamed_and_answered(url: str, base: str) -> None:
    model = chat(url, base).bind_tools([add], tool_choice="any", parallel_tool_calls=False)
    asked = HumanMessage("What is 2 + 3?")
    said = model.invoke([asked])
    [call] = said.tool_calls
    assert call["name"] == "add"
    assert {key: type(value) for key, value in call["args"].items()} == {"a": int, "b": int}
    pieces = list(model.stream([asked]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [each["args"] for each in whole.tool_calls] == [call["args"]]
    answered = ToolMessage(str(add.invoke(call["args"])), tool_call_id=call["id"])
    assert chat(url, base).bind(max_tokens=8).invoke([asked, said, answered]).content


def test_a_context_overflow_is_recognised(url: str, base: str, too_long: str) -> None:
    with pytest.raises(ContextOverflowError):
        chat(url, base).invoke(too_long)
