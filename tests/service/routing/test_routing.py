"""GET /routing: what routers poll."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.keys.keyed_server import keyed_server, refusal
from tests.service.live_server import NAME, LiveServer, wait_until


def test_adapters_are_shown_by_name_where_they_are(server: LiveServer) -> None:
    digests = {}
    for seed, (name, query) in enumerate({"near": {}, "twin": {}, "far": {"preload": "false"}}.items()):
        seed = 0 if name == "twin" else seed
        shown = server.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)), params=query)
        digests[name] = shown.json()["digest"]
    near = {"tier": "device", "loading": False, "digest": digests["near"]}
    wait_until(lambda: server.client.get("/routing").json()["adapters"] == {"near": near, "twin": near})
    assert server.post("/adapters/near/unload", tier="device").status_code == 200
    on_host = near | {"tier": "host"}
    assert server.client.get("/routing").json()["adapters"] == {"near": on_host, "twin": on_host}
    assert server.post("/adapters/far/load", tier="host").status_code == 200
    assert server.client.get("/routing").json()["adapters"]["far"]["tier"] == "host"
    for name in digests:
        assert server.client.delete(f"/adapters/{name}").status_code == 204
    wait_until(lambda: server.client.get("/routing").json()["adapters"] == {})


def test_the_load_is_what_runs_and_waits_and_the_room_for_k_v(server: LiveServer) -> None:
    body = {"model": NAME, "prompt": "hello", "cache_salt": "hold", "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as held:
        assert held.status_code == 200
        shown = server.client.get("/routing").json()
        assert (shown["ready"], shown["draining"]) == (True, False)
        assert shown["running"] + shown["waiting"] == 1
        assert shown["places"] == server.services.engine.places
        assert shown["queue_seconds"] == 0.0
        assert shown["kv"]["blocks"] == 64
        assert shown["kv"]["block_size"] == 16
        assert shown["kv"]["age_seconds"] < 5
    wait_until(lambda: server.client.get("/routing").json()["running"] == 0)


def test_an_engine_in_a_long_step_holds_up_no_router(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    server.client.get("/routing")
    monkeypatch.setattr(server.services.engine, "recent_stats", never)
    began = time.monotonic()
    shown = server.client.get("/routing").json()
    assert time.monotonic() - began < 2
    assert shown["kv"]["age_seconds"] > 0, "the last snapshot is told, with its age"


def test_a_paused_engine_and_one_that_restarts_are_not_ready(server: LiveServer) -> None:
    server.client.post("/pause")
    assert not server.client.get("/routing").json()["ready"]
    server.client.post("/resume")
    assert server.client.get("/routing").json()["ready"]
    assert server.complete("hello", cache_salt="die").status_code == 503
    shown = server.client.get("/routing").json()
    assert (shown["ready"], shown["kv"]) == (False, None)
    wait_until(lambda: server.client.get("/routing").json()["ready"])


def test_a_key_sees_its_own_adapters_and_only_admin_the_room(tiny_model: Path, tmp_path: Path) -> None:
    keys = {
        "router": {"scopes": ["admin"]},
        "team": {"scopes": ["manage"], "adapter_prefix": "team-"},
        "user": {},
    }
    with keyed_server(tiny_model, tmp_path, keys) as keyed:
        assert keyed["team"].upload("team-poet").status_code == 201
        wait_until(lambda: keyed["router"].get("/routing").json()["adapters"].keys() == {"team-poet"})
        assert keyed["router"].get("/routing").json()["kv"] is not None
        shown = keyed["team"].get("/routing").json()
        assert (shown["adapters"].keys(), shown["kv"]) == ({"team-poet"}, None)
        assert refusal(keyed["user"].get("/routing")) == (403, "missing_scope")
