"""Clients that read a model's thoughts, on chat completions and on responses; the model copies those of its prompt."""

import asyncio
from collections.abc import Iterator

import agents
import openai
import pydantic_ai
import pytest
from conftest import started
from langchain_openai import ChatOpenAI
from pydantic_ai.messages import TextPart, ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

EXAMPLE = "Q: What is two and two?\nA: <think>Count to four.</think>Four\n"
TEMPLATE = EXAMPLE * 6 + "Q: What is two and two?\nA:{# <think></think> {{ messages }} #}"
THOUGHTS, ANSWER = "Count to four.", "Four"
STOP = {"stop": ["\n"]}
QUESTION = "What is two and two?"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data = tmp_path_factory.mktemp("data")
    (data / "template.jinja").write_text(TEMPLATE)
    with started(data, "--chat-template", str(data / "template.jinja")) as address:
        yield f"{address}/v1"


def test_openai_has_them_whole_streamed_and_sent_back(thinking: str, base: str) -> None:
    client = openai.OpenAI(base_url=thinking, max_retries=0)
    asked = {"model": base, "max_output_tokens": 32, "temperature": 0, "extra_body": STOP}
    whole = client.responses.create(input=QUESTION, **asked)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert (whole.output[0].content[0].text, whole.output_text.strip()) == (THOUGHTS, ANSWER)
    assert whole.usage.output_tokens > whole.usage.output_tokens_details.reasoning_tokens > 3
    with client.responses.stream(input=QUESTION, **asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
        assert "".join(pieces) == stream.get_final_response().output[0].content[0].text == THOUGHTS
    history = [{"role": "user", "content": QUESTION}, *whole.output, {"role": "user", "content": QUESTION}]
    assert client.responses.create(input=history, **asked).output_text == whole.output_text
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(
        model=base, messages=messages, max_tokens=32, temperature=0, **{"extra_body": STOP}
    )
    assert chat.choices[0].message.reasoning_content == THOUGHTS
    details = chat.usage.completion_tokens_details
    assert details.reasoning_tokens == whole.usage.output_tokens_details.reasoning_tokens


@pytest.mark.parametrize("kind", [agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel])
def test_agents_have_an_item_of_them_and_go_on(kind: type[agents.Model], thinking: str, base: str) -> None:
    async def run() -> list[list[str]]:
        model = kind(base, openai.AsyncOpenAI(base_url=thinking, max_retries=0))
        settings = agents.ModelSettings(max_tokens=32, temperature=0, extra_body=STOP)
        agent = agents.Agent(name="Thinker", model=model, model_settings=settings)
        whole = await agents.Runner.run(agent, QUESTION)
        streamed = agents.Runner.run_streamed(agent, [*whole.to_input_list(), {"role": "user", "content": QUESTION}])
        kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
        assert "response.reasoning_text.delta" in kinds
        assert whole.final_output.strip() == streamed.final_output.strip() == ANSWER
        return [[item.type for item in result.new_items] for result in (whole, streamed)]

    assert asyncio.run(run()) == [["reasoning_item", "message_output_item"]] * 2


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_pydantic_ai_has_a_part_of_them_and_goes_on(
    kind: type[OpenAIChatModel | OpenAIResponsesModel], thinking: str, base: str
) -> None:
    async def run() -> None:
        model = kind(base, provider=OpenAIProvider(base_url=thinking, api_key="none"))
        settings = {"max_tokens": 32, "temperature": 0, "extra_body": STOP}
        agent = pydantic_ai.Agent(model, model_settings=settings)
        whole = await agent.run(QUESTION)
        again = await agent.run(QUESTION, message_history=whole.all_messages())
        for result in (whole, again):
            thoughts, text = result.all_messages()[-1].parts
            assert isinstance(thoughts, ThinkingPart)
            assert isinstance(text, TextPart)
            assert text.content.strip() == ANSWER

    asyncio.run(run())


def test_langchain_has_a_block_of_them(thinking: str, base: str) -> None:
    model = ChatOpenAI(
        model=base,
        base_url=thinking,
        use_responses_api=True,
        output_version="responses/v1",
        max_tokens=32,
        temperature=0,
        extra_body=STOP,
        max_retries=0,
    )
    said = model.invoke(QUESTION)
    assert [block["type"] for block in said.content] == ["reasoning", "text"]
    assert model.invoke([("user", QUESTION), said, ("user", QUESTION)]).content[1]["text"].strip() == ANSWER
