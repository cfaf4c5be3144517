"""vLLM's calls that pause the engine or clear its cache, on the fake engine."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import error
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until


@pytest.fixture
def live(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(fake_settings(tiny_model, tmp_path)) as running:
        yield running


def is_paused(live: LiveServer) -> bool:
    found: bool = live.client.get("/is_paused").json()["is_paused"]
    return found


def test_requests_wait_while_the_engine_is_paused_and_go_on_afterwards(live: LiveServer) -> None:
    assert not is_paused(live)
    answer = live.client.post("/pause?mode=keep")
    assert (answer.status_code, answer.json(), is_paused(live)) == (200, {"status": "paused"}, True)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(live.complete, "hello world", max_tokens=4)
        wait_until(
            lambda: re.search(r"vllm:num_requests_waiting{.*} 1.0", live.client.get("/metrics").text) is not None
        )
        assert not asked.done()
        assert live.client.post("/resume").json() == {"status": "resumed"}
        assert asked.result(20).json()["choices"][0]["text"] == "hello worldhello world"
    assert not is_paused(live)


def test_a_pause_ends_what_runs_unless_it_is_to_be_kept(live: LiveServer) -> None:
    with live.client.stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "hello", "cache_salt": "hold", "stream": True}
    ) as held:
        lines = held.iter_lines()
        next(lines)
        assert live.client.post("/pause").json() == {"status": "paused"}
        assert "generation_paused" in "".join(lines)
    live.client.post("/resume")
    assert live.complete("hello", max_tokens=1).status_code == 200


def cached(live: LiveServer) -> int:
    blocks: int = live.client.get("/kv").json()["blocks"]["cached"]
    return blocks


@pytest.mark.parametrize("call", ["/reset_prefix_cache", "/pause", "/pause?clear_cache=false"])
def test_the_cache_of_the_base_and_of_all_adapters_is_dropped(live: LiveServer, call: str) -> None:
    live.client.put("/adapters/poet", files=multipart(*bundle()))
    text = "more than sixteen characters of a prompt, so that it fills a block or two"
    for model in ("tiny", "poet"):
        live.post("/v1/completions", model=model, prompt=text, max_tokens=1)
    assert live.post("/kv/prefixes", model="poet", prompt=text, ttl_seconds=60).status_code == 201
    assert cached(live) > 0
    answer = live.client.post(call)
    assert answer.status_code == 200
    if "false" not in call:
        assert cached(live) == 0
        wait_until(lambda: live.client.get("/kv/prefixes").json()["prefixes"] == [])
    else:
        assert cached(live) > 0
        assert len(live.client.get("/kv/prefixes").json()["prefixes"]) == 1


def test_another_engine_is_not_paused(live: LiveServer) -> None:
    live.client.post("/pause?mode=keep")
    pid = live.services.engine.pid
    live.complete("hello", cache_salt="die")
    wait_until(lambda: live.services.engine.ready is not None and live.services.engine.pid != pid)
    assert not is_paused(live)
    assert live.complete("hello", max_tokens=1).status_code == 200


def test_what_cannot_be_done_is_refused_with_what_can(live: LiveServer) -> None:
    for query, param in (("mode=wait", "mode"), ("wait_for_inflight_requests=true", "wait_for_inflight_requests")):
        assert error(live.client.post(f"/pause?{query}")) == (400, "unsupported_parameter", param)
    assert error(live.client.post("/pause?mode=stop")) == (400, "invalid_query", "mode")
    assert not is_paused(live)
    asleep = live.client.post("/sleep?level=1")
    assert error(asleep) == (501, "not_implemented", None)
    assert "/pause" in asleep.json()["error"]["message"]
    assert live.client.get("/is_sleeping").json() == {"is_sleeping": False}
    assert live.client.post("/wake_up").status_code == 200
    assert live.client.get("/get_world_size?include_dp=false").json() == {"world_size": 1}
