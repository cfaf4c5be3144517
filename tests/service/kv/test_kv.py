"""The KV cache over HTTP: what it holds for whom, dropping it, and its metrics."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.messages import KvNamespace
from service.metrics import Metrics
from tests.service.alora_service import INVOCATION, alora_server, encode, put_adapter
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

TEXT = "a prompt of forty and some more characters"  # 40 tokens: two full blocks


@pytest.fixture
def live(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with alora_server(tiny_model, tmp_path) as running:
        yield running


def complete(live: LiveServer, model: str, text: str = TEXT, **body: object) -> httpx.Response:
    response = live.post("/v1/completions", model=model, prompt=text, max_tokens=1, **body)
    assert response.status_code == 200, response.text
    return response


def cached(live: LiveServer, model: str) -> int:
    return int(complete(live, model).headers["x-cached-tokens"])


def shares(live: LiveServer) -> dict[str, dict]:
    return {share["namespace"]: share for share in live.client.get("/kv").json()["namespaces"]}


def digest(live: LiveServer, name: str) -> str:
    found: str = live.client.get(f"/adapters/{name}").json()["digest"]
    return found


def kv_blocks(live: LiveServer, name: str) -> int | None:
    found: int | None = live.client.get(f"/adapters/{name}").json()["kv_blocks"]
    return found


def test_an_idle_cache_is_shown(live: LiveServer) -> None:
    kv = live.client.get("/kv").json()
    assert 0 <= kv.pop("age_seconds") < 5
    assert kv == {
        "block_size": 16,
        "blocks": {"total": 64, "used": 0, "cached": 0, "free": 64, "held": 0},
        "query_tokens": 0,
        "hit_tokens": 0,
        "hit_rate": None,
        "host": None,
        "namespaces": [
            {
                "namespace": "base",
                "kind": "base",
                "names": ["tiny"],
                "blocks_used": 0,
                "blocks_cached": 0,
                "blocks_host": 0,
                "query_tokens": 0,
                "hit_tokens": 0,
                "hit_rate": None,
            }
        ],
    }


def test_each_namespace_has_its_blocks_and_its_hits(live: LiveServer) -> None:
    put_adapter(live, "twin")  # the same bytes as `plain`
    for model in ("tiny", "tiny", "plain"):
        complete(live, model)
    found, plain = shares(live), digest(live, "plain")
    assert set(found) == {"base", plain}
    assert (found[plain]["kind"], found[plain]["names"]) == ("lora", ["plain", "twin"])
    assert (found["base"]["blocks_cached"], found[plain]["blocks_cached"]) == (2, 2)
    assert (found["base"]["query_tokens"], found["base"]["hit_tokens"], found["base"]["hit_rate"]) == (80, 32, 0.4)
    assert (found[plain]["query_tokens"], found[plain]["hit_tokens"], found[plain]["hit_rate"]) == (40, 0, 0.0)
    assert live.client.get("/kv").json()["hit_rate"] == round(32 / 120, 4)


def test_held_blocks_are_shown_as_used(live: LiveServer) -> None:
    live.post("/kv/prefixes", model="check", prompt=TEXT + INVOCATION + "why")
    kv = live.client.get("/kv").json()
    assert kv["blocks"]["held"] == 4
    found = shares(live)
    assert (found["base"]["blocks_used"], found[digest(live, "check")]["blocks_used"]) == (2, 1)
    assert found[digest(live, "check")]["kind"] == "alora"


def test_the_host_tier_is_shown_where_there_is_one(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path, host_kv_bytes=1000) as live:
        host = live.client.get("/kv").json()["host"]
        metrics = live.client.get("/metrics").text
    assert host == {"bytes_total": 1000, "bytes_used": 64, "blocks": 1, "stores": 2, "hits": 1, "evictions": 0}
    for line in ("bytes_total 1000.0", "bytes_used 64.0", "blocks 1.0", "stores_total 2.0", "loads_total 1.0"):
        assert f"\nrootstock_host_kv_{line}\n" in metrics


def test_an_adapters_blocks_are_on_its_resource(live: LiveServer) -> None:
    assert kv_blocks(live, "plain") == 0
    complete(live, "plain")
    complete(live, "late")
    wait_until(lambda: kv_blocks(live, "plain") == 2)
    assert kv_blocks(live, "late") == 0  # its K/V are the base's
    live.post("/kv/prefixes", model="plain", prompt=TEXT)
    assert [each["kv_blocks"] for each in live.client.get("/adapters").json()["adapters"]] == [0, 0, 0, 2]


def test_an_engine_that_says_nothing_holds_up_no_list(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> None:
        raise TimeoutError

    monkeypatch.setattr(live.services.engine, "stats", silent)
    monkeypatch.setattr(live.services.engine, "_stats_at", 0.0)
    assert kv_blocks(live, "plain") is None
    assert [each["kv_blocks"] for each in live.client.get("/adapters").json()["adapters"]] == [None] * 4


def test_without_an_engine_there_is_no_cache_to_show(live: LiveServer) -> None:
    assert live.complete("x", cache_salt="die").status_code == 503
    for method, path in (("GET", "/kv"), ("DELETE", "/kv/namespaces/base")):
        response = live.client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        assert response.headers["retry-after"]
    assert kv_blocks(live, "plain") is None


@pytest.mark.parametrize("called", ["plain", "tiny:plain", "digest", "plain@digest"])
def test_a_namespace_is_dropped_by_any_of_its_names(live: LiveServer, called: str) -> None:
    for model in ("tiny", "plain"):
        complete(live, model)
    prefix = live.post("/kv/prefixes", model="plain", prompt=TEXT).json()["id"]
    path = f"/kv/namespaces/{called.replace('digest', digest(live, 'plain'))}"
    assert live.client.delete(path).status_code == 204
    response = live.client.get(f"/kv/prefixes/{prefix}")
    assert response.status_code == 404
    assert "namespace was dropped" in response.json()["error"]["message"]
    assert live.client.get("/adapters/plain").json()["requests_in_flight"] == 0
    assert (cached(live, "plain"), cached(live, "tiny")) == (0, 32)


@pytest.mark.parametrize("called", ["base", "tiny"])
def test_the_base_has_a_namespace_too(live: LiveServer, called: str) -> None:
    for model in ("tiny", "plain"):
        complete(live, model)
    assert live.client.delete(f"/kv/namespaces/{called}").status_code == 204
    assert (cached(live, "plain"), cached(live, "tiny")) == (32, 0)


def test_base_means_the_base_model_though_an_adapter_has_that_name(live: LiveServer) -> None:
    put_adapter(live, "base", seed=5)
    complete(live, "tiny")
    complete(live, "base")
    assert live.client.delete("/kv/namespaces/base").status_code == 204
    assert (cached(live, "base"), cached(live, "tiny")) == (32, 0)
    assert live.client.delete(f"/kv/namespaces/{digest(live, 'base')}").status_code == 204
    assert cached(live, "base") == 0


@pytest.mark.parametrize("called", ["nobody", "0" * 64, "plain@00000000", "tiny:nobody", "a/b"])
def test_an_unknown_namespace_is_not_found(live: LiveServer, called: str) -> None:
    response = live.client.delete(f"/kv/namespaces/{called}")
    assert response.status_code == 404
    found = response.json()["error"]
    assert (found["code"], found["param"]) == ("namespace_not_found", "namespace")


def test_a_base_whose_name_has_a_slash_can_be_dropped(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path, served_name="org/tiny") as live:
        assert live.client.delete("/kv/namespaces/org/tiny").status_code == 204


def test_queries_are_refused_where_there_are_none(live: LiveServer) -> None:
    for method, path in (("GET", "/kv"), ("GET", "/kv/prefixes"), ("DELETE", "/kv/namespaces/base")):
        assert live.client.request(method, f"{path}?force=true").status_code == 400


def counted(text: str, name: str) -> dict[str, float]:
    """The samples of a metric by their only label."""
    return {
        "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_lookups_are_counted_by_the_kind_of_namespace(live: LiveServer) -> None:
    before = live.client.get("/metrics").text
    assert counted(before, "rootstock_prefix_cache_query_tokens_total") == {"base": 0, "lora": 0, "alora": 0}
    for model in ("tiny", "late", "plain", "plain", "check", "check"):
        complete(live, model, TEXT + INVOCATION + TEXT if model == "check" else TEXT)
    live.post("/kv/prefixes", model="tiny", prompt=TEXT)
    text = live.client.get("/metrics").text
    queries = counted(text, "rootstock_prefix_cache_query_tokens_total")
    assert (queries["base"], queries["lora"]) == (40 * 5, 40 * 2), "what is before an invocation is the base's"
    assert queries["alora"] == 2 * len(encode(live, INVOCATION + TEXT))
    assert counted(text, "rootstock_prefix_cache_hit_tokens_total") == {"base": 64 + 32 + 40, "lora": 32, "alora": 40}
    assert counted(text, "rootstock_blocks_held") == {"": 3}
    assert live.client.get("/metrics").text.count("rootstock_prefix_cache_hit_tokens_total{") == 3


def namespace(query_tokens: int, hit_tokens: int) -> KvNamespace:
    return KvNamespace(blocks_used=0, blocks_cached=0, query_tokens=query_tokens, hit_tokens=hit_tokens)


def test_lookups_never_fall_though_namespaces_and_engines_go() -> None:
    metrics = Metrics()

    def sums() -> tuple[dict[str, float], dict[str, float]]:
        text = metrics.render().decode()
        return counted(text, "rootstock_prefix_cache_query_tokens_total"), counted(
            text, "rootstock_prefix_cache_hit_tokens_total"
        )

    metrics.looked_up({"": namespace(10, 0), "a": namespace(20, 8), "b": namespace(5, 0)}, {"a": "alora", "b": "lora"})
    assert sums() == ({"base": 10, "lora": 5, "alora": 20}, {"base": 0, "lora": 0, "alora": 8})
    metrics.looked_up({"": namespace(11, 1), "a": namespace(30, 9)}, {})  # both have lost their names, and b its K/V
    assert sums() == ({"base": 11, "lora": 5, "alora": 30}, {"base": 1, "lora": 0, "alora": 9})
    metrics.looked_up({"": namespace(4, 2)}, {})  # another engine
    assert sums() == ({"base": 15, "lora": 5, "alora": 30}, {"base": 3, "lora": 0, "alora": 9})


def test_a_record_from_before_there_were_aloras_is_read(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path) as live:
        assert live.client.get("/adapters/late").status_code == 200
    path = tmp_path / "names/late.json"
    record = json.loads(path.read_bytes())
    assert (record.pop("invocation_tokens"), record.pop("leaves_kv")) == (None, True)
    path.write_text(json.dumps(record))
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        assert live.client.get("/adapters/late").json()["invocation_tokens"] is None
        assert complete(live, "late").headers["x-adapter-digest"] == record["digest"]
        put_adapter(live, "late", last_layer=True)  # what is known of it now is written down
        assert json.loads(path.read_bytes())["leaves_kv"] is True
        assert live.client.get("/adapters/late").json()["generation"] == 1
