"""Metrics of the tiers of adapters, and of what their loads took."""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import msgspec
import pytest
from moto.server import ThreadedMotoServer
from prometheus_client.parser import text_string_to_metric_families

from runtime.messages import RankStats, Ready, Stats, TierStats
from service.catalog.record import AdapterRecord, AdapterVersion
from service.engine import client
from service.engine_metrics import MAX_LOADED, EngineMetrics
from service.metrics import Metrics
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    [only] = [value for given, value in found[name] if labels.items() <= given.items()]
    return only


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store on the loopback, where boto3's own chain finds it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"ACCESS_KEY_ID": "an-id", "SECRET_ACCESS_KEY": "a-secret", "DEFAULT_REGION": "us-east-1"}
    given |= {"ENDPOINT_URL_S3": f"http://{host}:{port}", "CONFIG_FILE": "/nowhere"}
    for name, text in given.items():
        monkeypatch.setenv(f"AWS_{name}", text)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield "s3://bucket/rootstock"
    server.stop()


def put(live: LiveServer, name: str, seed: int, **query: str) -> None:
    response = live.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)), params=query)
    assert response.status_code == 201, response.text


def test_each_tier_and_each_stage_of_a_load_is_counted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket(monkeypatch) as store:
        settings = fake_settings(tiny_model, tmp_path, store=store, disk_cache_bytes=1_000_000)
        with live_server(settings) as live:
            put(live, "pinned", 1, pin="true")
            put(live, "loaded", 2)
            put(live, "idle", 3, preload="false")
            live.post("/adapters/loaded/unload", tier="device")
            found = samples(live.client.get("/metrics").text)
        assert value(found, "rootstock_tier_adapters", tier="device") == 1
        assert value(found, "rootstock_tier_adapters", tier="host") == 2
        assert value(found, "rootstock_tier_adapters", tier="disk") == 3
        assert value(found, "rootstock_tier_bytes_total", tier="disk") == 1_000_000
        assert (
            0
            < value(found, "rootstock_tier_bytes_pinned", tier="disk")
            < value(found, "rootstock_tier_bytes_used", tier="disk")
        )
        assert value(found, "rootstock_tier_bytes_used", tier="device") == 100
        assert value(found, "rootstock_tier_bytes_pinned", tier="device") == 100
        for name, number in (("hits", 2), ("misses", 1), ("evictions", 3)):
            assert value(found, f"rootstock_tier_{name}_total", tier="host") == number
        for stage, number in (("read", 2), ("pack", 2), ("copy", 2)):
            assert value(found, "rootstock_adapter_load_seconds_count", stage=stage) >= number
        assert value(found, "vllm:lora_adapter_load_seconds_count", transition="activate") >= 2
        loaded = {
            (labels["adapter_name"], labels["level"], labels["pinned"], labels["rank"])
            for labels, _ in found["vllm:lora_adapter_loaded"]
        }
        assert loaded == {("pinned", "gpu", "true", "2"), ("loaded", "cpu", "false", "2")}

        with live_server(fake_settings(tiny_model, tmp_path, store=store, cache_directory=tmp_path / "other")) as live:
            assert {live.client.get(f"/adapters/{name}").json()["tier"] for name in ("idle", "loaded")} == {"remote"}
            assert live.post("/adapters/idle/load", tier="host").json()["tier"] == "host"
            found = samples(live.client.get("/metrics").text)
        assert value(found, "rootstock_adapter_load_seconds_count", stage="download") >= 1


def test_without_a_remote_store_there_is_no_disk_tier(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        found = samples(live.client.get("/metrics").text)
    assert {labels["tier"] for labels, _ in found["rootstock_tier_bytes_used"]} == {"device", "host"}


def version(number: int) -> AdapterVersion:
    record = AdapterRecord(
        name=f"poet-{number}",
        digest=f"{number:064x}",
        generation=1,
        kind="lora",
        rank=2,
        targets=["q_proj"],
        bytes=100,
        source="upload",
        created_at=0.0,
        pinned=False,
        warnings=[],
        base="",
    )
    return AdapterVersion(record, ephemeral=False)


def test_adapters_with_a_series_of_their_own_are_bounded() -> None:
    versions = [version(number) for number in range(3 * MAX_LOADED)]
    digests = [version.digest for version in versions]
    tier = TierStats(
        bytes_total=10, bytes_used=5, bytes_pinned=0, adapters=digests, loads=0, evictions=0, hits=0, misses=0
    )
    numbers = ("running", "waiting", "blocks_total", "blocks_used", "blocks_cached", "prompt_tokens", "cached_tokens")
    numbers += ("generated_tokens", "preemptions", "steps")
    stats = Stats(**dict.fromkeys(numbers, 0), device=tier, host=tier, running_adapters=[], waiting_adapters=[])
    sizes = dict.fromkeys(
        ("max_model_len", "vocab_size", "block_size", "num_blocks", "max_running", "max_batch_tokens", "adapter_bytes"),
        1,
    )
    ready = Ready(**sizes, dtype="float32", kernels="fake")
    found = samples(Metrics().render(EngineMetrics(stats, ready, "base", versions, None)).decode())
    assert len(found["vllm:lora_adapter_loaded"]) == MAX_LOADED
    assert len(found["vllm:lora_requests_info"]) == 1
    assert value(found, "vllm:num_gpu_loaded_lora_adapters") == 3 * MAX_LOADED
    assert not any(name.startswith("rootstock_rank_") for name in found), "there is one rank"
    ranks = msgspec.structs.replace(stats, ranks=RankStats(summed_bytes=4096, command_bytes=80))
    found = samples(Metrics().render(EngineMetrics(ranks, ready, "base", versions, None)).decode())
    assert value(found, "rootstock_rank_summed_bytes_total") == 4096
    assert value(found, "rootstock_rank_command_bytes_total") == 80


def test_the_gauges_are_the_sequences_in_flight_however_late_the_engine_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STATS_SECONDS", 0.1)
    with live_server(fake_settings(tiny_model, tmp_path)) as live, ExitStack() as streams:

        def gauges() -> tuple[float, float]:
            found = samples(live.client.get("/metrics").text)
            return value(found, "vllm:num_requests_running"), value(found, "vllm:num_requests_waiting")

        lines: list[Iterator[str]] = []  # a stream whose lines nobody reads any more is closed
        assert gauges() == (0, 0)
        held = {"model": "tiny", "prompt": "hello", "cache_salt": "hold", "stream": True}
        for _ in range(3):
            stream = streams.enter_context(live.client.stream("POST", "/v1/completions", json=held))
            lines.append(stream.iter_lines())
            assert next(lines[-1])
        assert gauges() == (3, 0)
        pid = live.services.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            live.services.engine._stats_at = -math.inf  # the last snapshot is old
            content = json.dumps(held).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(content)}\r\n\r\n".encode()
            for _ in range(4):
                streams.enter_context(live.connect(head + content))
            wait_until(lambda: gauges() == (3, 4))
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: gauges() == (7, 0))
