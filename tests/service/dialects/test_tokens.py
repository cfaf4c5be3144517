"""POST /inference/v1/generate, on an engine that repeats the prompt."""

from typing import Any

import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import error
from tests.service.live_server import LiveServer

PATH = "/inference/v1/generate"


def test_token_ids_come_out_for_token_ids(server: LiveServer) -> None:
    body = {"request_id": "mine", "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}}
    answer = server.post(PATH, **body).json()
    assert answer["request_id"] == "mine"
    assert answer["choices"] == [{"index": 0, "token_ids": [5, 6, 7, 5], "logprobs": None, "finish_reason": "length"}]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 4)
    assert len(server.post(PATH, token_ids=[5], sampling_params={}).json()["choices"][0]["token_ids"]) == 16


def test_choices_log_probabilities_and_the_adapter_are_as_for_completions(server: LiveServer) -> None:
    digest = server.client.put("/adapters/poet", files=multipart(*bundle())).json()["digest"]
    params = {"max_tokens": 2, "logprobs": 2, "n": 2}
    answer = server.post(PATH, token_ids=[5, 6], sampling_params=params, model="poet")
    assert answer.headers["x-adapter-digest"] == digest
    first, second = answer.json()["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    plain = server.post("/v1/completions", model="poet", prompt=[5, 6], **params).json()["choices"][0]["logprobs"]
    content = first["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in first["token_ids"]]
    assert [entry["logprob"] for entry in content] == plain["token_logprobs"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"token_ids": []}, (400, "invalid_field", "token_ids")),
        ({"token_ids": [10**6]}, (400, "invalid_token_id", "token_ids")),
        ({"sampling_params": {"max_tokens": "x"}}, (400, "invalid_field", "sampling_params.max_tokens")),
        ({"sampling_params": {"typical_p": 0.5}}, (400, "unsupported_parameter", "sampling_params.typical_p")),
        ({"sampling_params": None}, (400, "invalid_field", "sampling_params")),
        ({"stream": True}, (400, "unsupported_parameter", "stream")),
        ({"features": "x"}, (400, "unsupported_parameter", "features")),
        ({"kv_transfer_params": {"a": 1}}, (400, "unsupported_parameter", "kv_transfer_params")),
        ({"model": "nobody"}, (404, "model_not_found", "model")),
    ],
)
def test_what_is_wrong_is_named(server: LiveServer, fields: dict[str, Any], answer: tuple[int, str, str]) -> None:
    assert error(server.post(PATH, **{"token_ids": [5], "sampling_params": {}, **fields})) == answer
