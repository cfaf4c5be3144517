"""What each key has used, as metrics."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.keys.limits import KeyUsage

MAX_KEYS = 100  # with series of their own; later ones share one
NONE, OTHERS = "_none", "_others"  # no id can be one of these


class KeyMetrics(Collector):
    """Requests, tokens and bytes by the id of their key.

    `unknown` are the requests without a valid one; `kept` are the bytes of the adapters that each key has uploaded,
    and of those that it has pinned.
    """

    def __init__(self, usage: Mapping[str, KeyUsage], unknown: KeyUsage, kept: Mapping[str, tuple[int, int]]) -> None:
        self._shown = [(NONE, unknown), *list(usage.items())[:MAX_KEYS]]
        self._others = list(usage.values())[MAX_KEYS:]
        self._kept = {key: kept.get(key, (0, 0)) for key, _ in self._shown[1:]}

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "rootstock_key_requests", "Answers, by key and by class of status.", labels=["key", "status"]
        )
        tokens = CounterMetricFamily("rootstock_key_tokens", "Tokens of prompts and answers, by key.", labels=["key"])
        running = GaugeMetricFamily("rootstock_key_requests_in_flight", "Requests in flight, by key.", labels=["key"])
        for key, used in [*((key, [one]) for key, one in self._shown), (OTHERS, self._others)]:
            for status in sorted({status for one in used for status in one.answered}):
                requests.add_metric([key, status], sum(one.answered[status] for one in used))
            if used and key != NONE:
                tokens.add_metric([key], sum(one.tokens for one in used))
                running.add_metric([key], sum(one.in_flight for one in used))
        disk = GaugeMetricFamily("rootstock_key_disk_bytes", "Of the adapters that a key uploaded.", labels=["key"])
        pinned = GaugeMetricFamily("rootstock_key_pinned_bytes", "Of the adapters that a key pinned.", labels=["key"])
        for key, (uploaded_bytes, pinned_bytes) in self._kept.items():
            disk.add_metric([key], uploaded_bytes)
            pinned.add_metric([key], pinned_bytes)
        yield from (requests, tokens, running, disk, pinned)
