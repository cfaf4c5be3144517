"""A client of the server's adapter routes, and a reader of its metrics."""

import re
from types import TracebackType
from typing import Any

import httpx

from loadtests.api_key import bearer

STAGES = ("download", "read", "pack", "copy")  # of a load; the server counts the seconds of each


class CallFailed(RuntimeError):
    """The server answered a call with an error, or its metrics lack an expected sample."""


class AdapterClient:
    """Calls the adapter routes of one server. Every call raises CallFailed, or httpx.HTTPError without an answer."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._client = httpx.Client(base_url=url, headers=bearer(api_key), timeout=600)

    def __enter__(self) -> "AdapterClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def put(
        self, name: str, content: bytes | bytearray, *, ephemeral: bool = False, preload: bool = True
    ) -> dict[str, Any]:
        """Upload one safetensors file with its configuration in the metadata; return the adapter's resource."""
        query = {"ephemeral": ephemeral, "preload": preload}
        headers = {"Content-Type": "application/vnd.safetensors"}
        answer = self._call("PUT", f"/adapters/{name}", params=query, content=bytes(content), headers=headers)
        return dict(answer.json())

    def load(self, name: str, tier: str) -> None:
        """Load an adapter to the tier `device` or `host`; return when it is resident."""
        self._call("POST", f"/adapters/{name}/load", json={"tier": tier})

    def unload(self, name: str, tier: str) -> None:
        """Unload an adapter from the tier `device`, or from `host` and `device`."""
        self._call("POST", f"/adapters/{name}/unload", json={"tier": tier})

    def delete(self, name: str) -> None:
        self._call("DELETE", f"/adapters/{name}")

    def base(self) -> str:
        """Return the name of the server's base model."""
        cards = self._call("GET", "/v1/models").json()["data"]
        return str(next(card["id"] for card in cards if not card["parent"]))

    def metrics(self) -> "Metrics":
        return Metrics(self._call("GET", "/metrics").text)

    def kv(self) -> dict[str, Any]:
        """Return the state of the K/V cache, by block and by namespace."""
        return dict(self._call("GET", "/kv").json())

    def _call(self, method: str, path: str, **given: Any) -> httpx.Response:
        answer = self._client.request(method, path, **given)
        if answer.is_error:
            raise CallFailed(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer


class Metrics:
    """One scrape of the server's metrics, in Prometheus' text format."""

    def __init__(self, text: str) -> None:
        samples = re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", text, re.MULTILINE)
        self._values = {(name, frozenset(re.findall(r'(\w+)="(.*?)"', tags))): float(it) for name, tags, it in samples}

    def value(self, name: str, **labels: str) -> float:
        """Return the sample with exactly these labels. Raises CallFailed if there is none."""
        found = self._values.get((name, frozenset(labels.items())))
        if found is None:
            raise CallFailed(f"/metrics has no {name} with {labels or 'no labels'}")
        return found

    def tier(self, what: str, tier: str = "device") -> float:
        """Return a tier's `bytes_used`, `adapters`, `evictions_total` and so on. Raises CallFailed."""
        return self.value(f"rootstock_tier_{what}", tier=tier)

    def load_stages(self, since: "Metrics") -> dict[str, tuple[float, int]]:
        """Return each stage's seconds and count of loads since an earlier scrape, without stages of no load."""
        found = {}
        for stage in STAGES:
            seconds, count = (self._stage(stage, part) - since._stage(stage, part) for part in ("sum", "count"))
            if count:
                found[stage] = (seconds, round(count))
        return found

    def _stage(self, stage: str, part: str) -> float:
        return self._values.get((f"rootstock_adapter_load_seconds_{part}", frozenset({("stage", stage)})), 0.0)
