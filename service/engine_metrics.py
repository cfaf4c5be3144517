"""A snapshot of the engine and of the adapter tiers, as metrics."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.messages import Ready, Stats
from service.catalog.record import AdapterVersion
from service.metrics import ENGINE, VLLM_LABELS
from storage.cache import DiskCache

MAX_LOADED = 100  # adapters with a series that shows their tier


class TierCounts(NamedTuple):
    """The figures of one tier: device and host memory belong to the engine, disk to the service."""

    bytes_used: int
    bytes_total: int
    bytes_pinned: int
    adapters: int
    hits: int
    misses: int
    evictions: int


class InFlightMetrics(Collector):
    """The sequences in flight as the service counts them, under vLLM's names; `model` is the name of the base."""

    def __init__(self, running: int, waiting: int, model: str) -> None:
        self._running, self._waiting, self._model = running, waiting, model

    def collect(self) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", self._running),
            ("num_requests_waiting", "Sequences queued.", self._waiting),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=VLLM_LABELS)
            gauge.add_metric([self._model, ENGINE], value)
            yield gauge


class EngineMetrics(Collector):
    """A snapshot as metrics, under vLLM's names where inference routers read them.

    `model` is the name of the base, `versions` are the named adapters, `disk` is the disk cache of a remote store.
    """

    def __init__(
        self, stats: Stats, ready: Ready, model: str, versions: Sequence[AdapterVersion], disk: DiskCache | None
    ):
        self._stats, self._ready, self._model, self._disk = stats, ready, model, disk
        self._named: dict[str, list[AdapterVersion]] = {}
        for version in versions:
            self._named.setdefault(version.digest, []).append(version)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        labels = [self._model, ENGINE]
        for name, text, value in (("kv_cache_usage_perc", "KV blocks in use, 1 is all.", used),):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=VLLM_LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts that were computed or reused.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("prefix_cache_queries", "Tokens looked for in the prefix cache.", stats.prompt_tokens),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.cached_tokens),
            ("num_preemptions", "Sequences set back: blocks ran out, or another client had none.", stats.preemptions),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=VLLM_LABELS)
            counter.add_metric(labels, count)
            yield counter
        shape = {"block_size": str(self._ready.block_size), "num_gpu_blocks": str(self._ready.num_blocks)}
        yield InfoMetricFamily("vllm:cache_config", "The shape of the KV cache.", {"engine": ENGINE, **shape})
        yield GaugeMetricFamily("rootstock_blocks_cached", "Free KV blocks that can be hit.", stats.blocks_cached)
        yield GaugeMetricFamily(
            "rootstock_blocks_held", "KV blocks that are kept for held prefixes.", stats.blocks_held
        )
        for name, text, count in (
            ("steps", "Batches computed.", stats.steps),
            ("preemptions", "Sequences set back: blocks ran out, or another client had none.", stats.preemptions),
            ("adapter_loads", "Adapters made resident on the device.", stats.device.loads),
        ):
            yield CounterMetricFamily(f"rootstock_{name}", text, count)
        if (ranks := stats.ranks) is not None:
            for name, text, count in (
                ("summed_bytes", "Bytes that each rank has given to sums over all ranks.", ranks.summed_bytes),
                ("command_bytes", "Bytes of commands from rank 0 to the others.", ranks.command_bytes),
            ):
                yield CounterMetricFamily(f"rootstock_rank_{name}", text, count)
        yield from self._host_kv()
        yield from self._adapters()
        yield from self._tiers()

    def _host_kv(self) -> Iterator[Metric]:
        host = self._stats.host_kv
        for name, text, value in (
            ("bytes_used", "Bytes of KV blocks in host memory.", host.bytes_used),
            ("bytes_total", "Bytes that KV blocks may take in host memory; 0 without this tier.", host.bytes_total),
            ("blocks", "KV blocks in host memory.", host.blocks),
        ):
            yield GaugeMetricFamily(f"rootstock_host_kv_{name}", text, value)
        for name, text, value in (
            ("stores", "KV blocks that were offloaded to host memory.", host.stores),
            ("loads", "KV blocks that were loaded back from host memory.", host.loads),
            ("evictions", "KV blocks that were evicted from host memory.", host.evictions),
        ):
            yield CounterMetricFamily(f"rootstock_host_kv_{name}", text, value)

    def _adapters(self) -> Iterator[Metric]:
        yield self._lora_requests()
        yield self._loaded()
        for level, held in (("gpu", self._stats.device), ("cpu", self._stats.host)):
            text = f"Adapters resident at the level {level}."
            family = GaugeMetricFamily(f"vllm:num_{level}_loaded_lora_adapters", text, labels=["model_name"])
            family.add_metric([self._model], len(held.adapters))
            yield family

    def _lora_requests(self) -> GaugeMetricFamily:
        """A single series: routers read the resident adapters (`running`) and the waiting ones from its labels."""
        labels = {
            "max_lora": str(self._capacity()),
            "running_lora_adapters": self._join(self._stats.device.adapters),
            "waiting_lora_adapters": self._join(self._stats.waiting_adapters),
        }
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters on this server.", labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family

    def _loaded(self) -> GaugeMetricFamily:
        """The level of each named adapter: `cpu` only if it is not on the device as well."""
        labels = ["adapter_name", "level", "pinned", "rank"]
        family = GaugeMetricFamily("vllm:lora_adapter_loaded", "1 for each adapter in memory.", labels=labels)
        on_device = set(self._stats.device.adapters)
        only_host = [digest for digest in self._stats.host.adapters if digest not in on_device]
        held = [(digest, "gpu") for digest in self._stats.device.adapters] + [(digest, "cpu") for digest in only_host]
        found = [(version, level) for digest, level in held for version in self._named.get(digest, ())]
        for version, level in found[:MAX_LOADED]:
            record = version.record
            family.add_metric([record.name, level, str(record.pinned).lower(), str(record.rank)], 1)
        return family

    def _tiers(self) -> Iterator[Metric]:
        tiers = self._counted()
        for name, text in (
            ("bytes_used", "Bytes that adapters take in a tier."),
            ("bytes_total", "Bytes that adapters may take in a tier."),
            ("bytes_pinned", "Bytes of adapters that are never evicted."),
            ("adapters", "Adapters that a tier holds whole."),
        ):
            gauge = GaugeMetricFamily(f"rootstock_tier_{name}", text, labels=["tier"])
            for tier, counted in tiers.items():
                gauge.add_metric([tier], getattr(counted, name))
            yield gauge
        for name, text in (
            ("hits", "Adapters that were in the tier when a request needed them."),
            ("misses", "Adapters that were not in the tier when a request needed them."),
            ("evictions", "Adapters that were evicted from a tier."),
        ):
            counter = CounterMetricFamily(f"rootstock_tier_{name}", text, labels=["tier"])
            for tier, counted in tiers.items():
                counter.add_metric([tier], getattr(counted, name))
            yield counter

    def _counted(self) -> Mapping[str, TierCounts]:
        tiers = {
            name: TierCounts(
                bytes_used=held.bytes_used,
                bytes_total=held.bytes_total,
                bytes_pinned=held.bytes_pinned,
                adapters=len(held.adapters),
                hits=held.hits,
                misses=held.misses,
                evictions=held.evictions,
            )
            for name, held in (("device", self._stats.device), ("host", self._stats.host))
        }
        if (disk := self._disk) is not None:
            tiers["disk"] = TierCounts(
                bytes_used=disk.bytes_used,
                bytes_total=disk.capacity_bytes,
                bytes_pinned=disk.held_bytes,
                adapters=disk.files,
                hits=disk.hits,
                misses=disk.misses,
                evictions=disk.evictions,
            )
        return tiers

    def _capacity(self) -> int:
        """How many adapters of the resident ones' mean size fit on the device: it holds bytes, not slots."""
        device = self._stats.device
        resident = len(device.adapters)
        if not resident or not device.bytes_used:
            return max(1, len(self._named))
        return max(resident, device.bytes_total * resident // device.bytes_used)

    def _join(self, digests: Sequence[str]) -> str:
        return ",".join(sorted({version.name for digest in digests for version in self._named.get(digest, ())}))
