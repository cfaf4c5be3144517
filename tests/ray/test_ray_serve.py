"""Two replicas on one store, on real Ray: where requests go, and what becomes of them when replicas come and go."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from ray import serve

from service.ray.app import app, build
from tests.ray.cluster import NAME, Cluster, deployed
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.engine import fake_engine

REPLICA = "x-replica"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def upload(cluster: Cluster, name: str, seed: int) -> httpx.Response:
    response = cluster.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)))
    assert response.status_code in (200, 201), response.text
    return response


def shown(cluster: Cluster) -> dict[str, dict[str, object]]:
    """What each replica says of itself: enough calls that both have one."""
    found = {}
    for _ in range(12):
        response = cluster.client.get("/routing")
        found[response.headers[REPLICA]] = response.json()
    return found


def in_flight(cluster: Cluster, replica: str) -> int | None:
    """The sequences of a replica; whether the fake engine runs them or has them wait is its own affair."""
    routing = shown(cluster).get(replica)
    return None if routing is None else int(f"{routing['running']}") + int(f"{routing['waiting']}")


def events(response: httpx.Response) -> Iterator[object]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def test_requests_for_an_adapter_go_where_it_is(cluster: Cluster) -> None:
    names = [f"adapter-{number}" for number in range(12)]
    for number, name in enumerate(names):
        upload(cluster, name, number)
    time.sleep(2)  # what the replicas say reaches the router
    homes = {}
    for name in names:
        asked = [cluster.complete(name) for _ in range(8)]
        assert [response.status_code for response in asked] == [200] * 8
        [homes[name]] = {response.headers[REPLICA] for response in asked}
    assert len(set(homes.values())) == 2, "and the adapters have not all the same home"
    assert {cluster.complete(f"{NAME}:{name}").headers[REPLICA] == homes[name] for name in names} == {True}
    assert {cluster.complete(NAME, lora_path=name).headers[REPLICA] == homes[name] for name in names} == {True}


def test_what_was_uploaded_by_one_replica_is_served_by_any(cluster: Cluster) -> None:
    """They follow the store once an hour here."""
    first = upload(cluster, "poet", 10).json()["digest"]
    assert cluster.complete("poet").headers["x-adapter-digest"] == first
    second = upload(cluster, "poet", 11)
    headers = {"X-Adapter-Generation": second.headers["x-adapter-generation"]}
    body = {"model": "poet", "prompt": "hello", "max_tokens": 1}
    for _ in range(6):
        answered = cluster.client.post("/v1/completions", json=body, headers=headers)
        assert answered.headers["x-adapter-digest"] == second.json()["digest"]


def test_a_large_upload_goes_through_in_pieces(cluster: Cluster) -> None:
    """More than the ingress and the actor beside it hold of a body, and slower than it is read."""
    request = cluster.client.build_request("PUT", "/adapters/slow", files=multipart(*bundle(12)))
    content = request.read()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), 64):
            yield content[start : start + 64]
            time.sleep(0.002)

    headers = {"content-type": request.headers["content-type"]}
    assert cluster.client.put("/adapters/slow", content=pieces(), headers=headers).status_code == 201
    refused = cluster.client.put("/adapters/broken", content=iter([b"x" * 65536] * 40), headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_multipart")


def test_conversations_spread_and_each_stays(cluster: Cluster) -> None:
    homes = Counter[str]()
    for number in range(12):
        messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": f"number {number}"}]
        body = {"model": NAME, "messages": messages, "max_tokens": 1}
        first = cluster.client.post("/v1/chat/completions", json=body)
        assert first.status_code == 200, first.text
        messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and"}]
        assert cluster.client.post("/v1/chat/completions", json=body).headers[REPLICA] == first.headers[REPLICA]
        homes[first.headers[REPLICA]] += 1
    assert len(homes) == 2, homes


def test_errors_pass_as_they_are_and_what_cannot_be_is_refused_by_name(cluster: Cluster) -> None:
    unknown = cluster.complete("nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert cluster.client.get("/health/ready").json() == {"status": "ready"}
    held = cluster.client.post("/kv/prefixes", json={"model": NAME, "prompt": "hello"})
    assert (held.status_code, held.json()["error"]["code"]) == (501, "not_implemented")
    assert (
        cluster.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )


def test_a_stream_comes_as_it_is_generated_and_ends_when_its_client_goes(cluster: Cluster) -> None:
    body = {"model": NAME, "prompt": "hello world", "stream": True, "max_tokens": 4}
    with cluster.client.stream("POST", "/v1/completions", json=body) as response:
        whole = list(events(response))
    assert len(whole) == 5
    assert whole[-1] == "data: [DONE]"
    with cluster.client.stream("POST", "/v1/completions", json=body | {"cache_salt": "hold"}) as response:
        found = events(response)  # kept: its end would close the stream
        assert next(found)["object"] == "text_completion", "the first token, before the end"
        replica = response.headers[REPLICA]
        wait_until(lambda: in_flight(cluster, replica) == 1)
    began = time.monotonic()
    wait_until(lambda: in_flight(cluster, replica) == 0)
    assert time.monotonic() - began < 5


def test_a_hot_adapter_spreads_when_its_home_is_crowded(
    client: httpx.Client, tiny_model: Path, tmp_path: Path, cluster: Cluster
) -> None:
    upload(cluster, "hot", 13)
    time.sleep(2)
    body = {"model": "hot", "prompt": "hello", "stream": True, "cache_salt": "hold", "max_tokens": 9}
    with ExitStack() as streams:
        homes = Counter[str]()
        for _ in range(40):
            response = streams.enter_context(cluster.client.stream("POST", "/v1/completions", json=body))
            homes[response.headers[REPLICA]] += 1
        assert len(homes) == 2, homes
        assert min(homes.values()) >= 8, homes


def test_an_engine_that_dies_is_restarted_by_its_replica_and_others_serve_meanwhile(cluster: Cluster) -> None:
    before = set(shown(cluster))
    assert len(before) == 2
    died = cluster.client.post("/v1/completions", json={"model": NAME, "prompt": "hello", "cache_salt": "die"})
    assert (died.status_code, died.json()["error"]["code"]) == (503, "engine_died")
    wait_until(lambda: set(shown(cluster)) == before)  # one without an engine is asked last; none is replaced


def test_a_replica_that_is_killed_ends_its_streams_with_an_error_event_and_is_replaced(cluster: Cluster) -> None:
    body = {"model": NAME, "prompt": "hello world", "stream": True, "cache_salt": "hold", "max_tokens": 9}
    statuses, stop = Counter[int](), threading.Event()

    def call() -> None:
        while not stop.is_set():
            statuses[cluster.complete(NAME).status_code] += 1

    caller = threading.Thread(target=call)
    with cluster.client.stream("POST", "/v1/completions", json=body) as response:
        found = events(response)
        next(found)
        caller.start()
        cluster.kill(response.headers[REPLICA])
        last = list(found)
    assert [event["error"]["code"] for event in last] == ["engine_died"]
    wait_until(lambda: response.headers[REPLICA] not in shown(cluster) and len(shown(cluster)) == 2)
    stop.set()
    caller.join()
    assert set(statuses) == {200}, statuses


def test_a_replica_that_is_taken_away_ends_its_streams_first(
    client: httpx.Client, tiny_model: Path, tmp_path: Path
) -> None:
    with deployed(client, tiny_model, tmp_path / "data") as cluster:
        body = {"model": NAME, "stream": True, "cache_salt": "hold", "max_tokens": 9, "timeout": 4}
        with ExitStack() as streams:
            responses = [
                streams.enter_context(
                    cluster.client.stream("POST", "/v1/completions", json=body | {"prompt": f"number {number}"})
                )
                for number in range(12)
            ]
            assert len({response.headers[REPLICA] for response in responses}) == 2
            options = {"model": tiny_model, "served_model_name": NAME, "data_directory": tmp_path / "data"}
            options |= {"cache_directory": tmp_path / "data" / "cache", "drain_seconds": 5, "replicas": 1}
            thread = threading.Thread(target=lambda: serve.run(build(options, fake_engine.COMMAND)))
            thread.start()
            ends = [list(events(response))[-1] for response in responses]
            thread.join()
        assert [end["error"]["code"] for end in ends] == ["timeout"] * 12, "their own end, not the replica's"
        wait_until(lambda: cluster.running() == 1)


def test_replicas_follow_the_time_that_requests_wait(client: httpx.Client, tiny_model: Path, tmp_path: Path) -> None:
    sizes = {"replicas": 1, "max_replicas": 2, "upscale_seconds": 1.0, "downscale_seconds": 2.0, "max_running": 1}
    with deployed(client, tiny_model, tmp_path, **sizes) as cluster:
        assert cluster.running() == 1
        body = {"model": NAME, "prompt": "hello", "cache_salt": "silent", "max_tokens": 9, "timeout": 15}

        statuses: list[int] = []

        def wait_in_vain() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60) as own:
                statuses.append(own.post("/v1/completions", json=body).status_code)

        threads = [threading.Thread(target=wait_in_vain) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: cluster.running() == 2)
        for thread in threads:
            thread.join()
        assert statuses == [504] * 6, "their own time limit"
        wait_until(lambda: cluster.running() == 1)
        assert cluster.complete(NAME).status_code == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_events": "tcp://*:5557"}, "kv_events cannot be set for several replicas"),
        ({"adapter_byte": "1M"}, "adapter_byte is no option"),
        ({"replicas": "two"}, "replicas"),
    ],
)
def test_options_that_are_wrong_are_told_before_anything_starts(
    tiny_model: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build({"model": tiny_model, **options})


def test_the_command_line_of_serve_run_has_texts(tiny_model: Path) -> None:
    application = app({"model": str(tiny_model), "replicas": "3", "drain_seconds": "7", "adapter_bytes": "64M"})
    assert application is not None
    with pytest.raises(ValueError, match="drain_seconds: expected a number"):
        app({"model": str(tiny_model), "drain_seconds": "soon"})
