"""Fairness and limits of time through HTTP, on the real engine with a tiny model."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

MANY = 100  # sequences of one request, of which 4 run at a time


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = fake_settings(
        tiny_model,
        tmp_path_factory.mktemp("data"),
        engine_command=(sys.executable, "-m", "runtime.process"),
        load_format="dummy",
        threads=1,
        max_running=4,
        kv_cache_bytes=2**24,
    )
    with live_server(settings) as running:
        yield running


def waiting(server: LiveServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm:num_requests_waiting{")).rsplit(" ", 1)[1])


def test_a_single_token_comes_while_another_client_has_a_hundred_sequences(server: LiveServer) -> None:
    answers: list[httpx.Response] = []
    prompts = [[5 + index, 6, 7] for index in range(MANY)]
    many = threading.Thread(target=lambda: answers.append(server.complete(prompts, max_tokens=100, ignore_eos=True)))
    many.start()
    wait_until(lambda: waiting(server) > 0)
    single = server.complete("hello", max_tokens=1)
    left = waiting(server)
    assert (single.status_code, single.json()["usage"]["completion_tokens"]) == (200, 1)
    assert not answers, "the many were done first"
    assert left > MANY / 2
    many.join(timeout=120)
    [answer] = answers
    assert [len(choice["text"]) > 0 for choice in answer.json()["choices"]] == [True] * MANY
    assert answer.json()["usage"]["completion_tokens"] == 100 * MANY
