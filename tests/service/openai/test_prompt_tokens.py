"""Which tokens a prompt becomes: special ones around it, and the last ones of one that is too long."""

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.tiny_model import SPECIAL, write_tiny_model

CHAT = [{"role": "user", "content": "hello world"}]
START = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its tokenizer puts a token before every text."""
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    file = str(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[START]} $A", special_tokens=[(SPECIAL[START], START)]
    )
    tokenizer.save(file)
    with live_server(fake_settings(model, tmp_path_factory.mktemp("data"))) as live:
        yield live


def prompt_of(server: LiveServer, **body: object) -> list[int]:
    answer = server.complete(body.pop("prompt", "hello world"), max_tokens=1, return_token_ids=True, **body)
    found: list[int] = answer.json()["choices"][0]["prompt_token_ids"]
    return found


def test_special_tokens_are_put_around_prompts_and_not_around_chats_unless_a_request_says_so(
    server: LiveServer,
) -> None:
    bare = server.post("/tokenize", prompt="hello world", add_special_tokens=False).json()["tokens"]
    assert bare[0] != START
    for given in ({}, {"add_special_tokens": True}):
        assert server.post("/tokenize", prompt="hello world", **given).json()["tokens"] == [START, *bare]
        assert prompt_of(server, **given) == [START, *bare]
    assert prompt_of(server, add_special_tokens=False) == bare
    assert prompt_of(server, prompt=bare, add_special_tokens=True) == bare  # token ids are taken as they are
    chats = [
        server.post("/tokenize", messages=CHAT, **given).json()["tokens"]
        for given in ({}, {"add_special_tokens": False}, {"add_special_tokens": True})
    ]
    assert chats[0] == chats[1] == chats[2][1:]
    assert chats[2][0] == START
    asked = {"messages": CHAT, "model": "tiny", "max_tokens": 1}
    counts = [
        server.post("/v1/chat/completions", add_special_tokens=given, **asked).json()["usage"]["prompt_tokens"]
        for given in (None, False, True)
    ]
    assert counts == [len(tokens) for tokens in chats]


def test_a_prompt_is_truncated_from_its_beginning(server: LiveServer) -> None:
    whole = prompt_of(server)
    for most in range(1, len(whole) + 2):
        assert prompt_of(server, truncate_prompt_tokens=most) == whole[-most:]
        found = server.post("/tokenize", prompt="hello world", truncate_prompt_tokens=most).json()
        assert found["tokens"] == whole[-most:]
    chat = server.post("/tokenize", messages=CHAT).json()["tokens"]
    assert server.post("/tokenize", messages=CHAT, truncate_prompt_tokens=5).json()["tokens"] == chat[-5:]
    answer = server.chat("hello world", truncate_prompt_tokens=5, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == 5


def test_a_prompt_that_is_too_long_is_truncated_to_what_leaves_room_for_the_answer(server: LiveServer) -> None:
    context, words = server.services.max_model_len, "hello world" * 200
    assert server.complete(words, max_tokens=7).json()["error"]["code"] == "context_length_exceeded"
    for most, kept in ((7, context - 7), (1, context - 1), (None, context - 1)):
        answer = server.complete(words, max_tokens=most, truncate_prompt_tokens=-1)
        assert answer.json()["usage"]["prompt_tokens"] == kept
    assert server.chat(words, max_tokens=9, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == context - 9


def test_a_prompt_that_fills_the_context_is_scored(server: LiveServer) -> None:
    context = server.services.max_model_len
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1}
    [choice] = server.complete([5] * context, **asked).json()["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == context
    refused = server.complete([5] * (context + 1), **asked).json()["error"]
    assert (refused["code"], refused["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_number_of_tokens_that_says_nothing_is_refused(server: LiveServer, path: str) -> None:
    text = {"prompt": "hello"} if path != "/v1/chat/completions" else {"messages": CHAT}
    for wrong in (0, -2):
        refused = server.post(path, model="tiny", truncate_prompt_tokens=wrong, **text)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_clients_are_told_what_they_need_to_tokenize_themselves(server: LiveServer) -> None:
    found = server.client.get("/tokenizer_info").json()
    assert found["eos_token"] == SPECIAL[2]
    assert found["bos_token"] is None
    assert found["model_max_length"] == server.services.max_model_len
    assert found["vocab_size"] == server.services.vocab_size
    assert found["chat_template"] == server.services.tokenizer.chat_templates["default"]
    assert "Tokenizer" in found["tokenizer_class"]
