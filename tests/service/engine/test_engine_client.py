"""The engine's client alone: its process begins and ends with it, and says why it could not begin."""

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.messages import Generate, SamplingParams, Tokens
from service.engine.client import EngineClient
from service.engine.process import EngineStartFailed
from service.errors import EngineError
from service.metrics import Metrics
from tests.service.engine import fake_engine
from tests.service.live_server import wait_until


def alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


def generate(request_id: str = "r", prompt: int = 5, script: str = "", max_tokens: int = 3) -> Generate:
    params = SamplingParams(max_tokens=max_tokens)
    return Generate(request_id=request_id, token_ids=[prompt], params=params, cache_salt=script)


async def collect(client: EngineClient, command: Generate) -> list[Tokens]:
    async with aclosing(client.generate(command)) as events:
        return [event async for event in events]


@pytest.fixture
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_model))


def test_an_engine_lives_from_start_to_close(config: EngineConfig) -> None:
    async def run() -> int | None:
        client = EngineClient(config, fake_engine.COMMAND, Metrics())
        await client.start()
        pid = client.pid
        assert alive(pid)
        assert client.ready is not None
        assert client.ready.max_model_len == fake_engine.CONTEXT
        tokens = await collect(client, generate())
        assert [event.token_ids for event in tokens] == [[5], [5], [5]]
        assert tokens[-1].finish_reason == "length"
        await client.close()
        return pid

    assert not alive(asyncio.run(run()))


def test_an_engine_that_cannot_start_says_why(config: EngineConfig) -> None:
    async def run(command: tuple[str, ...]) -> None:
        client = EngineClient(config, command, Metrics())
        try:
            await client.start()
        finally:
            await client.close()

    with pytest.raises(EngineStartFailed, match="no room for the weights"):
        asyncio.run(run((*fake_engine.COMMAND, "--cannot-start")))
    with pytest.raises(EngineStartFailed, match="cannot be run"):
        asyncio.run(run(("/nowhere/at/all",)))


def test_closing_before_the_engine_is_ready_leaves_no_process(config: EngineConfig, tmp_path: Path) -> None:
    """An engine that neither answers nor listens, as one that is loading its weights."""
    noted = tmp_path / "pid"
    program = f"import os, signal, pathlib; pathlib.Path({str(noted)!r}).write_text(str(os.getpid())); signal.pause()"

    async def run() -> None:
        client = EngineClient(config, (fake_engine.COMMAND[0], "-c", program), Metrics())
        starting = asyncio.create_task(client.start())
        await asyncio.to_thread(wait_until, lambda: noted.exists() and noted.read_text() != "")
        assert alive(int(noted.read_text()))
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.close()

    asyncio.run(run())
    assert not alive(int(noted.read_text()))


def test_closing_fails_what_still_runs(config: EngineConfig) -> None:
    async def run() -> str:
        client = EngineClient(config, fake_engine.COMMAND, Metrics())
        await client.start()
        held = asyncio.create_task(collect(client, generate(script="silent")))
        while (await client.stats()).running == 0:
            pass
        await client.close()
        with pytest.raises(EngineError) as failure:
            await held
        return failure.value.code

    assert asyncio.run(run()) == "shutting_down"


def test_an_abandoned_generator_aborts_its_request(config: EngineConfig) -> None:
    async def run() -> int:
        client = EngineClient(config, fake_engine.COMMAND, Metrics())
        await client.start()
        async with aclosing(client.generate(generate(script="hold"))) as events:
            await anext(events)
            assert (await client.stats()).running == 1
        running = (await client.stats()).running
        await client.close()
        return running

    assert asyncio.run(run()) == 0


def test_snapshots_asked_for_together_are_one(config: EngineConfig) -> None:
    async def run() -> None:
        client = EngineClient(config, fake_engine.COMMAND, Metrics())
        await client.start()
        first, second = await asyncio.gather(client.stats(), client.stats())
        assert first is second
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)  # so that it cannot answer first
        asked = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the engine died"):
            await asked
        await client.close()

    asyncio.run(run())
