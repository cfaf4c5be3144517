"""What models there are, what they may be called, and what the service says of itself."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.openapi.contract_hook import HOOKS
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.engine.fake_adapters import ADAPTER_BYTES
from tests.service.live_server import LiveServer, fake_settings, live_server


@pytest.fixture(scope="module")
def grafted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A service with two adapters, and memory for ten."""
    settings = fake_settings(tiny_model, tmp_path_factory.mktemp("data"), adapter_bytes=10 * ADAPTER_BYTES)
    with live_server(settings) as live:
        for seed, name in enumerate(("first", "second")):
            assert live.client.put(f"/adapters/{name}", files=multipart(*bundle(seed))).status_code == 201
        yield live


def digest(server: LiveServer, name: str) -> str:
    return server.client.get(f"/adapters/{name}").json()["digest"]


def test_the_base_and_every_adapter_are_listed(grafted: LiveServer) -> None:
    listed = grafted.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [
        ("tiny", None),
        ("first", "tiny"),
        ("second", "tiny"),
    ]
    assert all(card["object"] == "model" and card["max_model_len"] == 200 for card in listed["data"])
    assert all(isinstance(card["created"], int) and card["created"] > 1_600_000_000 for card in listed["data"])
    assert grafted.client.get("/v1/models/second").json() == listed["data"][2]


def test_an_unknown_model_is_not_found(grafted: LiveServer) -> None:
    response = grafted.client.get("/v1/models/nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_goes_by_many_names(grafted: LiveServer) -> None:
    whole = digest(grafted, "first")
    called: list[dict[str, str]] = [
        {"model": "first"},
        {"model": "tiny:first"},
        {"model": f"first@{whole}"},
        {"model": f"first@{whole[:8]}"},
        {"model": f"tiny:first@{whole[:12]}"},
        {"model": "tiny", "lora_path": "first"},
        {"model": "tiny", "adapter_id": "first"},
        {"model": "first", "lora_path": "first"},
    ]
    for names in called:
        response = grafted.post("/v1/completions", prompt="hello world", max_tokens=2, **names)
        assert response.status_code == 200, names
        assert response.headers["x-adapter-digest"] == whole
        assert response.json()["choices"][0]["text"] == " worldhello"
        assert response.json()["model"] == names["model"]


@pytest.mark.parametrize("suffix", ["@", "@1234567", "@00000000", "@zzzzzzzz", "@@"])
def test_a_digest_that_is_not_the_adapters_is_not_found(grafted: LiveServer, suffix: str) -> None:
    response = grafted.post("/v1/completions", model=f"first{suffix}", prompt="hello")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_two_different_adapters_cannot_be_asked_for(grafted: LiveServer) -> None:
    response = grafted.post("/v1/completions", model="first", lora_path="second", prompt="hello")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_path")
    response = grafted.post("/v1/completions", model="tiny", lora_path="nobody", prompt="hello")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_path")


def test_a_deleted_adapter_is_gone_from_the_models(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        live.client.put("/adapters/brief", files=multipart(*bundle()))
        assert live.client.delete("/adapters/brief").status_code == 204
        assert [card["id"] for card in live.client.get("/v1/models").json()["data"]] == ["tiny"]
        assert live.post("/v1/completions", model="brief", prompt="hello").status_code == 404


def metrics(server: LiveServer) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_the_metrics_that_routers_read_are_there(grafted: LiveServer) -> None:
    found = metrics(grafted)
    labels = {"model_name": "tiny", "engine": "0"}
    assert found["vllm:num_requests_running"] == [(labels, 0.0)]
    assert found["vllm:num_requests_waiting"] == [(labels, 0.0)]
    assert found["vllm:kv_cache_usage_perc"] == [(labels, 0.0)]
    shape = {"block_size": "16", "num_gpu_blocks": "64"}
    assert found["vllm:cache_config_info"] == [({"engine": "0", **shape}, 1.0)]
    assert found["vllm:num_gpu_loaded_lora_adapters"] == [({"model_name": "tiny"}, 2.0)]
    assert found["vllm:num_cpu_loaded_lora_adapters"] == [({"model_name": "tiny"}, 2.0)]
    [(labels, when)] = found["vllm:lora_requests_info"]
    assert labels == {"max_lora": "10", "running_lora_adapters": "first,second", "waiting_lora_adapters": ""}
    assert when > 1_600_000_000


def test_requests_are_counted_for_each_adapter(grafted: LiveServer) -> None:
    def counted(name: str, adapter: str) -> float:
        return sum(value for labels, value in metrics(grafted).get(name, []) if labels["adapter"] == adapter)

    before = counted("rootstock_generated_tokens_total", "second"), counted("rootstock_requests_total", "second")
    grafted.post("/v1/completions", model="second", prompt="hello", max_tokens=5)
    after = counted("rootstock_generated_tokens_total", "second"), counted("rootstock_requests_total", "second")
    assert (after[0] - before[0], after[1] - before[1]) == (5, 1)
    assert counted("rootstock_time_to_first_token_seconds_count", "second") >= 1
    assert counted("rootstock_inter_token_seconds_count", "second") >= 4


def test_the_service_says_how_it_is(grafted: LiveServer) -> None:
    assert grafted.client.get("/health").status_code == 200
    assert grafted.client.get("/health/ready").json() == {"status": "ready"}
    assert grafted.client.get("/ping").status_code == 200
    said = grafted.client.get("/version").json()
    assert said["version"]
    assert tuple(map(int, said["vllm_api"].split("."))) >= (0, 11, 0), "clients send structured_outputs from there on"
    assert grafted.client.get("/openapi.json").json()["openapi"].startswith("3.")


def test_with_a_key_everything_but_health_needs_it(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path, api_key="secret")) as live:
        for path in ("/health", "/health/ready", "/ping"):
            assert live.client.get(path).status_code == 200
        guarded = [("GET", "/v1/models"), ("GET", "/adapters"), ("PUT", "/adapters/x"), ("DELETE", "/adapters/x")]
        guarded += [("POST", "/adapters"), ("PATCH", "/adapters/x"), ("POST", "/adapters/x/load")]
        guarded += [("POST", "/v1/load_lora_adapter"), ("POST", "/load_lora_adapter"), ("POST", "/invocations")]
        guarded += [("GET", "/kv"), ("POST", "/kv/prefixes"), ("GET", "/kv/prefixes/x"), ("DELETE", "/kv/prefixes/x")]
        guarded += [("GET", "/kv/prefixes"), ("DELETE", "/kv/namespaces/base")]
        guarded += [("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/version")]
        guarded += [("GET", "/metrics")]
        for method, path in guarded:
            for key in (None, "Bearer wrong", "secret", "Bearer sécret", "Bearer secret2"):
                headers = {} if key is None else {"authorization": key.encode()}
                response = live.client.request(method, path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        with httpx.Client(base_url=live.url, headers={"authorization": "Bearer secret"}, event_hooks=HOOKS) as client:
            assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 200


def test_metrics_can_be_opened(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path, api_key="secret", open_metrics=True)) as live:
        assert [live.client.get(path).status_code for path in ("/metrics", "/v1/models")] == [200, 401]
