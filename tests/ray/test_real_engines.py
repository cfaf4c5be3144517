"""Replicas with the real engine on a tiny model: they answer as one server does, and come back from the same deaths."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ray.cluster import NAME, Cluster, deployed
from tests.ray.test_ray_serve import REPLICA, events, in_flight, shown, upload, wait_until
from tests.server_log import address

OPTIONS = {"load_format": "dummy", "threads": 1, "kv_cache_bytes": 2**22, "adapter_bytes": 2**20}
ADAPTERS = [f"adapter-{number}" for number in range(6)]
MODELS = [NAME, *ADAPTERS]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One server on the same model, without Ray."""
    data = tmp_path_factory.mktemp("alone")
    options = {"model": tiny_model, "served_model_name": NAME, "data_directory": data, "port": 0, **OPTIONS}
    command = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    said = data / "log"
    with (
        said.open("w") as log,
        subprocess.Popen([sys.executable, "-m", "service", *command], stderr=log) as process,
        httpx.Client(base_url=address(process, said), timeout=60) as client,
    ):
        yield Cluster(client)
        process.terminate()


@pytest.fixture(scope="module")
def replicas(client: httpx.Client, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    data = tmp_path_factory.mktemp("replicas")
    with deployed(client, tiny_model, data, engine=None, **OPTIONS) as cluster:
        yield cluster


def answer(cluster: Cluster, model: str, prompt: str = "hello", **body: Any) -> tuple[str, list[int], str]:
    """The text of a greedy answer, its tokens, and who gave it."""
    given = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
    response = cluster.complete(model, prompt, **given)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["text"], choice["token_ids"], response.headers.get(REPLICA, "")


def test_replicas_answer_as_one_server_does(alone: Cluster, replicas: Cluster) -> None:
    for number, name in enumerate(ADAPTERS):
        for cluster in (alone, replicas):
            upload(cluster, name, number)
    with ThreadPoolExecutor(8) as threads:
        asked = [(model, f"hello world {number}") for model in MODELS for number in range(3)]
        found = list(threads.map(lambda each: answer(replicas, *each), asked))
    expected = [answer(alone, *each) for each in asked]
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert len({replica for _, _, replica in found}) == 2
    assert len({tuple(tokens) for _, tokens, _ in found}) > len(MODELS), "adapters and prompts make a difference"


def test_a_stream_has_the_same_tokens_and_ends_when_its_client_goes(alone: Cluster, replicas: Cluster) -> None:
    body = {"model": ADAPTERS[0], "prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with replicas.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        text = "".join(event["choices"][0]["text"] for event in events(response) if event != "data: [DONE]")
    assert text == alone.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with replicas.client.stream("POST", "/v1/completions", json=body | {"stream": True, "n": 8}) as response:
        next(events(response))
        replica = response.headers[REPLICA]
    wait_until(lambda: in_flight(replicas, replica) == 0, 10)


def test_a_replica_that_is_killed_is_replaced_and_serves_the_same_adapters(alone: Cluster, replicas: Cluster) -> None:
    expected = {model: answer(alone, model)[0] for model in MODELS}
    _, _, killed = answer(replicas, ADAPTERS[0])
    replicas.kill(killed)
    for model in MODELS * 3:
        text, _, replica = answer(replicas, model)
        assert (text, replica != killed) == (expected[model], True)
    wait_until(lambda: killed not in shown(replicas) and len(shown(replicas)) == 2, 180)
    assert {model: answer(replicas, model)[0] for model in MODELS} == expected
