"""The metrics of the service, in Prometheus' format."""

import time
from collections.abc import Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from runtime.messages import KvNamespace, Tokens

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_SERIES = 100  # adapters with series of their own; later ones share one
BASE, OTHERS = "_base", "_others"  # no adapter can have these names
MIX, SEVERAL = "_mix", "_several"  # requests on a mix of adapters; requests whose prompts have different ones
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)
LOAD_SECONDS = (0.0005, 0.001, 0.002, *SECONDS)
# Buckets of the series with vLLM's names: those of vLLM, so that boards show the same shapes
FIRST_SECONDS: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
)
FIRST_SECONDS += (40.0, 80.0, 160.0, 640.0, 2560.0)
GAP_SECONDS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_SECONDS: tuple[float, ...] = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
)
REQUEST_SECONDS += (480.0, 960.0, 1920.0, 7680.0)
LENGTHS = tuple(digit * 10**exponent for exponent in range(6) for digit in (1, 2, 5))
VLLM_LABELS = ("model_name", "engine")
ENGINE = "0"  # there is one
Kind = Literal["base", "lora", "alora"]
Finish = Literal["stop", "length", "abort", "error"]
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


class SequenceTimes:
    """The times of one sequence, for the series with vLLM's names; one clock, that of the service."""

    def __init__(self, series: "VllmSeries", arrived: float):
        self._series, self._arrived = series, arrived  # time.perf_counter() when its request came in
        self._sent = self._first = self._last = arrived
        self._queued = 0.0
        self.tokens = 0  # generated, the one that ended it included

    def sent(self) -> None:
        """The engine gets it now."""
        self._sent = time.perf_counter()

    def got(self, tokens: Tokens) -> None:
        """The engine has computed more of it."""
        now, more = time.perf_counter(), len(tokens.token_ids) + (tokens.stop_token is not None)
        if not more:
            return
        if not self.tokens:
            self._first, self._queued = now, tokens.queue_seconds or 0.0
            self._series.first_token.observe(now - self._arrived)
        else:
            for series in self._series.gaps:
                series.observe(now - self._last)
        self._last = now
        self.tokens += more

    def ended(self, prompt_tokens: int, finish: Finish) -> None:
        """Count it by how it ended; one that got no token has no times of its own."""
        self._series.finished[finish].inc()
        if not self.tokens:
            return
        prefill, decode = max(0.0, self._first - self._sent - self._queued), self._last - self._first
        seconds = {"e2e": time.perf_counter() - self._arrived, "queue": self._queued, "prefill": prefill}
        seconds |= {"decode": decode, "inference": prefill + decode}
        for name, spent in seconds.items():
            self._series.seconds[name].observe(spent)
        self._series.prompt_tokens.observe(prompt_tokens)
        self._series.generated_tokens.observe(self.tokens)


class VllmSeries:
    """The latencies, lengths and ends of sequences under vLLM's names.

    As in vLLM, `model_name` is the base's name for its adapters' requests too, so there is one series of each.
    """

    def __init__(self, registry: CollectorRegistry, model: str):
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{name}", text, VLLM_LABELS, buckets=buckets, registry=registry)
            return family.labels(model, ENGINE)

        text = "From arrival to the first token of a sequence."
        self.first_token = histogram("time_to_first_token_seconds", text, FIRST_SECONDS)
        text = "Between two tokens of one sequence."
        self.gaps = [
            histogram(name, text, GAP_SECONDS)
            for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")  # the second: its older name
        ]
        self.seconds = {
            key: histogram(name, text, REQUEST_SECONDS)
            for key, name, text in (
                ("e2e", "e2e_request_latency_seconds", "From arrival to the end of a sequence."),
                ("queue", "request_queue_time_seconds", "Waiting for the first step."),
                ("prefill", "request_prefill_time_seconds", "From the first step to the first token's arrival."),
                ("decode", "request_decode_time_seconds", "From the first token to the last."),
                ("inference", "request_inference_time_seconds", "From the first step to the last token."),
            )
        }
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a sequence's prompt.", LENGTHS)
        self.generated_tokens = histogram("request_generation_tokens", "Tokens generated of a sequence.", LENGTHS)
        text = "The most tokens generated of one prompt's choices."
        self.longest_choice = histogram("request_max_num_generation_tokens", text, LENGTHS)
        text = "Sequences that have ended, by why."
        ended = Counter("vllm:request_success", text, [*VLLM_LABELS, "finished_reason"], registry=registry)
        self.finished = {finish: ended.labels(model, ENGINE, finish) for finish in get_args(Finish)}


class Metrics:
    """The service's own counters and histograms; `model` is the name of the base."""

    def __init__(self, model: str = "base") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.vllm = VllmSeries(self.registry, model)
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
        text = "Engines that ended and were replaced: died, hung without a sign of life, or failed at every step."
        ended = Counter("rootstock_engine_restarts", text, ["reason"], registry=self.registry)
        self.engine_ends = {kind: ended.labels(kind) for kind in ("died", "hung", "failed")}
        self.engine_up = Gauge("rootstock_engine_up", "1 while an engine serves and answers.", registry=self.registry)
        text = "Batches of K/V events that were published."
        self.kv_event_batches = Counter("rootstock_kv_event_batches", text, registry=self.registry)
        text = "Times that a subscriber to K/V events had no room for a batch: it began to lose some."
        self.kv_event_stalls = Counter("rootstock_kv_event_stalls", text, registry=self.registry)
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

    def render(self, *others: Collector) -> bytes:
        """Everything in the text format, with what others collect: the engine's if there is a snapshot."""
        registry = CollectorRegistry(auto_describe=False)
        for each in others:
            registry.register(each)
        return generate_latest(self.registry) + generate_latest(registry)

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
