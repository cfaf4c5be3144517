"""Stop strings that are one special token, on an engine that repeats the prompt."""

import pytest

from tests.service.live_server import LiveServer


@pytest.fixture
def special(server: LiveServer) -> str:
    """A special token that does not end a text by itself."""
    tokenizer = server.services.tokenizer
    return next(
        text
        for text in map(tokenizer.shown, ([token_id] for token_id in range(tokenizer.encode("hello")[0])))
        if tokenizer.is_special(text) and tokenizer.encode_all([text], add_special_tokens=False) != [[2]]
    )


def test_a_special_token_as_a_stop_string_ends_the_text_that_does_not_show_it(server: LiveServer, special: str) -> None:
    ends = server.complete(f"hello{special} world", max_tokens=9, stop=special).json()
    [choice] = ends["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
    assert ends["usage"]["completion_tokens"] == 2
    [goes_on] = server.complete(f"hello{special} world", max_tokens=3).json()["choices"]
    assert (goes_on["text"], goes_on["finish_reason"]) == ("hello world", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_shown_if_the_stop_string_is_to_be_included(server: LiveServer, special: str, stream: bool) -> None:
    asked = {"max_tokens": 9, "stop": ["zzz", special], "include_stop_str_in_output": True, "stream": stream}
    response = server.complete(f"hello{special} world", **asked)
    if stream:
        assert special in response.text
        assert "world" not in response.text
    else:
        assert response.json()["choices"][0]["text"] == f"hello{special}"


def test_a_stop_token_that_is_no_stop_string_is_never_shown(server: LiveServer, special: str) -> None:
    [token_id] = server.services.tokenizer.encode_all([special], add_special_tokens=False)[0]
    asked = {"max_tokens": 9, "stop_token_ids": [token_id], "include_stop_str_in_output": True}
    assert server.complete(f"hello{special} world", **asked).json()["choices"][0]["text"] == "hello"
