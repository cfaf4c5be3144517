"""Token ids of prompts and chats over HTTP, and back."""

import pytest

from tests.service.live_server import NAME, LiveServer

CHAT = [{"role": "user", "content": "hello world 🌟"}]


def test_tokens_are_those_that_a_request_would_have(server: LiveServer) -> None:
    found = server.post("/tokenize", model=NAME, prompt="hello world", return_token_strs=True).json()
    assert found["tokens"] == server.services.tokenizer.encode("hello world")
    assert (found["count"], found["token_strs"]) == (2, ["hello", " world"])
    assert found["max_model_len"] == server.services.max_model_len
    chat = server.post("/tokenize", messages=CHAT).json()
    answered = server.post("/v1/chat/completions", model=NAME, messages=CHAT, max_tokens=1).json()
    assert chat["count"] == answered["usage"]["prompt_tokens"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert server.post("/tokenize", messages=CHAT, tools=tools).json()["count"] > chat["count"]
    short = server.post("/tokenize", messages=CHAT, add_generation_prompt=False).json()
    assert short["tokens"] == server.post("/tokenize", messages=CHAT).json()["tokens"][: short["count"]]


def test_text_comes_back_as_it_was(server: LiveServer) -> None:
    text = "hello world 🌟<|end|>\n"
    tokens = server.post("/tokenize", prompt=text).json()["tokens"]
    assert server.post("/detokenize", model=NAME, tokens=tokens).json() == {"prompt": text}
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    server: LiveServer, path: str, body: dict[str, object], status: int, param: str
) -> None:
    response = server.post(path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
