"""best_of: the likeliest of several choices, by the real engine on a tiny model whose text is noise."""

import sys
from collections.abc import Iterator

import pytest

from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.tiny_model import write_tiny_model

ENGINE = (sys.executable, "-m", "runtime.process")
PROMPTS = ["hello world", "world hello"]
SAMPLED = {"max_tokens": 6, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    options = {"load_format": "dummy", "kv_cache_bytes": 4 << 20, "adapter_bytes": 1 << 20}
    settings = fake_settings(
        model, tmp_path_factory.mktemp("data"), engine_command=ENGINE, host_adapter_bytes=1 << 20, **options
    )
    with live_server(settings) as live:
        yield live


def test_the_likeliest_choices_of_each_prompt_are_given_out_in_order(server: LiveServer) -> None:
    every = server.complete(PROMPTS, n=5, logprobs=0, **SAMPLED).json()
    best = server.complete(PROMPTS, n=2, best_of=5, **SAMPLED).json()
    wanted = []
    for first in (0, 5):
        each = every["choices"][first : first + 5]
        means = [sum(found) / len(found) for found in (choice["logprobs"]["token_logprobs"] for choice in each)]
        assert len(set(means)) == 5
        wanted += [each[place]["text"] for place in sorted(range(5), key=means.__getitem__, reverse=True)[:2]]
    assert [choice["text"] for choice in best["choices"]] == wanted
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    counted = best["usage"]["completion_tokens"], every["usage"]["completion_tokens"]
    assert counted[0] == counted[1], "all that was generated is counted"
    shown = server.complete(PROMPTS, best_of=5, logprobs=2, echo=True, **SAMPLED).json()["choices"]
    assert [choice["text"] for choice in shown] == [
        prompt + text for prompt, text in zip(PROMPTS, wanted[::2], strict=True)
    ]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"best_of": 2, "n": 3}, "invalid_field"),
        ({"best_of": 0}, "invalid_field"),
        ({"best_of": 2, "stream": True}, "unsupported_parameter"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(server: LiveServer, fields: dict[str, object], code: str) -> None:
    refused = server.complete("hello", **fields)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    assert refused.json()["error"]["param"] == "best_of"


def test_as_many_as_are_given_out_may_be_streamed(server: LiveServer) -> None:
    assert server.complete("hello", best_of=2, n=2, stream=True, **SAMPLED).status_code == 200
