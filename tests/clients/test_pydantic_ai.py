"""pydantic-ai: agents on a chat model, with native, tool and text output."""

import asyncio

import pytest
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=100_000_000)


SETTINGS = {"max_tokens": 200, "temperature": 0.0}


def model_of(url: str, name: str) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=url, api_key="none"))


def test_an_adapter_answers_whole_and_streamed(url: str, question: str, password: str) -> None:
    agent = Agent(model_of(url, "aurora"), model_settings=SETTINGS)

    async def both() -> tuple[str, str]:
        whole = (await agent.run(question)).output
        async with agent.run_stream(question) as stream:
            return whole, "".join([piece async for piece in stream.stream_text(delta=True, debounce_by=None)])

    whole, streamed = asyncio.run(both())
    assert password in whole
    assert streamed == whole


@pytest.mark.parametrize("output", [NativeOutput, ToolOutput])
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "aurora"])
def test_an_output_type_is_made(url: str, name: str, output: type) -> None:
    """As a schema of the answer, or as the one tool that has to be called."""
    agent = Agent(model_of(url, name), output_type=output(City), model_settings=SETTINGS, retries=0)

    async def both() -> tuple[City, City]:
        whole = (await agent.run("The largest city?")).output
        async with agent.run_stream("The largest city?") as stream:
            return whole, await stream.get_output()

    whole, streamed = asyncio.run(both())
    assert isinstance(whole, City)
    assert streamed == whole


def test_a_context_overflow_is_a_400_with_our_words(url: str, base: str, too_long: str) -> None:
    with pytest.raises(ModelHTTPError, match="context_length_exceeded") as refused:
        asyncio.run(Agent(model_of(url, base), model_settings=SETTINGS).run(too_long))
    assert refused.value.status_code == 400
