"""Two replicas on one store, on real Ray: where requests go, and what becomes of them when replicas come and go."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import ray

from service.ray.app import app, build
from service.ray.call import Pieces
from service.routing.choice import Server, Wanted, ranked
from tests.ray.cluster import NAME, Cluster, deploy, deployed
from tests.service.adapters.adapter_bundles import bundle, multipart

REPLICA = "x-replica"
PROMPTS = [f"caller {number}" for number in range(6)]


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


def both(cluster: Cluster) -> set[str]:
    """The names of the replicas, once both answer: one that is slow at the moment is passed over."""
    found: set[str] = set()
    wait_until(lambda: len(found.update(shown(cluster)) or found) == 2)
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


class Callers:
    """Threads, each of which sends its prompt again and again until the block ends."""

    def __init__(self, url: httpx.URL, prompts: Iterable[str] = PROMPTS, **body: object) -> None:
        self._url, self._body = url, {"model": NAME, "max_tokens": 2, **body}
        self._statuses, self._stop = Counter[str](), threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(prompt,)) for prompt in prompts]

    def __enter__(self) -> Counter[str]:
        for thread in self._threads:
            thread.start()
        return self._statuses

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, prompt: str) -> None:
        body = self._body | {"prompt": prompt}
        with httpx.Client(base_url=self._url, timeout=120) as own:
            while not self._stop.is_set():
                self._statuses[outcome(own.post("/v1/completions", json=body), body)] += 1


def outcome(response: httpx.Response, body: dict[str, object]) -> str:
    """Whether the fake engine's answer is whole, its prompt over and over to the last token; or what it is instead."""
    if response.status_code == 200 and body.get("stream"):
        *found, last = events(response)
        tokens = len(found) if last == "data: [DONE]" else 0
        text = "".join(event["choices"][0]["text"] for event in found if "choices" in event)
    elif response.status_code == 200:
        text, tokens = response.json()["choices"][0]["text"], response.json()["usage"]["completion_tokens"]
    else:
        text, tokens = "", 0
    whole = tokens == body["max_tokens"] and (f"{body['prompt']}" * tokens).startswith(text)
    return "whole" if whole else f"{response.status_code} {response.text[-200:]}"


def test_calls_that_have_ended_count_no_longer(cluster: Cluster) -> None:
    """Short ones end before the router has noted where they went: what it remembered of them would crowd their home."""
    with Callers(cluster.client.base_url, ["hello"] * 6) as statuses:
        wait_until(lambda: statuses.total() > 600)
    assert set(statuses) == {"whole"}, statuses
    time.sleep(1)
    asked = Counter(cluster.client.get("/routing").headers[REPLICA] for _ in range(40))
    assert len(asked) == 2, asked


def test_an_engine_that_dies_is_restarted_by_its_replica_and_others_serve_meanwhile(cluster: Cluster) -> None:
    before = both(cluster)
    died = cluster.client.post("/v1/completions", json={"model": NAME, "prompt": "hello", "cache_salt": "die"})
    assert (died.status_code, died.json()["error"]["code"]) == (503, "engine_died")
    with Callers(cluster.client.base_url) as statuses:  # the routers do not know it yet
        wait_until(lambda: statuses.total() > 50)
        wait_until(lambda: set(shown(cluster)) == before)  # none is replaced
    assert set(statuses) == {"whole"}, statuses


def test_a_replica_that_is_killed_ends_its_streams_with_an_error_event_and_is_replaced(cluster: Cluster) -> None:
    body = {"model": NAME, "prompt": "hello world", "stream": True, "cache_salt": "hold", "max_tokens": 9}
    with Callers(cluster.client.base_url) as statuses:
        with cluster.client.stream("POST", "/v1/completions", json=body) as response:
            found = events(response)
            next(found)
            wait_until(lambda: statuses.total() > 50)
            before = statuses.total()
            cluster.kill(response.headers[REPLICA])
            last = list(found)
        wait_until(lambda: response.headers[REPLICA] not in shown(cluster) and len(shown(cluster)) == 2, 120)
    assert [event["error"]["code"] for event in last] == ["engine_died"]
    assert set(statuses) == {"whole"}, statuses
    assert statuses.total() > before + 20, "calls were answered while one replica was missing"


def test_a_call_of_which_nothing_was_answered_is_sent_to_another_replica(cluster: Cluster) -> None:
    before = both(cluster)
    body = {"model": NAME, "prompt": "hello", "cache_salt": "slow", "max_tokens": 40}
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(httpx.post, f"{cluster.client.base_url}/v1/completions", json=body, timeout=120)]
        wait_until(lambda: any(in_flight(cluster, replica) for replica in before))
        [killed] = [replica for replica in before if in_flight(cluster, replica)]
        cluster.kill(killed)
        answers = [call.result() for call in calls]
    assert [outcome(answer, body) for answer in answers] == ["whole"]
    assert answers[0].headers[REPLICA] != killed
    wait_until(lambda: killed not in shown(cluster) and len(shown(cluster)) == 2, 120)


def test_an_upload_whose_replica_dies_in_the_middle_is_refused_and_can_be_sent_again(cluster: Cluster) -> None:
    """Its home, as the idle replicas' router finds it, has read the first pieces: nobody has them any more."""
    name, servers = "torn", [Server(id=replica) for replica in both(cluster)]
    home = ranked(Wanted((name,)), servers)[0].id
    request = cluster.client.build_request("PUT", f"/adapters/{name}", files=multipart(*bundle(14)))
    content = request.read()

    def pieces() -> Iterator[bytes]:
        yield content[:200]
        time.sleep(2)
        cluster.kill(home)
        time.sleep(1)
        yield content[200:]

    headers = {"content-type": request.headers["content-type"]}
    lost = cluster.client.put(f"/adapters/{name}", content=pieces(), headers=headers)
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine_died")
    assert upload(cluster, name, 14).status_code == 201
    wait_until(lambda: home not in shown(cluster) and len(shown(cluster)) == 2, 120)


def test_a_body_that_nobody_has_begun_to_read_goes_to_another_attempt(cluster: Cluster) -> None:
    pieces = Pieces.remote()
    first, second = ({"type": "http.request", "body": body, "more_body": True} for body in (b"first", b"second"))
    waits = pieces.take.remote("upload", 0)
    assert ray.get(pieces.repeat.remote("upload", 1))
    assert ray.get(waits) == {"type": "http.disconnect"}
    ray.get([pieces.put.remote("upload", first), pieces.put.remote("upload", second)])
    assert ray.get(pieces.take.remote("upload", 0)) == {"type": "http.disconnect"}
    assert ray.get(pieces.take.remote("upload", 1)) == first
    assert not ray.get(pieces.repeat.remote("upload", 2)), "its first piece is gone"
    assert ray.get(pieces.take.remote("upload", 1)) == second


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
            thread = threading.Thread(target=lambda: deploy(tiny_model, tmp_path / "data", replicas=1))
            thread.start()
            ends = [list(events(response))[-1] for response in responses]
            thread.join()
        assert [end["error"]["code"] for end in ends] == ["timeout"] * 12, "their own end, not the replica's"
        wait_until(lambda: cluster.running() == 1)


def test_a_rolling_update_cuts_no_stream_and_fails_no_call(
    client: httpx.Client, tiny_model: Path, tmp_path: Path
) -> None:
    """The ingress is replaced too: streams of 18 s run through it, shorter answers come one after the other."""
    with deployed(client, tiny_model, tmp_path, drain_seconds=60) as cluster:
        before, url = both(cluster), f"{client.base_url}/v1/completions"
        slow = {"model": NAME, "stream": True, "cache_salt": "slow", "max_tokens": 180}
        asked = [slow | {"prompt": f"number {number}"} for number in range(8)]
        with (
            ThreadPoolExecutor(8) as threads,
            Callers(client.base_url, PROMPTS[:3], cache_salt="slow", max_tokens=20) as answers,
            Callers(client.base_url, PROMPTS[:3], cache_salt="slow", max_tokens=20, stream=True) as streamed,
        ):
            streams = [threads.submit(httpx.post, url, json=body, timeout=120) for body in asked]
            wait_until(lambda: all(in_flight(cluster, replica) for replica in before))
            deploy(tiny_model, tmp_path, drain_seconds=60, max_waiting=99)
            wait_until(lambda: len(shown(cluster)) == 2 and not before & set(shown(cluster)), 120)
            ended = [stream.result() for stream in streams]
        assert [outcome(*each) for each in zip(ended, asked, strict=True)] == ["whole"] * 8
        assert {stream.headers[REPLICA] for stream in ended} == before
        assert (set(answers), set(streamed)) == ({"whole"}, {"whole"}), (answers, streamed)


def test_replicas_follow_the_time_that_requests_wait_and_no_stream_is_lost(
    client: httpx.Client, tiny_model: Path, tmp_path: Path
) -> None:
    sizes = {"replicas": 1, "max_replicas": 2, "upscale_seconds": 1.0, "downscale_seconds": 2.0, "max_running": 8}
    with (
        deployed(client, tiny_model, tmp_path, drain_seconds=60, **sizes) as cluster,
        ThreadPoolExecutor(16) as threads,
    ):
        assert cluster.running() == 1
        url, body = f"{client.base_url}/v1/completions", {"model": NAME, "prompt": "hello", "max_tokens": 9}
        silent = body | {"cache_salt": "silent", "timeout": 20}
        waiting = [threads.submit(httpx.post, url, json=silent, timeout=120) for _ in range(12)]
        wait_until(lambda: cluster.running() == 2)
        assert [each.result().status_code for each in waiting] == [504] * 12, "their own time limit"
        both(cluster)  # the queue of the first one is known to be gone
        prompts = {cluster.complete(NAME, f"{number} ").headers[REPLICA]: f"{number} " for number in range(20)}
        assert len(prompts) == 2
        slow = {"cache_salt": "slow", "stream": True, "max_tokens": 60}
        with Callers(client.base_url, prompts.values(), **slow) as streams:  # one on each replica at all times
            wait_until(lambda: cluster.running() == 1)
        assert set(streams) == {"whole"}, streams
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
