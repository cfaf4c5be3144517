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
from service.engine.adapters import RequestFailed
from service.engine.client import EngineClient
from tests.service.engine import fake_engine


@pytest.fixture
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_model))


@asynccontextmanager
async def started(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = EngineClient(config, fake_engine.COMMAND)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def code_of(work: Coroutine[Any, Any, None]) -> str | None:
    """Why something was refused, None if it was not."""
    try:
        await work
    except RequestFailed as error:
        return error.code
    return None


def test_the_state_of_an_adapter_is_known_until_it_is_retired(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            stages: list[dict[str, float]] = []
            client.on_load = stages.append
            (file := tmp_path / "file").write_bytes(b"x")
            client.register_adapter("d1", file)
            await client.bring_adapter("d1", "host")
            assert client.adapter_states["d1"].tier == "host"
            await client.bring_adapter("d1", "device")
            assert client.adapter_states["d1"].tier == "device"
            assert [set(seconds) for seconds in stages] == [{"read", "pack"}, {"read", "pack", "copy"}]
            await client.unload_adapter("d1", "device")
            assert client.adapter_states["d1"].tier == "host"
            client.retire_adapter("d1")
            await client.stats()  # answered after what was sent before it
            assert client.adapter_states == {}

    asyncio.run(run())


def test_a_file_that_the_engine_wants_is_brought_and_the_load_goes_on(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            file = tmp_path / "file"

            def bring(digest: str) -> None:
                file.write_bytes(b"x")
                client.register_adapter(digest, file)

            client.on_wanted = bring
            client.register_adapter("d1", file)
            await client.bring_adapter("d1", "device")

    asyncio.run(run())


def test_a_file_that_cannot_be_had_fails_who_waits_with_the_reason(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            client.on_wanted = lambda digest: client.fail_adapter(digest, "the bucket is gone")
            client.register_adapter("d1", tmp_path / "nowhere")
            with pytest.raises(RequestFailed, match="the bucket is gone"):
                await client.bring_adapter("d1", "device")
            assert client.adapter_states["d1"].state == "failed"

    asyncio.run(run())


def test_who_waits_for_an_adapter_that_is_retired_or_whose_engine_dies_is_told(
    config: EngineConfig, tmp_path: Path
) -> None:
    async def run() -> None:
        async with started(config) as client:
            codes = []
            for end in (lambda: client.retire_adapter("d1"), lambda: os.kill(client.pid or 0, signal.SIGKILL)):
                client.register_adapter("d1", tmp_path / "nowhere")
                waiting = asyncio.create_task(code_of(client.bring_adapter("d1", "device")))
                await asyncio.sleep(0)
                end()
                codes.append(await waiting)
            assert codes == ["unknown_adapter", "engine_died"]
            assert await code_of(client.bring_adapter("d1", "device")) == "engine_unavailable"
            assert await code_of(client.unload_adapter("d1", "host")) == "engine_unavailable"

    asyncio.run(run())


def test_the_engine_s_refusals_come_back_as_they_are(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            for digest in ("d1", "d2"):
                client.register_adapter(digest, file)
            assert await code_of(client.pin_adapter("d1", "device")) is None
            assert await code_of(client.pin_adapter("d2", "device")) == "pins_full"
            assert await code_of(client.unload_adapter("d1", "device")) == "adapter_pinned"
            assert await code_of(client.pin_adapter("d1", None)) is None
            assert await code_of(client.pin_adapter("d2", "host")) is None

    asyncio.run(run())


def test_a_new_engine_is_told_of_all_adapters_and_pins_again(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        async with started(config) as client:
            (file := tmp_path / "file").write_bytes(b"x")
            client.register_adapter("d1", file)
            client.register_adapter("d2", file)
            await client.pin_adapter("d1", "device")
            assert await code_of(client.pin_adapter("d2", "device")) == "pins_full"
            pid = client.pid
            os.kill(pid or 0, signal.SIGKILL)
            async with asyncio.timeout(30):
                while client.pid == pid or not client.serving:
                    await asyncio.to_thread(file.read_bytes)  # something that takes a while
            await client.stats()
            assert client.adapter_states["d1"].pinned == "device"
            assert client.adapter_states["d2"].pinned is None

    asyncio.run(run())


def test_a_pin_without_an_engine_is_made_when_one_starts(config: EngineConfig, tmp_path: Path) -> None:
    async def run() -> None:
        (file := tmp_path / "file").write_bytes(b"x")
        client = EngineClient(config, fake_engine.COMMAND)
        client.register_adapter("d1", file)
        await client.pin_adapter("d1", "host")
        await client.start()
        await client.stats()
        assert client.adapter_states["d1"].pinned == "host"
        await client.close()

    asyncio.run(run())
