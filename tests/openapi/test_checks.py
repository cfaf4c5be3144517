"""The contract accepts what the service accepts and refuses what it refuses for its form; its examples are answered."""

import json
from functools import cache
from typing import Any

import jsonschema
import pytest

from openapi.build import CONTRACT
from openapi.errors import DOOR, ERRORS, NO_OPERATION, errors_of
from openapi.examples import BASE, EXAMPLES
from openapi.operations import JSON, OPERATIONS
from service.errors import ANSWERS
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.conftest import server, tiny_model
from tests.service.live_server import NAME, LiveServer

__all__ = ["server", "tiny_model"]

DOCUMENT = json.loads(CONTRACT.read_text())
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
TEXT = {"model": NAME, "prompt": "hello", "max_tokens": 1}
RESPONSE = {"model": NAME, "input": "hello", "max_output_tokens": 1}
LMI = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
TOKENS = {"token_ids": [5], "sampling_params": {"max_tokens": 1}}
PREFIX = {"model": NAME, "prompt": "hello", "pin": False}


@cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**json.loads(schema), "components": DOCUMENT["components"]})


def is_valid(schema: dict[str, Any], value: Any) -> bool:
    return validator(json.dumps(schema)).is_valid(value)


def described(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][path][method.lower()]
    return found


def body_schema(method: str, path: str) -> dict[str, Any]:
    schema: dict[str, Any] = described(method, path)["requestBody"]["content"][JSON]["schema"]
    return schema


# Of each kind of check that no Struct has: a call, and whether its form is right
BODIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "no field of a chat that is not built": ("/v1/chat/completions", CHAT | {"audio": {"voice": "alloy"}}, False),
    "one that asks for nothing": ("/v1/chat/completions", CHAT | {"modalities": ["text"]}, True),
    "nor of a message": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "a", "function_call": {"name": "f"}}]},
        False,
    ),
    "nor of a completion": ("/v1/completions", TEXT | {"suffix": "."}, False),
    "nor of a response": ("/v1/responses", RESPONSE | {"background": True}, False),
    "a response without one": ("/v1/responses", RESPONSE | {"background": False, "truncation": "disabled"}, True),
    "no other truncation": ("/v1/responses", RESPONSE | {"truncation": "auto"}, False),
    "no verbosity": ("/v1/responses", RESPONSE | {"text": {"verbosity": "low"}}, False),
    "nor of token ids": ("/inference/v1/generate", TOKENS | {"stream": True}, False),
    "token ids": ("/inference/v1/generate", TOKENS | {"stream": False}, True),
    "token ids with features": ("/inference/v1/generate", TOKENS | {"features": {"a": 1}}, False),
    "a message without content": ("/v1/chat/completions", CHAT | {"messages": [{"role": "user"}]}, False),
    "a refusal in its place": (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "assistant", "refusal": "no"}]},
        True,
    ),
    "a message that goes on and ends": (
        "/v1/chat/completions",
        CHAT | {"continue_final_message": True, "add_generation_prompt": True},
        False,
    ),
    "a field of the request for the template": (
        "/v1/chat/completions",
        CHAT | {"chat_template_kwargs": {"messages": []}},
        False,
    ),
    "an item without a type": ("/v1/responses", RESPONSE | {"input": [{"role": "user", "content": "a"}]}, True),
    "an item without a role": ("/v1/responses", RESPONSE | {"input": [{"content": "a"}]}, False),
    "a reference": ("/v1/responses", RESPONSE | {"input": [{"type": "item_reference", "id": "a"}]}, False),
    "prompts of one kind": ("/v1/completions", TEXT | {"prompt": ["a", "b"]}, True),
    "lists of token ids": ("/v1/completions", TEXT | {"prompt": [[5], [6]]}, True),
    "prompts of two kinds": ("/v1/completions", TEXT | {"prompt": ["a", [5]]}, False),
    "token ids as keys": ("/v1/completions", TEXT | {"logit_bias": {"5": 1}}, True),
    "words as keys": ("/v1/completions", TEXT | {"logit_bias": {"a": 1}}, False),
    "a zero, which is not false": ("/v1/completions", TEXT | {"use_beam_search": 0}, False),
    "no token is allowed": ("/v1/completions", TEXT | {"allowed_token_ids": []}, False),
    "no token stays": ("/v1/completions", TEXT | {"truncate_prompt_tokens": 0}, False),
    "all stay": ("/v1/completions", TEXT | {"truncate_prompt_tokens": -1}, True),
    "no form of the answer": ("/v1/completions", TEXT | {"structured_outputs": {"json": None}}, False),
    "a form": ("/v1/completions", TEXT | {"structured_outputs": {"choice": ["a"]}}, True),
    "a call without model": ("/invocations", {key: CHAT[key] for key in ("messages", "max_tokens")}, True),
    "with one": ("/invocations", TEXT, True),
    "of LMI": ("/invocations", LMI | {"adapters": None}, True),
    "of LMI with two adapters": ("/invocations", LMI | {"adapters": ["a", "b"]}, False),
    "of LMI, streamed": ("/invocations", LMI | {"stream": True}, False),
    "of two forms": ("/invocations", TEXT | CHAT, False),
    "of none": ("/invocations", {"model": NAME}, False),
    "a prefix": ("/kv/prefixes", PREFIX, True),
    "a prefix of both": ("/kv/prefixes", PREFIX | {"messages": CHAT["messages"]}, False),
    "a prefix of nothing": ("/kv/prefixes", {"model": NAME, "prompt": None}, False),
    "tokens of one": ("/tokenize", {"prompt": "hello", "messages": None}, True),
    "tokens of neither": ("/tokenize", {}, False),
    "the name of an import": ("/adapters", {"name": "-poet", "src": "file:///nowhere"}, False),
    "the name in vLLM's words": ("/v1/load_lora_adapter", {"lora_name": "a//b", "lora_path": "/nowhere"}, False),
    "in SGLang's": ("/load_lora_adapter", {"lora_name": "x" * 129, "lora_path": "/nowhere"}, False),
    "in Dynamo's": ("/v1/loras", {"lora_name": "a b", "source": {"uri": "/nowhere"}}, False),
}


@pytest.mark.parametrize(("path", "body", "right"), BODIES.values(), ids=BODIES.keys())
def test_a_body_is_right_by_the_contract_if_it_is_for_the_service(
    server: LiveServer, path: str, body: dict[str, Any], right: bool
) -> None:
    answer = server.client.post(path, json=body)
    assert answer.is_success == right, answer.text
    assert is_valid(body_schema("post", path), body) == right


PARAMETERS = {
    "a name": ("PUT", "/adapters/{name}", "name", "team/poet@7", True),
    "a name that begins with a point": ("PUT", "/adapters/{name}", "name", ".poet", False),
    "a long name": ("PUT", "/adapters/{name}", "name", "x" * 129, False),
    "any content": ("PUT", "/adapters/{name}", "If-Match", "*", True),
    "one of two digests": ("PUT", "/adapters/{name}", "If-Match", '"a", "b"', True),
    "a weak one": ("PUT", "/adapters/{name}", "If-Match", 'W/"a"', False),
    "a word": ("DELETE", "/adapters/{name}", "If-Match", "abc", False),
    "no content": ("PUT", "/adapters/{name}", "If-None-Match", "*", True),
    "not this content": ("PUT", "/adapters/{name}", "If-None-Match", '"abc"', False),
    "a wait": ("POST", "/pause", "mode", "wait", False),
    "a pause": ("POST", "/pause", "mode", "keep", True),
    "a stream again": ("GET", "/v1/responses/{id}", "stream", True, False),
}
FORMAL = {"invalid_name", "invalid_header", "invalid_query", "unsupported_parameter"}


@pytest.mark.parametrize(("method", "path", "name", "value", "right"), PARAMETERS.values(), ids=PARAMETERS.keys())
def test_a_parameter_is_right_by_the_contract_if_it_is_for_the_service(
    server: LiveServer, method: str, path: str, name: str, value: Any, right: bool
) -> None:
    parameter = next(each for each in described(method, path)["parameters"] if each["name"] == name)
    assert is_valid(parameter["schema"], value) == right
    places: dict[str, dict[str, Any]] = {"path": {"name": "poet", "id": "none"}, "query": {}, "header": {}}
    places[parameter["in"]][name] = str(value).lower() if isinstance(value, bool) else value
    answer = server.client.request(
        method,
        path.format(**places["path"]),
        params=places["query"],
        headers=places["header"],
        files=multipart(*bundle()) if method == "PUT" else None,
    )
    server.client.post("/resume")
    formal = not answer.is_success and answer.json()["error"]["code"] in FORMAL
    assert formal != right, answer.text


GENERATION = "X-Adapter-Generation"
OF_A_GENERATION = [
    (method.upper(), path)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    if GENERATION in [parameter.get("name") for parameter in operation.get("parameters", [])]
]


@pytest.mark.parametrize(("method", "path"), OF_A_GENERATION, ids=[" ".join(each) for each in OF_A_GENERATION])
@pytest.mark.parametrize("value", ["", "0"])
def test_a_generation_is_a_number_wherever_it_is_a_header_also_where_no_adapter_is_named(
    server: LiveServer, method: str, path: str, value: str
) -> None:
    parameter = next(each for each in described(method, path)["parameters"] if each["name"] == GENERATION)
    assert not is_valid(parameter["schema"], value)
    body = next(iter(EXAMPLES.get((method, path), {}).values()), None)
    body = None if body is None else {**body, "model": NAME} if body.get("model") == BASE else body
    place = path.format(name="poet", model=NAME)
    answer = server.client.request(method, place, headers={GENERATION: value}, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_header", GENERATION), answer.text


def test_an_import_may_be_told_in_the_query_alone(server: LiveServer) -> None:
    assert described("POST", "/adapters")["requestBody"]["required"] is False
    answer = server.client.post("/adapters", params={"name": "poet", "src": "hf://org/poet"})
    assert answer.json()["error"]["code"] == "source_not_allowed"


def test_every_body_has_examples_that_are_valid() -> None:
    assert {key for key, operation in OPERATIONS.items() if operation.body or operation.forms} == EXAMPLES.keys()
    for (method, path), examples in EXAMPLES.items():
        for media, content in described(method, path)["requestBody"]["content"].items():
            if media == JSON:
                shown = {name: each["value"] for name, each in content["examples"].items()}
                assert shown == examples
                assert [name for name, value in shown.items() if not is_valid(content["schema"], value)] == []


ANSWERED = [(key[1], body) for key, examples in EXAMPLES.items() for body in examples.values() if key[0] == "POST"]
# What the examples name is not at this service, and its model has a short context of bytes
NOT_HERE = {"adapter_not_found", "source_not_allowed", "context_length_exceeded"}


@pytest.mark.parametrize(("path", "body"), ANSWERED, ids=[path for path, _ in ANSWERED])
def test_the_service_answers_the_examples(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    served = {**body, "model": NAME} if body.get("model") == BASE else body
    answer = server.client.post(path.replace("{name}", "team/poet"), json=served)
    assert answer.is_success or answer.json()["error"]["code"] in NOT_HERE, answer.text


def test_every_error_is_one_of_an_operation_and_every_operation_has_its_errors() -> None:
    given = {code for key in OPERATIONS for code in errors_of(key)} | NO_OPERATION
    assert given == ANSWERS.keys()
    assert ERRORS.keys() <= OPERATIONS.keys()
    for (method, path), operation in OPERATIONS.items():
        statuses = {str(ANSWERS[code].status) for code in errors_of((method, path))} | {
            str(each) for each in operation.answers
        }
        assert described(method, path)["responses"].keys() == statuses
        assert errors_of((method, path)) >= DOOR


def test_the_page_of_a_status_names_its_codes() -> None:
    missing = described("GET", "/v1/models/{model}")["responses"]["404"]
    assert missing["description"] == "Not Found. `code` is model_not_found."
    assert described("POST", "/v1/completions")["responses"]["429"]["headers"].keys() == {"retry-after"}
