"""POST /v1/completions, on an engine that repeats the prompt."""

import json

import pytest

from tests.service.live_server import LiveServer


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line]


def chunks(text: str) -> list[dict]:
    *found, done = events(text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in found]


def test_a_completion_is_the_engines_tokens_as_text(server: LiveServer) -> None:
    response = server.complete("hello world", max_tokens=4)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {"index": 0, "text": "hello worldhello world", "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_are_the_default_and_no_more_than_the_context_holds(server: LiveServer) -> None:
    assert server.complete("hello world").json()["usage"]["completion_tokens"] == 16
    assert server.complete([5] * 190).json()["usage"]["completion_tokens"] == 10


def test_a_streamed_completion_is_the_whole_one_in_pieces(server: LiveServer) -> None:
    response = server.complete("hello wörld", max_tokens=9, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    parsed = chunks(response.text)
    whole = server.complete("hello wörld", max_tokens=9).json()["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in parsed) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None] * (len(parsed) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in parsed)
    assert len({chunk["id"] for chunk in parsed}) == 1


def test_the_usage_of_a_stream_comes_last_and_without_choices_when_asked_for(server: LiveServer) -> None:
    parsed = chunks(server.complete("hello", max_tokens=3, stream=True, stream_options={"include_usage": True}).text)
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    assert not any("usage" in chunk for chunk in parsed[:-1])


@pytest.mark.parametrize("prompt", ["hello world", ["hello world"], [267, 271], [[267, 271]]])
def test_a_prompt_may_be_text_or_token_ids_alone_or_in_a_list(server: LiveServer, prompt: object) -> None:
    ids = server.services.tokenizer.encode("hello world")
    given = json.loads(json.dumps(prompt).replace("267, 271", f"{ids[0]}, {ids[1]}"))
    assert server.complete(given, max_tokens=2).json()["choices"][0]["text"] == "hello world"


def test_each_prompt_gets_its_choices_in_order(server: LiveServer) -> None:
    body = server.complete(["hello", " world"], max_tokens=1, n=2).json()
    found = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert found == [(0, "hello"), (1, "hello"), (2, " world"), (3, " world")]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 4


def test_more_choices_wait_until_the_first_has_computed_the_prompt(server: LiveServer) -> None:
    """The fake engine refuses a further choice of a prompt that it has not computed yet."""
    body = server.complete("a prompt of many tokens, new to this engine", max_tokens=3, n=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4]
    assert len({choice["text"] for choice in body["choices"]}) == 1


def test_a_stream_of_several_choices_names_the_choice_of_each_piece(server: LiveServer) -> None:
    parsed = chunks(server.complete(["hello", " world"], max_tokens=2, n=2, stream=True).text)
    texts = {0: "", 1: "", 2: "", 3: ""}
    for chunk in parsed:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "hellohello", 1: "hellohello", 2: " world world", 3: " world world"}


def test_a_cached_prompt_shows_in_the_usage_and_in_a_header(server: LiveServer) -> None:
    prompt = "forty characters that are new to the cache"
    first, second = server.complete(prompt), server.complete(prompt)
    assert first.headers["x-cached-tokens"] == "0"
    assert second.headers["x-cached-tokens"] == "32"
    assert second.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


def test_the_times_of_an_answer_are_in_its_headers(server: LiveServer) -> None:
    headers = server.complete("hello").headers
    assert headers["x-queue-time-ms"] == "250.0"
    assert 0 < float(headers["x-time-to-first-token-ms"]) < 20_000
    assert "x-adapter-digest" not in headers
    streamed = server.complete("hello", stream=True).headers
    assert streamed["x-queue-time-ms"] == "250.0"
    assert streamed["x-cached-tokens"] == "0"
    assert "x-time-to-first-token-ms" not in streamed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["lo wo", ["zzz", "lo wo", "world"]])
def test_a_stop_string_is_found_across_tokens_and_left_out(server: LiveServer, stop: object, stream: bool) -> None:
    response = server.complete("hello world", max_tokens=50, stop=stop, stream=stream)
    pieces = [chunk["choices"][0] for chunk in (chunks(response.text) if stream else [response.json()])]
    assert "".join(piece["text"] for piece in pieces) == "hel"
    assert pieces[-1]["finish_reason"] == "stop"


def test_a_request_that_a_stop_string_ended_runs_no_longer(server: LiveServer) -> None:
    server.complete("hello world", max_tokens=150, stop="hello")
    assert server.running() == 0


def test_no_stop_string_counts_before_the_least_number_of_tokens(server: LiveServer) -> None:
    body = server.complete("hello world", max_tokens=50, min_tokens=3, stop=" world").json()
    assert body["choices"][0]["text"] == "hello worldhello"


def test_a_stop_string_that_ends_after_the_least_number_of_tokens_counts(
    server: LiveServer,
) -> None:
    asked = {"max_tokens": 50, "min_tokens": 2, "stop": "worldhel"}
    assert server.complete("hello world", **asked).json()["choices"][0]["text"] == "hello "
    included = server.complete("hello world", **asked, include_stop_str_in_output=True).json()["choices"][0]
    assert (included["text"], included["finish_reason"]) == ("hello worldhel", "stop")


def test_what_might_have_become_a_stop_string_is_given_out_at_the_end(server: LiveServer) -> None:
    assert server.complete("hello world", max_tokens=1, stop="lo!").json()["choices"][0]["text"] == "hello"


def test_a_stop_token_ends_the_text_and_is_counted_but_not_shown(server: LiveServer) -> None:
    ids = server.services.tokenizer.encode("hello world")
    body = server.complete("hello world", max_tokens=9, stop_token_ids=[ids[1]]).json()
    assert body["choices"][0]["text"] == "hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_has_its_log_probability_and_its_id(server: LiveServer, stream: bool) -> None:
    ids = server.services.tokenizer.encode("hello world")
    asked = {"max_tokens": 9, "stop_token_ids": [ids[1]], "logprobs": 1, "return_token_ids": True, "stream": stream}
    answer = server.complete("hello world", **asked)
    parts = [chunk["choices"][0] for chunk in (chunks(answer.text) if stream else [answer.json()])]
    assert "".join(part["text"] for part in parts) == "hello"
    assert [token_id for part in parts for token_id in part["token_ids"]] == ids
    found = [part["logprobs"] for part in parts]
    assert [token for each in found for token in each["tokens"]] == ["hello", " world"]
    assert [offset for each in found for offset in each["text_offset"]] == [0, 5]
    assert [logprob for each in found for logprob in each["token_logprobs"]] == [-0.5, -0.5]


def test_a_character_split_between_tokens_comes_in_one_piece(server: LiveServer) -> None:
    parsed = chunks(server.complete("€😀", max_tokens=7, stream=True).text)
    assert [chunk["choices"][0]["text"] for chunk in parsed] == ["€", "😀"]


def test_log_probabilities_have_openais_shape(server: LiveServer) -> None:
    body = server.complete("hello world", max_tokens=2, logprobs=2).json()
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["hello", " world"]
    assert found["token_logprobs"] == [-0.5, -0.5]
    assert found["text_offset"] == [0, 5]
    assert [len(top) for top in found["top_logprobs"]] == [2, 2]
    assert found["top_logprobs"][0]["hello"] == -0.5


def test_offsets_of_log_probabilities_are_into_the_text_though_a_character_has_several_tokens(
    server: LiveServer,
) -> None:
    choice = server.complete("€😀a", max_tokens=8, logprobs=0).json()["choices"][0]
    starts = [choice["text"].index(character) for character in choice["text"]]
    assert set(choice["logprobs"]["text_offset"]) == set(starts)


def test_streamed_log_probabilities_go_on_where_the_last_piece_ended(server: LiveServer) -> None:
    parsed = chunks(server.complete("hello world", max_tokens=3, logprobs=0, stream=True).text)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in parsed] == [[0], [5], [11]]
    assert [chunk["choices"][0]["logprobs"]["top_logprobs"] for chunk in parsed] == [[{}]] * 3
