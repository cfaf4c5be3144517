"""What routers and people read of the service, in Prometheus' format."""

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from runtime.messages import Ready, Stats

MAX_SERIES = 100  # adapters with series of their own; what comes later shares one
BASE, OTHERS = "_base", "_others"  # no adapter can have these names
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)


class Series:
    """The series of one adapter, or of the base."""

    def __init__(self, metrics: "Metrics", label: str):
        self.first_token_seconds = metrics.first_token_seconds.labels(label)
        self.next_token_seconds = metrics.next_token_seconds.labels(label)
        self.queue_seconds = metrics.queue_seconds.labels(label)
        self.requests = {outcome: metrics.requests.labels(label, outcome) for outcome in ("finished", "ended")}
        self.prompt_tokens = metrics.prompt_tokens.labels(label)
        self.cached_tokens = metrics.cached_tokens.labels(label)
        self.generated_tokens = metrics.generated_tokens.labels(label)

    def first_token(self, seconds: float, queue_seconds: float) -> None:
        self.first_token_seconds.observe(seconds)
        self.queue_seconds.observe(queue_seconds)

    def next_token(self, seconds: float) -> None:
        self.next_token_seconds.observe(seconds)

    def ended(self, prompt_tokens: int, cached_tokens: int, generated_tokens: int, *, finished: bool) -> None:
        self.requests["finished" if finished else "ended"].inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)
        self.generated_tokens.inc(generated_tokens)


class Metrics:
    """The service's own counters, and the engine's as of its last snapshot."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.next_token_seconds = self._histogram("inter_token_seconds", "Between two tokens of one sequence.")
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for the first step.")
        self.requests = self._counter("requests", "Requests, by how they ended.", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts whose K/V were reused.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._series: dict[str, Series] = {}

    def series(self, adapter: str | None) -> Series:
        """Where to count a request on an adapter, by name; None is the base."""
        label = BASE if adapter is None else adapter
        if label not in self._series and len(self._series) >= MAX_SERIES:
            label = OTHERS
        if label not in self._series:
            self._series[label] = Series(self, label)
        return self._series[label]

    def render(self, engine: "EngineMetrics | None") -> bytes:
        """Everything in the text format, with the engine's metrics if there is a snapshot."""
        own = generate_latest(self.registry)
        if engine is None:
            return own
        registry = CollectorRegistry(auto_describe=False)
        registry.register(engine)
        return own + generate_latest(registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"rootstock_{name}", text, ["adapter"], buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rootstock_{name}", text, ["adapter", *labels], registry=self.registry)


class EngineMetrics(Collector):
    """A snapshot of the engine, under the names that routers look for; `names` are what each digest is called."""

    def __init__(self, stats: Stats, ready: Ready, names: Mapping[str, list[str]]):
        self._stats, self._ready, self._names = stats, ready, names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", stats.running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Sequences queued.", stats.waiting)
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all.", used)
        shape = {"block_size": str(self._ready.block_size), "num_gpu_blocks": str(self._ready.num_blocks)}
        yield InfoMetricFamily("vllm:cache_config", "The shape of the KV cache.", shape)
        yield self._lora_requests()
        resident = len(stats.resident_adapters)
        yield GaugeMetricFamily("vllm:num_gpu_loaded_lora_adapters", "Adapters resident on the device.", resident)
        yield GaugeMetricFamily("rootstock_adapter_bytes_used", "Device memory of adapters.", stats.adapter_bytes_used)
        yield GaugeMetricFamily("rootstock_adapter_bytes_total", "Its limit.", stats.adapter_bytes_total)
        yield GaugeMetricFamily("rootstock_blocks_cached", "Free KV blocks that can be hit.", stats.blocks_cached)
        for name, text, value in (
            ("steps", "Batches computed.", stats.steps),
            ("preemptions", "Sequences set back because blocks ran out.", stats.preemptions),
            ("adapter_loads", "Adapters made resident.", stats.adapter_loads),
            ("adapter_evictions", "Adapters that gave way to others.", stats.adapter_evictions),
            ("adapter_hits", "Requests whose adapter was resident.", stats.adapter_hits),
            ("adapter_misses", "Requests whose adapter was not.", stats.adapter_misses),
        ):
            yield CounterMetricFamily(f"rootstock_{name}", text, value)

    def _lora_requests(self) -> GaugeMetricFamily:
        """ONE series: routers take running (resident here, so that no load is paid) and waiting from its labels."""
        stats = self._stats
        labels = {
            "max_lora": str(self._capacity()),
            "running_lora_adapters": self._join(stats.resident_adapters),
            "waiting_lora_adapters": self._join(stats.waiting_adapters),
        }
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters on this server.", labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family

    def _capacity(self) -> int:
        """How many adapters of the present mean size fit: the device holds bytes, not slots."""
        resident, used = len(self._stats.resident_adapters), self._stats.adapter_bytes_used
        if not resident or not used:
            return max(1, len(self._names))
        return max(resident, self._stats.adapter_bytes_total * resident // used)

    def _join(self, digests: list[str]) -> str:
        return ",".join(sorted({name for digest in digests for name in self._names.get(digest, [])}))


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
