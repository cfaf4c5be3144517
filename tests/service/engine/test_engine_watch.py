"""The watch over the engine: one that hangs or fails for good is replaced, and none outlives its service."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from service.engine.client import EngineClient
from service.engine.process import LEAST_SILENCE_SECONDS, MOST_SILENCE_SECONDS, WATCH_SECONDS, Silence
from service.errors import EngineError
from service.metrics import Metrics
from tests.service.engine import fake_engine
from tests.service.engine.test_engine_client import alive, collect, generate
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

FAILING = (sys.executable, "-m", "tests.runtime.failing_engine")
WORDS = {"hung": "no sign of life for", "failed": "the device failed", "died": "signal SIGKILL"}


async def outlived(client: EngineClient, ending: asyncio.Task) -> tuple[str, str]:
    """Wait until a request has failed with its engine and another one serves; the request's error."""
    old = client.pid
    with pytest.raises(EngineError) as failure:
        await ending
    assert client.ready is None, "an engine that is gone is not ready"
    await asyncio.to_thread(wait_until, lambda: client.ready is not None)
    assert client.pid != old
    assert not alive(old)
    assert len(await collect(client, generate())) == 3
    return failure.value.code, failure.value.message


@pytest.mark.parametrize("kind", WORDS)
def test_an_engine_that_hangs_fails_or_dies_ends_its_requests_and_is_replaced(tiny_model: Path, kind: str) -> None:
    async def run() -> None:
        metrics = Metrics()
        client = EngineClient(EngineConfig(model=str(tiny_model)), fake_engine.COMMAND, metrics, timeout_seconds=2)
        await client.start()
        script = {"failed": "break"}.get(kind, "silent")
        ending = asyncio.create_task(collect(client, generate("r", script=script)))
        if kind != "failed":
            while (await client.stats()).running == 0:
                pass
            os.kill(client.pid or 0, signal.SIGSTOP if kind == "hung" else signal.SIGKILL)
        code, message = await outlived(client, ending)
        assert code == "engine_died"
        assert f"the engine {kind} (" in message
        assert WORDS[kind] in message
        found = {each: metrics.engine_ends[each]._value.get() for each in WORDS}
        assert found == {each: float(each == kind) for each in WORDS}
        await client.close()

    asyncio.run(run())


def test_a_device_that_fails_ends_the_engine_with_its_reason_and_another_one_starts(tiny_model: Path) -> None:
    """The real engine, on a runner that fails as a CUDA device does."""

    async def run() -> None:
        config = EngineConfig(model=str(tiny_model), load_format="dummy", threads=1, max_model_len=128)
        client = EngineClient(config, FAILING, Metrics())
        await client.start()
        code, message = await outlived(client, asyncio.create_task(collect(client, generate("r", prompt=13))))
        assert code == "engine_died"
        assert "CUDA error: an illegal memory access was encountered" in message
        await client.close()

    asyncio.run(run())


def up(server: LiveServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("rootstock_engine_up ")).rsplit(" ", 1)[1])


def test_readiness_and_metrics_say_that_an_engine_hangs(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path, engine_timeout_seconds=3.0)) as server:
        assert server.client.get("/health/ready").status_code == 200
        assert up(server) == 1.0
        pid = server.services.engine.pid
        os.kill(pid, signal.SIGSTOP)
        ended = server.complete("hello", max_tokens=3)
        assert (ended.status_code, ended.json()["error"]["code"]) == (503, "engine_died")
        assert int(ended.headers["retry-after"]) >= 1
        wait_until(lambda: server.client.get("/health/ready").status_code == 200)
        assert server.complete("hello", max_tokens=3).status_code == 200
        assert not alive(pid)
        text = server.client.get("/metrics").text
        assert 'rootstock_engine_restarts_total{reason="hung"} 1.0' in text


def test_what_a_silent_engine_said_last_is_not_told_as_current(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.client.SILENT_SECONDS", 1.0)
    with live_server(fake_settings(tiny_model, tmp_path)) as server:
        assert "vllm:kv_cache_usage_perc" in server.client.get("/metrics").text
        os.kill(server.services.engine.pid, signal.SIGSTOP)
        wait_until(lambda: up(server) == 0.0)
        assert "vllm:kv_cache_usage_perc" not in server.client.get("/metrics").text
        os.kill(server.services.engine.pid, signal.SIGCONT)
        wait_until(lambda: up(server) == 1.0)
        assert "vllm:kv_cache_usage_perc" in server.client.get("/metrics").text


def test_a_silence_is_too_long_by_what_was_seen_before() -> None:
    silence, now = Silence(0.0), 0.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        for _ in range(int(seconds / WATCH_SECONDS)):
            now += WATCH_SECONDS
            silence.tick(now)

    pass_time(LEAST_SILENCE_SECONDS)
    assert not silence.is_too_long(None)
    assert silence.is_too_long(20.0)
    pass_time(1)
    assert silence.is_too_long(None)
    silence.end()
    pass_time(10 * LEAST_SILENCE_SECONDS)
    assert not silence.is_too_long(None), "a step has taken ten times less"
    silence.end()
    pass_time(MOST_SILENCE_SECONDS + 1)
    assert silence.is_too_long(None)
    silence.end()
    silence.tick(now + 3600)
    assert silence.seconds <= 2 * WATCH_SECONDS, "the service was held up, so it could hear nothing"


PARENT = """
import asyncio
import sys

from runtime.config import EngineConfig
from service.engine.process import EngineProcess

async def run():
    engine = EngineProcess((sys.executable, "-m", "runtime.process"))
    config = EngineConfig(model=sys.argv[1], load_format="dummy", threads=1, max_model_len=128)
    starting = asyncio.create_task(engine.start(config, print))
    while engine.pid is None:
        await asyncio.sleep(0)
    print(engine.pid, flush=True)
    await starting
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(run())
"""


def runs(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_an_engine_ends_when_its_service_is_killed_at_any_moment_of_the_start(tiny_model: Path) -> None:
    """Wherever a moment falls: in the interpreter's start, in the imports, while it loads, when it is ready."""
    moments = (0.0, 0.1, 0.5, 1.5, 3.0, None)  # seconds after its start; None: when it is ready
    command = (sys.executable, "-c", PARENT, str(tiny_model))
    for moment in moments:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            if moment is None:
                assert parent.stdout.readline() == "ready\n"
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    parent.wait(moment)
            parent.kill()
        wait_until(lambda pid=pid: not runs(pid))
