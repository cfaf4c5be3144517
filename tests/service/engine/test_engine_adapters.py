"""What the engine's client tells of adapters, and what it learns, over a process that speaks the messages."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.config import EngineConfig
from runtime.messages import AdapterState
from service.engine.adapters import EngineAdapters
from service.engine.client import EngineClient
from service.engine.connection import Connection
from service.errors import EngineError
from service.metrics import Metrics
from tests.service.engine import fake_engine


@pytest.fixture
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_model))


@asynccontextmanager
async def started(config: EngineConfig, metrics: Metrics | None = None) -> AsyncIterator[EngineClient]:
    client = EngineClient(config, fake_engine.COMMAND, metrics or Metrics())
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def code_of(work: Coroutine[Any, Any, None]) -> str | None:
    """Why something was refused, None if it was not."""
    try:
        await work
    except EngineError as error:
        return error.code
    return None


def test_the_stages_of_an_adapters_last_load_are_known_from_its_fetch_on() -> None:
    adapters = EngineAdapters(Connection(), Metrics())
    adapters.register("d1", Path("file"))
    adapters.on_state(AdapterState(digest="d1", state="idle", stages={"read": (1.0, 2.0), "copy": (2.0, 3.0)}))
    adapters.fetched("d1", 4.0, 5.0)
    adapters.on_state(AdapterState(digest="d1", state="loading", tier="host", stages={"read": (5.0, 6.0)}))
    adapters.on_state(AdapterState(digest="d1", state="idle", tier="device", stages={"copy": (7.0, 8.0)}))
    assert adapters.stages_of("d1") == {"fetch": (4.0, 5.0), "read": (5.0, 6.0), "copy": (7.0, 8.0)}
    adapters.retire("d1")
    adapters.fetched("d1", 9.0, 10.0)
    assert adapters.stages_of("d1") == adapters.stages_of(None) == {}


def test_the_state_of_an_adapter_is_known_until_it_is_retired(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        metrics = Metrics()
        async with started(config, metrics) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            client.adapters.register("d1", file)
            await client.adapters.load("d1", "host")
            assert client.adapters.states["d1"].tier == "host"
            await client.adapters.load("d1", "device")
            assert client.adapters.states["d1"].tier == "device"
            for stage, loads in (("read", 1), ("pack", 1), ("copy", 1)):
                count = f'rootstock_adapter_load_seconds_count{{stage="{stage}"}} {loads}.0'
                assert count in metrics.render().decode()
            await client.adapters.unload("d1", "device")
            assert client.adapters.states["d1"].tier == "host"
            client.adapters.retire("d1")
            await client.stats()  # answered after what was sent before it
            assert client.adapters.states == {}

    asyncio.run(run())


def test_a_file_that_the_engine_wants_is_brought_and_the_load_goes_on(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            file = tmp_path / "file"
            client.adapters.register("d1", file)
            loading = asyncio.create_task(client.adapters.load("d1", "device"))
            while (await client.adapters.changes.get()).now.state != "missing":
                pass
            file.write_bytes(b"x")
            client.adapters.register("d1", file)
            await loading

    asyncio.run(run())


def test_a_file_that_cannot_be_had_fails_who_waits_with_the_reason(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            client.adapters.register("d1", tmp_path / "nowhere")
            loading = asyncio.create_task(client.adapters.load("d1", "device"))
            while (await client.adapters.changes.get()).now.state != "missing":
                pass
            client.adapters.fail("d1", "the bucket is gone")
            with pytest.raises(EngineError, match="the bucket is gone"):
                await loading
            assert client.adapters.states["d1"].state == "failed"

    asyncio.run(run())


def test_who_waits_for_an_adapter_that_is_retired_or_whose_engine_dies_is_told(
    config: EngineConfig, tmp_path: Path
) -> None:
    async def run() -> None:
        async with started(config) as client:
            codes = []
            for end in (lambda: client.adapters.retire("d1"), lambda: os.kill(client.pid or 0, signal.SIGKILL)):
                client.adapters.register("d1", tmp_path / "nowhere")
                waiting = asyncio.create_task(code_of(client.adapters.load("d1", "device")))
                await asyncio.sleep(0)
                end()
                codes.append(await waiting)
            assert codes == ["unknown_adapter", "engine_died"]
            assert await code_of(client.adapters.load("d1", "device")) == "engine_unavailable"
            assert await code_of(client.adapters.unload("d1", "host")) == "engine_unavailable"

    asyncio.run(run())


def test_the_engine_s_refusals_come_back_as_they_are(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            for digest in ("d1", "d2"):
                client.adapters.register(digest, file)
            assert await client.adapters.set_pins({"d1": "device"}) == {}
            refused = await client.adapters.set_pins({"d1": "device", "d2": "device", "d3": "host"})
            assert {digest: refusal.code for digest, refusal in refused.items()} == {
                "d2": "pins_full",
                "d3": "unknown_adapter",
            }
            assert await code_of(client.adapters.unload("d1", "device")) == "adapter_pinned"
            assert await client.adapters.set_pins({"d2": "host"}) == {}
            assert await code_of(client.adapters.unload("d1", "device")) is None

    asyncio.run(run())


def test_a_new_engine_is_told_of_all_adapters_and_pins_again(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            client.adapters.register("d1", file)
            client.adapters.register("d2", file)
            assert await client.adapters.set_pins({"d1": "device"}) == {}
            pid = client.pid
            os.kill(pid or 0, signal.SIGKILL)
            async with asyncio.timeout(30):
                while client.pid == pid or client.ready is None:
                    await asyncio.to_thread(file.read_bytes)  # something that takes a while
            await client.stats()
            assert client.adapters.states["d1"].pinned == "device"
            assert client.adapters.states["d2"].pinned is None

    asyncio.run(run())


def test_pins_asked_for_while_no_engine_runs_are_refused_and_go_to_the_next_one(
    config: EngineConfig, tmp_path: Path
) -> None:
    async def run() -> None:
        async with started(config) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            client.adapters.register("d1", file)
            pid = client.pid
            os.kill(pid or 0, signal.SIGKILL)
            async with asyncio.timeout(30):
                while client.ready is not None:
                    await asyncio.to_thread(file.read_bytes)  # something that takes a while
                with pytest.raises(EngineError) as failed:
                    await client.adapters.set_pins({"d1": "host"})
                assert failed.value.code == "engine_unavailable"
                while client.ready is None:
                    await asyncio.to_thread(file.read_bytes)
            await client.stats()
            assert client.adapters.states["d1"].pinned == "host"

    asyncio.run(run())


def test_a_pin_without_an_engine_is_made_when_one_starts(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        (file := tmp_path / "file").write_bytes(b"x")
        client = EngineClient(config, fake_engine.COMMAND, Metrics())
        client.adapters.register("d1", file)
        assert await client.adapters.set_pins({"d1": "host"}) == {}
        await client.start()
        await client.stats()
        assert client.adapters.states["d1"].pinned == "host"
        await client.close()

    asyncio.run(run())
