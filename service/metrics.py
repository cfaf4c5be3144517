"""The metrics of the service, in Prometheus' format."""

from collections.abc import Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from runtime.messages import KvNamespace

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_SERIES = 100  # adapters with series of their own; later ones share one
BASE, OTHERS = "_base", "_others"  # no adapter can have these names
MIX, SEVERAL = "_mix", "_several"  # requests on a mix of adapters; requests whose prompts have different ones
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)
LOAD_SECONDS = (0.0005, 0.001, 0.002, *SECONDS)
Kind = Literal["base", "lora", "alora"]
NOTHING = KvNamespace(blocks_used=0, blocks_cached=0, query_tokens=0, hit_tokens=0)


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
    """The service's own counters and histograms."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.next_token_seconds = self._histogram("inter_token_seconds", "Between two tokens of one sequence.")
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for the first step.")
        self.requests = self._counter("requests", "Requests, by how they ended.", "outcome")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts whose K/V were reused.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        text = "Tokens of prompts that were looked for in the prefix cache."
        self._query_tokens = self._by_kind("prefix_cache_query_tokens", text)
        text = "Tokens of prompts that were found in the prefix cache."
        self._hit_tokens = self._by_kind("prefix_cache_hit_tokens", text)
        self._namespaces: dict[str, tuple[Kind, KvNamespace]] = {}
        self._series: dict[str, Series] = {}
        text = "Of one adapter, by stage: download from a remote store, read and verify, pack, copy to the device."
        self._stages = self._load_histogram("rootstock_adapter_load_seconds", text, "stage")
        text = "Of one adapter, by transition: load into host memory, activate on the device."
        self._transitions = self._load_histogram("vllm:lora_adapter_load_seconds", text, "transition")

    def loaded(self, seconds: Mapping[str, float]) -> None:
        """Count a load that the engine has finished; `seconds` are those of each of its stages."""
        for stage, spent in seconds.items():
            self._stages.labels(stage).observe(spent)
        if "copy" in seconds:
            self._transitions.labels("activate").observe(seconds["copy"])
        if "pack" in seconds:
            self._transitions.labels("load").observe(seconds.get("read", 0.0) + seconds["pack"])

    def downloaded(self, seconds: float) -> None:
        """Count a fetch of an adapter's file from a remote store."""
        self._stages.labels("download").observe(seconds)

    def looked_up(self, namespaces: Mapping[str, KvNamespace], kinds: Mapping[str, Literal["lora", "alora"]]) -> None:
        """Count the lookups of each namespace since the last snapshot; `kinds` are those of the digests with names.

        The counters add up differences: a sum over the namespaces would fall whenever one is dropped, and Prometheus
        would take that for a restart.
        """
        before, self._namespaces = self._namespaces, {}
        for digest, now in namespaces.items():
            kind: Kind = kinds.get(digest) or (before[digest][0] if digest in before else "lora")
            kind = kind if digest else "base"
            self._namespaces[digest] = kind, now
            last = before[digest][1] if digest in before else NOTHING
            if now.query_tokens < last.query_tokens:
                last = NOTHING  # the engine has started anew
            self._query_tokens.labels(kind).inc(now.query_tokens - last.query_tokens)
            self._hit_tokens.labels(kind).inc(max(0, now.hit_tokens - last.hit_tokens))

    def series(self, adapter: str | None) -> Series:
        """The series of an adapter, by name; None is the base."""
        label = BASE if adapter is None else adapter
        if label not in self._series and len(self._series) >= MAX_SERIES:
            label = OTHERS
        if label not in self._series:
            self._series[label] = Series(self, label)
        return self._series[label]

    def render(self, engine: Collector | None) -> bytes:
        """Everything in the text format, with the engine's metrics if there is a snapshot."""
        own = generate_latest(self.registry)
        if engine is None:
            return own
        registry = CollectorRegistry(auto_describe=False)
        registry.register(engine)
        return own + generate_latest(registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"rootstock_{name}", text, ["adapter"], buckets=SECONDS, registry=self.registry)

    def _load_histogram(self, name: str, text: str, label: str) -> Histogram:
        return Histogram(name, text, [label], buckets=LOAD_SECONDS, registry=self.registry)

    def _by_kind(self, name: str, text: str) -> Counter:
        counter = Counter(f"rootstock_{name}", text, ["namespace_kind"], registry=self.registry)
        for kind in get_args(Kind):
            counter.labels(kind)  # begin at 0, so that there is a rate from the first token on
        return counter

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rootstock_{name}", text, ["adapter", *labels], registry=self.registry)
