"""What a client can get wrong: a clear 4xx that names the field, and nothing left running."""

import json

import pytest

from tests.service.live_server import LiveServer


def error_of(server: LiveServer, content: bytes | str, path: str = "/v1/completions") -> tuple[int, dict]:
    response = server.client.post(path, content=content)
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"max_tokens": -1}, "invalid_field", "max_tokens"),
        ({"max_tokens": -3}, "invalid_field", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_field", "max_tokens"),
        ({"max_tokens": "many"}, "invalid_field", "max_tokens"),
        ({"max_tokens": 1000}, "context_length_exceeded", "max_tokens"),
        ({"temperature": -0.1}, "invalid_field", "temperature"),
        ({"temperature": 2.1}, "invalid_field", "temperature"),
        ({"temperature": "NaN"}, "invalid_field", "temperature"),
        ({"top_p": -0.1}, "invalid_field", "top_p"),
        ({"top_p": 1.1}, "invalid_field", "top_p"),
        ({"top_k": -2}, "invalid_field", "top_k"),
        ({"min_p": 2}, "invalid_field", "min_p"),
        ({"repetition_penalty": 0}, "invalid_field", "repetition_penalty"),
        ({"presence_penalty": 3}, "invalid_field", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_field", "frequency_penalty"),
        ({"seed": 2**70}, "invalid_field", "seed"),
        ({"n": 0}, "invalid_field", "n"),
        ({"n": 129}, "invalid_field", "n"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_field", "min_tokens"),
        ({"stop": ["x"] * 17}, "invalid_field", "stop"),
        ({"stop": "x" * 1025}, "invalid_field", "stop"),
        ({"stop": ["x" * 1024, "x" * 1025]}, "invalid_field", "stop[1]"),
        ({"stop_token_ids": [10**6]}, "invalid_token_id", "stop_token_ids"),
        ({"logprobs": 21}, "invalid_field", "logprobs"),
        ({"stream": "yes"}, "invalid_field", "stream"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": ["hello", ""]}, "empty_prompt", "prompt"),
        ({"prompt": [[]]}, "empty_prompt", "prompt"),
        ({"prompt": [1, 10**6]}, "invalid_token_id", "prompt"),
        ({"prompt": [-1]}, "invalid_token_id", "prompt"),
        ({"prompt": [1, "hello"]}, "invalid_field", "prompt"),
        ({"prompt": [1, 2.5]}, "invalid_field", "prompt[1]"),
        ({"max_tokens": 4.0, "n": 1.5}, "invalid_field", "n"),
        ({"max_tokens": 1e300}, "invalid_field", "max_tokens"),
        ({"prompt": 5.0}, "invalid_field", "prompt"),
        ({"max_tokens": 4.0, "stop_token_ids": [1e6]}, "invalid_token_id", "stop_token_ids"),
        ({"prompt": {"text": "hello"}}, "invalid_field", "prompt"),
        ({"prompt": [5] * 200}, "context_length_exceeded", "prompt"),
        ({"prompt": ["hello"] * 9, "n": 128}, "too_many_sequences", "prompt"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"spaces_between_special_tokens": 1}, "invalid_field", "spaces_between_special_tokens"),
        ({"prompt_logprobs": 21}, "invalid_field", "prompt_logprobs"),
        ({"suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"logit_bias": {"5": 101}}, "invalid_field", "logit_bias[...]"),
        ({"logit_bias": {"five": 1}}, "invalid_field", "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "invalid_token_id", "logit_bias"),
        ({"allowed_token_ids": []}, "invalid_field", "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "invalid_token_id", "allowed_token_ids"),
        ({"allowed_token_ids": [5], "regex": "a"}, "invalid_field", "allowed_token_ids"),
        ({"bad_words": [""]}, "invalid_field", "bad_words[0]"),
        ({"bad_words": ["x"] * 513}, "invalid_field", "bad_words"),
        ({"bad_words": ["x" * 1024] * 65}, "invalid_field", "bad_words"),
        ({"lora_path": [None] * 1025}, "invalid_field", "lora_path"),
        ({"prompt": "x" * 10_000}, "context_length_exceeded", "prompt"),
        ({"prompt": ["x"] * 1025}, "too_many_sequences", "prompt"),
        ({"response_format": {"type": "jsonschema"}}, "invalid_field", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
        ({"guided_json": {"not": {}}}, "invalid_grammar", "guided_json"),
        ({"guided_json": "{"}, "invalid_grammar", "guided_json"),
        ({"guided_regex": "(a"}, "invalid_grammar", "guided_regex"),
        ({"guided_choice": []}, "invalid_field", "guided_choice"),
        ({"ebnf": "root ::= other"}, "invalid_grammar", "ebnf"),
        ({"regex": "a", "json_schema": "{}"}, "invalid_field", "regex"),
        ({"structured_outputs": {}}, "invalid_field", "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "invalid_grammar", "structured_outputs.structural_tag"),
        ({"structural_tag": "x"}, "invalid_grammar", "structural_tag"),
    ],
)
def test_a_wrong_field_is_refused_by_name(server: LiveServer, fields: dict, code: str, param: str) -> None:
    status, error = error_of(server, json.dumps({"model": "tiny", "prompt": "hello", **fields}))
    assert (status, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert server.running() == 0


@pytest.mark.parametrize("field", ["functions", "audio", "documents"])
def test_what_is_not_built_into_chat_is_refused_by_name(server: LiveServer, field: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], field: [{"type": "function"}]}
    status, error = error_of(server, json.dumps(body), "/v1/chat/completions")
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)


def test_the_types_of_a_response_format_are_named(server: LiveServer) -> None:
    asked = {"model": "tiny", "prompt": "x", "response_format": {"type": "jsonschema"}}
    _, error = error_of(server, json.dumps(asked))
    assert error["message"].endswith(
        "Invalid value 'jsonschema', expected one of text, json_object, json_schema, structural_tag"
    )


def test_a_context_overflow_is_told_as_openai_tells_it(server: LiveServer) -> None:
    """LiteLLM and LangChain look for these words."""
    for body in ({"prompt": [5] * 200}, {"prompt": [5] * 9, "max_tokens": 1000}):
        _, error = error_of(server, json.dumps({"model": "tiny", **body}))
        assert error["message"].startswith("This model's maximum context length is")
        assert "tokens. However, " in error["message"]
        assert error["code"] == "context_length_exceeded"


def test_the_values_of_a_field_that_has_few_are_named(server: LiveServer) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}
    status, error = error_of(server, json.dumps(body), "/v1/chat/completions")
    assert (status, error["param"]) == (400, "messages[0].content[0].type")
    assert error["message"].endswith("Invalid value 'image_url', expected one of text, refusal")


def test_fields_that_ask_for_nothing_are_no_reason_to_refuse(server: LiveServer) -> None:
    response = server.complete(
        "hello", echo=False, suffix=None, logit_bias={}, best_of=1, user="someone", unknown={"to": "us"}, top_k=-1
    )
    assert response.status_code == 200


def test_the_numbers_of_a_prompt_that_is_too_long_are_named(server: LiveServer) -> None:
    _, error = error_of(server, json.dumps({"model": "tiny", "prompt": [5] * 300}))
    assert "200" in error["message"]
    assert "300" in error["message"]
    _, error = error_of(server, json.dumps({"model": "tiny", "prompt": [5] * 150, "max_tokens": 51}))
    assert {"200", "150", "51"} <= set(error["message"].replace(";", "").split())


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_temperature_that_is_no_number_is_named(server: LiveServer, literal: str) -> None:
    status, error = error_of(server, f'{{"model": "tiny", "prompt": "a, b", "temperature": {literal}, "n": 1}}')
    assert (status, error["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"model": "\xff"}',
        b"[" * 5000,
        b'{"x": ' * 5000,
        b'{"model": "tiny", "prompt": ""} {}',
        b"null",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: LiveServer, body: bytes) -> None:
    status, error = error_of(server, body)
    assert status == 400
    assert error["code"] in ("invalid_json", "invalid_field")


@pytest.mark.parametrize(("body", "param"), [('{"prompt": "x"}', "model"), ('{"model": "tiny"}', "prompt")])
def test_a_missing_field_is_named(server: LiveServer, body: str, param: str) -> None:
    status, error = error_of(server, body)
    assert (status, error["code"], error["param"]) == (400, "missing_field", param)


@pytest.mark.parametrize("name", ["nobody", "tiny:nobody", "tiny@12345678", "nobody@12345678", "../tiny", "TINY"])
def test_an_unknown_model_is_not_found(server: LiveServer, name: str) -> None:
    status, error = error_of(server, json.dumps({"model": name, "prompt": "hello"}))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_a_body_over_the_limit_is_refused_however_long_it_says_it_is(server: LiveServer) -> None:
    limit = server.services.settings.max_body_bytes

    def endless() -> object:
        for _ in range(limit // 65536 + 1):
            yield b"x" * 65536

    for content in (b"x" * (limit + 1), endless()):
        status, error = error_of(server, content)  # type: ignore[arg-type]
        assert (status, error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", "/v1/completions", 405, "method_not_allowed")],
)
def test_a_wrong_path_or_method_is_an_error_of_the_same_shape(
    server: LiveServer, method: str, path: str, status: int, code: str
) -> None:
    response = server.client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("code", "status"),
    [("queue_full", 429), ("adapter_failed", 503), ("engine_error", 500), ("non_finite_logits", 422)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_has_its_status(server: LiveServer, code: str, status: int, stream: bool) -> None:
    response = server.complete("hello", cache_salt=f"refuse {code}", stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_failure_in_the_middle_of_a_stream_ends_it_with_an_error_event(server: LiveServer) -> None:
    response = server.complete("hello", cache_salt="fail engine_error", stream=True)
    assert response.status_code == 200
    *_, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(last)["error"]["code"] == "engine_error"


def test_a_failure_of_one_choice_ends_them_all(server: LiveServer) -> None:
    response = server.complete(["hello", "world"], n=2, cache_salt="fail engine_error")
    assert response.status_code == 500
    assert server.running() == 0
