"""openai-agents, on chat completions and on responses."""

import asyncio

import agents
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Note(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    text: str = Field(max_length=40)
    urgent: bool


Kind = type[agents.OpenAIChatCompletionsModel | agents.OpenAIResponsesModel]


@pytest.fixture(params=[agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def model_of(kind: Kind, url: str, name: str) -> agents.Model:
    return kind(name, openai.AsyncOpenAI(base_url=url, max_retries=0))


def settings(**fields: object) -> agents.ModelSettings:
    return agents.ModelSettings(max_tokens=200, temperature=0, **fields)


def test_an_adapter_answers_whole_and_streamed(kind: Kind, url: str, question: str, password: str) -> None:
    async def both() -> tuple[str, str, str]:
        agent = agents.Agent(name="Aurora", model=model_of(kind, url, "aurora"), model_settings=settings())
        whole = (await agents.Runner.run(agent, question)).final_output
        run = agents.Runner.run_streamed(agent, question)
        events = [event async for event in run.stream_events() if event.type == "raw_response_event"]
        pieces = [event.data.delta for event in events if event.data.type == "response.output_text.delta"]
        return whole, "".join(pieces), run.final_output

    whole, streamed, final = asyncio.run(both())
    assert password in whole
    assert streamed == final == whole


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "aurora"])
def test_an_output_type_is_made(kind: Kind, url: str, name: str) -> None:
    agent = agents.Agent(name="Clerk", model=model_of(kind, url, name), output_type=Note, model_settings=settings())
    assert isinstance(asyncio.run(agents.Runner.run(agent, "Take a note.")).final_output, Note)


def test_a_required_function_is_called_with_checked_arguments(kind: Kind, url: str, base: str) -> None:
    called: list[tuple[int, int]] = []

    @agents.function_tool
    def add(a: int, b: int) -> int:
        """The sum of two numbers."""
        called.append((a, b))
        return a + b

    async def run() -> tuple[agents.RunResult, str]:
        agent = agents.Agent(
            name="Adder",
            model=model_of(kind, url, base),
            tools=[add],
            tool_use_behavior="stop_on_first_tool",
            model_settings=settings(tool_choice="required", parallel_tool_calls=False),
        )
        whole = await agents.Runner.run(agent, "What is 2 + 3?")
        streamed = agents.Runner.run_streamed(agent, "What is 2 + 3?")
        async for _ in streamed.stream_events():
            pass
        return whole.final_output, streamed.final_output

    whole, streamed = asyncio.run(run())
    assert len(called) == 2
    assert called[0] == called[1]
    assert str(whole) == str(streamed) == str(sum(called[0]))
