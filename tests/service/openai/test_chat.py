"""POST /v1/chat/completions, on an engine that repeats the prompt."""

import json

import pytest

from tests.service.live_server import LiveServer

PROMPT = "<|start|>user\nhello<|end|>\n<|start|>assistant\n"


def chunks(text: str) -> list[dict]:
    *found, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in found]


def test_a_chat_goes_through_the_models_own_template(server: LiveServer) -> None:
    expected = server.services.tokenizer.encode(PROMPT)
    body = server.chat("hello", max_tokens=len(expected) - 5, stop_token_ids=[], ignore_eos=False).json()
    assert body["usage"]["prompt_tokens"] == len(expected)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "user\nhello", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    [endless] = server.chat("hello", max_tokens=len(expected) - 5, ignore_eos=True).json()["choices"]
    assert (endless["message"]["content"], endless["finish_reason"]) == ("user\nhello\nassis", "length")


def test_the_answer_may_fill_the_rest_of_the_context_by_default(server: LiveServer) -> None:
    body = server.post("/v1/chat/completions", model="tiny", messages=[{"role": "system", "content": "x"}]).json()
    prompt = body["usage"]["prompt_tokens"]
    assert prompt < 30
    assert body["choices"][0]["finish_reason"] == "stop"
    limited = server.chat("hello", max_completion_tokens=3).json()
    assert limited["usage"]["completion_tokens"] == 3
    assert limited["choices"][0]["finish_reason"] == "length"


def test_content_may_come_in_parts(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    in_parts = server.chat(parts, max_tokens=20).json()["choices"][0]["message"]
    assert in_parts == server.chat("hello\nworld", max_tokens=20).json()["choices"][0]["message"]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(server: LiveServer) -> None:
    parsed = chunks(server.chat("hello", max_tokens=7, stream=True, stream_options={"include_usage": True}).text)
    *deltas, usage = parsed
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"].get("role") for chunk in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in deltas) == "user\nhello"
    assert deltas[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7


def test_every_streamed_choice_begins_with_the_role(server: LiveServer) -> None:
    parsed = chunks(server.chat("hello", max_tokens=4, n=3, stream=True).text)
    begun = [chunk["choices"][0]["index"] for chunk in parsed if "role" in chunk["choices"][0]["delta"]]
    assert sorted(begun) == [0, 1, 2]


def test_log_probabilities_have_openais_shape(server: LiveServer) -> None:
    body = server.chat("€", max_tokens=8, logprobs=True, top_logprobs=1).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert content[1] == {
        "token": "u",
        "logprob": -0.5,
        "bytes": [117],
        "top_logprobs": [{"token": "u", "logprob": -0.5, "bytes": [117]}],
    }
    assert content[6]["bytes"] + content[7]["bytes"] == list("€".encode()[:2]), "two thirds of a euro sign"


def test_log_probabilities_always_have_the_sampled_token(server: LiveServer) -> None:
    """Also where it is not among the likeliest, and where tokens share a text because they are parts of characters."""
    for name in ("🌟🎉😀", "hello"):
        whole = server.complete(name, max_tokens=8, logprobs=1).json()["choices"][0]["logprobs"]
        for token, logprob, top in zip(whole["tokens"], whole["token_logprobs"], whole["top_logprobs"], strict=True):
            assert top[token] == logprob
    named = server.complete("hello", max_tokens=2, logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]
    assert all(token.startswith("token_id:") for token in named["logprobs"]["tokens"])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "critic", "content": "hm"}, "messages"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_a_message_that_cannot_be_used_is_named(server: LiveServer, message: dict, param: str) -> None:
    response = server.post("/v1/chat/completions", model="tiny", messages=[message])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_templates_own_complaint_reaches_the_client(server: LiveServer) -> None:
    response = server.post("/v1/chat/completions", model="tiny", messages=[{"role": "critic", "content": "hm"}])
    assert "critics are not heard" in response.json()["error"]["message"]


def test_a_conversation_needs_a_message(server: LiveServer) -> None:
    response = server.post("/v1/chat/completions", model="tiny", messages=[])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_a_length_beyond_the_context_is_blamed_on_the_field_that_asked(server: LiveServer) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        error = server.chat("hello", **{field: 1_000_000}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
        assert f"of {field}" in error["message"]
