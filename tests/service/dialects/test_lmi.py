"""POST /invocations with `inputs` and `parameters`, on an engine that repeats the prompt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from service.dialects.lmi import lmi_request
from service.http import encode_json
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import error
from tests.service.live_server import LiveServer, fake_settings, live_server


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"))) as live:
        assert live.client.put("/adapters/poet", files=multipart(*bundle())).status_code == 201
        yield live


def invoke(server: LiveServer, inputs: object = "hello world", **fields: Any) -> httpx.Response:
    return server.post("/invocations", inputs=inputs, **fields)


def test_inputs_are_completed_by_thirty_tokens(server: LiveServer) -> None:
    assert invoke(server).json() == {"generated_text": "hello world" * 15}
    assert invoke(server, parameters={"max_new_tokens": 3}).json() == {"generated_text": "hello worldhello"}


def test_a_list_is_answered_by_a_list(server: LiveServer) -> None:
    answer = invoke(server, ["hello", " world"], parameters={"max_new_tokens": 2})
    assert answer.json() == [{"generated_text": "hellohello"}, {"generated_text": " world world"}]


def test_the_full_text_and_details_come_if_asked_for(server: LiveServer) -> None:
    answer = invoke(server, "hello", parameters={"max_new_tokens": 2, "details": True, "return_full_text": True}).json()
    assert answer["generated_text"] == "hellohellohello"
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["inputs"]) == ("length", 2, "hello")
    [token_id] = server.post("/tokenize", prompt="hello", model="tiny").json()["tokens"]
    assert [(token["id"], token["text"]) for token in details["tokens"]] == [(token_id, "hello")] * 2
    assert all(token["log_prob"] <= 0 for token in details["tokens"])


def test_a_stop_sequence_ends_the_text_and_is_the_reason(server: LiveServer) -> None:
    answer = invoke(server, parameters={"stop_sequences": [" wo"], "details": True}).json()
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("hello", "stop_sequence")


def test_the_adapter_is_named_in_either_way(server: LiveServer) -> None:
    digest = server.client.get("/adapters/poet").json()["digest"]
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "poet"}
    for answer in (
        invoke(server, adapters="poet"),
        invoke(server, adapters=["poet"]),
        invoke(server, model="poet"),
        server.client.post("/invocations", json={"inputs": "hello"}, headers=header),
    ):
        assert (answer.status_code, answer.headers["x-adapter-digest"]) == (200, digest)


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"seed": 5}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_p": 0.9}, None),
        ({"do_sample": True}, None),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_it_is_greedy_unless_sampling_is_asked_for(parameters: dict[str, Any], temperature: float | None) -> None:
    fields = {"inputs": "x", "model": "tiny", "parameters": parameters}
    body, _ = lmi_request({name: msgspec.Raw(encode_json(value)) for name, value in fields.items()})
    assert body.temperature == temperature


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"parameters": {"max_new_tokens": 0.5}}, (400, "invalid_field", "parameters.max_new_tokens")),
        ({"parameters": {"max_new_tokens": 999}}, (400, "context_length_exceeded", "parameters.max_new_tokens")),
        ({"parameters": {"typical_p": 0.5}}, (400, "unsupported_parameter", "parameters.typical_p")),
        ({"parameters": {"watermark": True}}, (400, "unsupported_parameter", "parameters.watermark")),
        ({"parameters": {"details": "yes"}}, (400, "invalid_field", "parameters.details")),
        ({"parameters": {"n": 2}}, (400, "unsupported_parameter", "parameters.n")),
        ({"parameters": []}, (400, "invalid_field", "parameters")),
        ({"inputs": {"text": "x"}}, (400, "invalid_field", "inputs")),
        ({"inputs": ""}, (400, "empty_prompt", "inputs")),
        ({"stream": True}, (400, "unsupported_parameter", "stream")),
        ({"adapters": ["poet", "bard"]}, (400, "unsupported_parameter", "adapters")),
        ({"adapters": "bard"}, (404, "model_not_found", "adapter_id")),
        ({"prompt": "x"}, (400, "invalid_field", "messages")),
    ],
)
def test_what_is_wrong_is_named(server: LiveServer, fields: dict[str, Any], answer: tuple[int, str, str]) -> None:
    assert error(server.post("/invocations", **{"inputs": "hello", **fields})) == answer
