"""Prompts in the answers of completions and chats, on an engine whose log-probability of a prompt's token i is -i."""

import pytest

from tests.service.live_server import LiveServer
from tests.service.openai.test_completions import chunks


def test_a_prompt_is_echoed_before_the_answer(server: LiveServer) -> None:
    [choice] = server.complete("hello world", max_tokens=2, echo=True).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("hello worldhello world", None)
    assert "prompt_logprobs" not in choice


@pytest.mark.parametrize("as_ids", [True, False])
def test_a_prompt_is_scored_and_nothing_generated_as_lm_eval_asks(server: LiveServer, as_ids: bool) -> None:
    ids = server.services.tokenizer.encode("hello world")
    body = server.complete([ids] if as_ids else "hello world", max_tokens=0, echo=True, logprobs=1, seed=1).json()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    found = choice["logprobs"]
    assert found["tokens"] == ["hello", " world"]
    assert found["token_logprobs"] == [None, -1.0]
    assert found["text_offset"] == [0, 5]
    assert found["top_logprobs"][0] is None
    assert len(found["top_logprobs"][1]) == 2
    assert found["top_logprobs"][1][" world"] == -1.0
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 0)


def test_the_answers_log_probabilities_follow_the_prompts(server: LiveServer) -> None:
    [choice] = server.complete("hello world", max_tokens=1, echo=True, logprobs=1).json()["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == ["hello", " world", "hello"]
    assert found["token_logprobs"] == [None, -1.0, -0.5]
    assert found["text_offset"] == [0, 5, 11]


def test_every_choice_of_every_prompt_has_its_own_prompt(server: LiveServer) -> None:
    prompts = ["hello world", " world hello hello"]
    choices = server.complete(prompts, max_tokens=1, n=2, echo=True, logprobs=0).json()["choices"]
    counts = [len(server.services.tokenizer.encode(prompt)) for prompt in prompts for _ in range(2)]
    assert [choice["text"].startswith(prompts[index // 2]) for index, choice in enumerate(choices)] == [True] * 4
    for choice, count in zip(choices, counts, strict=True):
        expected = [None, *(-float(place) for place in range(1, count)), -0.5]
        assert choice["logprobs"]["token_logprobs"] == expected


def test_a_streamed_echo_is_the_whole_one_in_pieces(server: LiveServer) -> None:
    asked = {"max_tokens": 3, "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    [whole] = server.complete("hello w\u00f6rld", **asked).json()["choices"]
    parts = [chunk["choices"][0] for chunk in chunks(server.complete("hello w\u00f6rld", stream=True, **asked).text)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [each for part in parts for each in part["logprobs"][field]] == whole["logprobs"][field]
    assert parts[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert not any("prompt_logprobs" in part for part in parts[1:])


def test_prompt_logprobs_have_vllms_form(server: LiveServer) -> None:
    tokenizer = server.services.tokenizer
    ids = tokenizer.encode("hello world")
    [choice] = server.complete("hello world", max_tokens=0, prompt_logprobs=1).json()["choices"]
    assert choice["text"] == ""
    assert choice["prompt_logprobs"] == [
        None,
        {
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.shown([5])},
            str(ids[1]): {"logprob": -1.0, "rank": 3, "decoded_token": " world"},
        },
    ]


@pytest.mark.parametrize("text", ["hello world", "w\u00f6rld \U0001f31f"])
def test_token_ids_of_prompt_and_answer_whole_and_streamed(server: LiveServer, text: str) -> None:
    ids = server.services.tokenizer.encode(text)
    asked = {"max_tokens": len(ids), "return_token_ids": True}
    [whole] = server.complete(text, **asked).json()["choices"]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (ids, ids)
    parts = [chunk["choices"][0] for chunk in chunks(server.complete(text, stream=True, **asked).text)]
    assert [token_id for part in parts for token_id in part["token_ids"]] == ids
    assert [part.get("prompt_token_ids") for part in parts] == [ids] + [None] * (len(parts) - 1)
    [without] = server.complete(text, max_tokens=1).json()["choices"]
    assert not {"prompt_token_ids", "token_ids"} & set(without)


def prompt_of(server: LiveServer, **more: object) -> list[int]:
    return server.post("/tokenize", messages=[{"role": "user", "content": "hello"}], **more).json()["tokens"]


@pytest.mark.parametrize("choices", [1, 2])
def test_token_ids_of_a_chat_and_its_choices_whole_and_streamed(server: LiveServer, choices: int) -> None:
    ids = prompt_of(server)
    asked = {"max_tokens": len(ids), "n": choices, "return_token_ids": True, "ignore_eos": True}
    whole = server.chat("hello", **asked).json()
    assert whole["prompt_token_ids"] == ids
    assert [choice["token_ids"] for choice in whole["choices"]] == [ids] * choices
    parts = chunks(server.chat("hello", stream=True, **asked).text)
    assert [part.get("prompt_token_ids") for part in parts] == [ids] + [None] * (len(parts) - 1)
    for index in range(choices):
        told = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert [token_id for choice in told for token_id in choice["token_ids"]] == ids
        assert (
            "".join(choice["delta"].get("content") or "" for choice in told)
            == (whole["choices"][index]["message"]["content"])
        )
    without = server.chat("hello", max_tokens=1).json()
    assert not {"prompt_token_ids", "token_ids", "prompt_logprobs"} & {*without, *without["choices"][0]}


def test_the_token_that_ends_a_chat_is_among_its_token_ids(server: LiveServer) -> None:
    ids = prompt_of(server)
    asked = {"stop_token_ids": [ids[1]], "return_token_ids": True}
    assert server.chat("hello", **asked).json()["choices"][0]["token_ids"] == ids[:2]
    parts = chunks(server.chat("hello", stream=True, **asked).text)
    assert [token_id for part in parts for token_id in part["choices"][0]["token_ids"]] == ids[:2]


def test_a_chats_prompt_is_scored_in_vllms_form(server: LiveServer) -> None:
    ids, tokenizer = prompt_of(server), server.services.tokenizer
    body = server.chat("hello", max_tokens=1, prompt_logprobs=0, n=2).json()
    assert body["prompt_logprobs"] == [
        None,
        *(
            {str(token_id): {"logprob": -float(place), "rank": 3, "decoded_token": tokenizer.shown([token_id])}}
            for place, token_id in enumerate(ids[1:], 1)
        ),
    ]
    assert [len(entry) for entry in server.chat("hello", prompt_logprobs=2).json()["prompt_logprobs"][1:]] == [
        len({5, 6, token_id}) for token_id in ids[1:]
    ]
    refused = server.chat("hello", prompt_logprobs=1, stream=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
    assert "stream" in refused.json()["error"]["message"]


def told(server: LiveServer, messages: list[dict[str, str]], **fields: object) -> list[str]:
    """The contents of a chat's choices; the stream has the same."""
    asked = {"model": "tiny", "messages": messages, "max_tokens": 3, "n": 2, **fields}
    contents = [
        choice["message"]["content"] for choice in server.post("/v1/chat/completions", **asked).json()["choices"]
    ]
    parts = chunks(server.post("/v1/chat/completions", stream=True, **asked).text)
    for index, content in enumerate(contents):
        mine = [part["choices"][0]["delta"] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(delta.get("content") or "" for delta in mine) == content
        assert [delta.get("role") for delta in mine] == ["assistant"] + [None] * (len(mine) - 1)
    return contents


@pytest.mark.parametrize(
    ("role", "fields", "echoed"),
    [
        ("user", {}, False),
        ("assistant", {}, True),
        ("user", {"add_generation_prompt": False}, True),
        ("assistant", {"continue_final_message": True}, True),
    ],
)
def test_a_last_message_of_the_answers_role_is_echoed_before_it(
    server: LiveServer, role: str, fields: dict[str, bool], echoed: bool
) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": role, "content": "hello w\u00f6rld"}]
    answers = told(server, messages, **fields)
    assert told(server, messages, echo=True, **fields) == [
        ("hello w\u00f6rld" if echoed else "") + answer for answer in answers
    ]
