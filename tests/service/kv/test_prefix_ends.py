"""What ends held prefixes without anybody releasing them: their adapter, their engine, the service."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.alora_service import alora_server, put_adapter
from tests.service.kv.held_prefixes import error, get, gone, hold, in_flight, listed, post
from tests.service.live_server import LiveServer, wait_until


@pytest.fixture
def mortal(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A service of one's own, to be hurt."""
    with alora_server(tiny_model, tmp_path) as running:
        yield running


def test_a_held_prefix_keeps_its_version_in_use(mortal: LiveServer) -> None:
    old = put_adapter(mortal, "mine", seed=3)
    prefix = hold(mortal, "mine", prompt="hello")
    put_adapter(mortal, "mine", seed=4)
    assert get(mortal, prefix).json()["digest"] == old
    assert mortal.client.delete("/adapters/mine").status_code == 204
    draining = mortal.client.get("/adapters/mine").json()
    assert (draining["state"], draining["digest"], draining["requests_in_flight"]) == ("draining", old, 1)
    assert mortal.client.delete(f"/kv/prefixes/{prefix['id']}").status_code == 204
    assert mortal.client.get("/adapters/mine").status_code == 404


def test_a_forced_delete_ends_the_prefixes_of_the_adapter_and_no_others(mortal: LiveServer) -> None:
    put_adapter(mortal, "mine", seed=3)
    mine, other = hold(mortal, "mine", prompt="hello"), hold(mortal, prompt="hello")
    assert mortal.client.delete("/adapters/mine?force=true").status_code == 204
    assert gone(mortal, mine, "deleted")
    assert get(mortal, other).status_code == 200
    assert mortal.client.get("/kv").json()["blocks"]["held"] == 1
    assert mortal.client.get("/adapters/mine").status_code == 404


def test_a_prefix_that_kills_the_engine_gets_a_503(mortal: LiveServer) -> None:
    assert error(post(mortal, "plain", prompt="hello", cache_salt="die"))[:2] == (503, "engine_died")
    assert error(post(mortal, "plain", prompt="hello"))[:2] == (503, "engine_unavailable")
    assert in_flight(mortal, "plain") == 0


def test_prefixes_end_with_their_engine(mortal: LiveServer) -> None:
    prefix = hold(mortal, "plain", prompt="hello")
    os.kill(mortal.services.engine.pid, signal.SIGKILL)
    wait_until(lambda: gone(mortal, prefix, "engine died"))
    assert in_flight(mortal, "plain") == 0
    wait_until(lambda: mortal.client.get("/health/ready").status_code == 200)
    assert listed(mortal) == []
    assert hold(mortal, "plain", prompt="hello")["cached_tokens"] == 0


def test_a_service_that_ends_lets_go_of_what_is_held(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path) as running:
        hold(running, "plain", prompt="hello")
    running.services.catalog.versions.check()
    with alora_server(tiny_model, tmp_path) as running:
        assert listed(running) == []
