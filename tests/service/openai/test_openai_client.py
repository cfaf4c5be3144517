"""The `openai` Python client, unchanged, against a service."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.openapi.contract_hook import HOOKS
from tests.service.live_server import LiveServer


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    judged = httpx.Client(event_hooks=HOOKS)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, http_client=judged) as client:
        yield client


def test_it_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rootstock"


def test_it_completes(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="tiny", prompt=["hello world", "hello"], max_tokens=2, n=2, seed=1, logprobs=1, extra_body={"top_k": 5}
    )
    assert [choice.text for choice in completion.choices] == ["hello world"] * 2 + ["hellohello"] * 2
    assert completion.choices[0].logprobs is not None
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None


def test_it_streams_a_completion(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="hello world", max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello worldhello"


def test_it_chats(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        stop=["\n"],
    )
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].logprobs is not None


def test_it_streams_a_chat_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "user\nhello"
    assert last.usage is not None
    assert last.usage.completion_tokens == 7


def test_its_exceptions_are_those_of_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="hello")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="hello", max_tokens=-1)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="hello", extra_body={"cache_salt": "refuse queue_full"})
    stream = client.completions.create(
        model="tiny", prompt="hello", stream=True, extra_body={"cache_salt": "fail engine_error"}
    )
    with pytest.raises(openai.APIError, match="as scripted"):
        list(stream)
