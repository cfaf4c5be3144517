"""Adapters over HTTP: the life of a name."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.numpy import save

from runtime.messages import AdapterState
from tests.service.adapters.adapter_bundles import bundle, config, multipart, tensors
from tests.service.adapters.adapter_service import Service, error, serving


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path / "data") as running:
        yield running


def test_an_upload_is_shown_with_what_is_known_of_it(service: Service) -> None:
    response = service.put("poet", pin=True)

    assert response.status_code == 201
    adapter = response.json()
    assert response.headers["etag"] == f'"{adapter["digest"]}"'
    path = service.engine.registered[adapter["digest"]]
    assert adapter["digest"] == blake3(path.read_bytes()).hexdigest()
    assert {key: adapter[key] for key in ("name", "generation", "kind", "rank", "targets", "pinned", "ephemeral")} == {
        "name": "poet",
        "generation": 1,
        "kind": "lora",
        "rank": 2,
        "targets": ["q_proj"],
        "pinned": True,
        "ephemeral": False,
    }
    assert adapter["bytes"] == path.stat().st_size
    assert adapter["source"] == "upload"
    assert (adapter["state"], adapter["tier"], adapter["reason"]) == ("ready", "disk", None)
    assert (adapter["requests_in_flight"], adapter["last_used_at"]) == (0, None)
    assert service.get("poet") == adapter
    assert service.client.get("/adapters").json() == {"adapters": [adapter]}


def test_an_upload_survives_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        service.put("poet", pin=True)
        adapter = service.get("poet")
        files = service.files()
    with serving(tmp_path / "data") as service:
        assert service.get("poet") == adapter
        assert list(service.engine.registered) == [adapter["digest"]]
        service.eventually(lambda: service.engine.pins == {adapter["digest"]: "device"})
        assert service.files() == files


def test_the_same_bytes_keep_digest_and_generation_and_other_bytes_raise_it(service: Service) -> None:
    first = service.put("poet", seed=1)
    again = service.put("poet", seed=1)
    other = service.put("poet", seed=2)

    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 200)
    assert again.json() == first.json()
    assert other.json()["generation"] == 2
    assert other.json()["digest"] != first.json()["digest"]


def test_two_names_of_the_same_bytes_share_one_file(service: Service) -> None:
    first, second = service.put("poet").json(), service.put("bard").json()

    assert first["digest"] == second["digest"]
    assert service.files() == [
        f"blobs/{first['digest']}.safetensors",
        "names/bard.json",
        "names/poet.json",
    ]
    service.client.delete("/adapters/poet")
    assert service.names() == ["bard"]
    assert service.engine.retired == []
    service.client.delete("/adapters/bard")
    assert service.collect() == []
    assert service.engine.registered == {}


def test_a_pin_is_kept_until_it_is_said_otherwise(service: Service) -> None:
    assert service.put("poet", pin="true").json()["pinned"] is True
    assert service.put("poet").json()["pinned"] is True
    assert service.put("poet", seed=2).json()["pinned"] is True
    unpinned = service.put("poet", seed=2, pin="false").json()
    assert (unpinned["pinned"], unpinned["generation"]) == (False, 2)


def test_preload_decides_whether_the_engine_loads_it_now(service: Service) -> None:
    service.put("lazy", seed=1, preload="false")
    assert service.engine.loads == []
    digest = service.put("eager", seed=2).json()["digest"]
    assert service.engine.loads == [(digest, "device")]


def test_a_deleted_name_is_gone_with_its_bytes_and_stays_so(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        digest = service.put("poet").json()["digest"]
        assert service.client.delete("/adapters/poet").status_code == 204
        assert error(service.client.get("/adapters/poet")) == (404, "adapter_not_found", "name")
        assert error(service.client.delete("/adapters/poet")) == (404, "adapter_not_found", "name")
        assert service.collect() == []
        assert service.engine.retired == [digest]
    with serving(tmp_path / "data") as service:
        assert service.names() == []


def test_a_request_finishes_on_the_version_that_it_resolved(service: Service) -> None:
    first = service.put("poet", seed=1).json()
    with ThreadPoolExecutor() as threads:
        running = threads.submit(service.client.get, "/use/poet")
        service.eventually(lambda: service.get("poet")["requests_in_flight"] == 1)
        assert service.get("poet")["last_used_at"] is not None

        second = service.put("poet", seed=2).json()
        later = threads.submit(service.client.get, "/use/poet")
        service.eventually(lambda: service.get("poet")["requests_in_flight"] == 1)
        assert service.engine.retired == []
        service.client.post("/release")

        assert running.result().json() == {"digest": first["digest"], "generation": 1}
        assert later.result().json() == {"digest": second["digest"], "generation": 2}
    service.eventually(lambda: service.engine.retired == [first["digest"]])
    assert service.collect() == [f"blobs/{second['digest']}.safetensors", "names/poet.json"]


def test_a_deleted_adapter_drains_while_requests_run_on_it(service: Service) -> None:
    digest = service.put("poet").json()["digest"]
    with ThreadPoolExecutor() as threads:
        running = threads.submit(service.client.get, "/use/poet")
        service.eventually(lambda: service.get("poet")["requests_in_flight"] == 1)
        service.client.delete("/adapters/poet")

        assert service.client.get("/use/poet").status_code == 404
        assert service.names() == []
        draining = service.get("poet")
        assert (draining["state"], draining["requests_in_flight"]) == ("draining", 1)
        assert service.engine.retired == []
        service.client.post("/release")
        assert running.result().json()["digest"] == digest
    assert service.collect() == []
    assert service.client.get("/adapters/poet").status_code == 404
    assert service.engine.retired == [digest]


def test_force_ends_the_requests_unless_another_name_has_the_same_content(service: Service) -> None:
    digest = service.put("poet").json()["digest"]
    service.put("bard")

    refused = service.client.delete("/adapters/poet", params={"force": "true"})
    assert error(refused) == (409, "adapter_is_shared", "force")
    assert service.names() == ["bard", "poet"]
    service.client.delete("/adapters/bard")
    assert service.client.delete("/adapters/poet", params={"force": "true"}).status_code == 204
    assert service.engine.ended == [digest]


def test_a_change_can_demand_what_it_replaces(service: Service) -> None:
    def put(seed: int, **headers: str) -> tuple[int, str | None]:
        response = service.client.put("/adapters/poet", files=multipart(*bundle(seed)), headers=headers)
        return response.status_code, None if response.is_success else error(response)[1]

    failed = (412, "precondition_failed")
    assert put(1, **{"If-Match": "*"}) == failed
    assert put(1, **{"If-None-Match": "*"}) == (201, None)
    assert put(1, **{"If-None-Match": "*"}) == failed
    etag = service.client.get("/adapters/poet").headers["etag"]
    assert put(2, **{"If-Match": '"0000"'}) == failed
    assert put(2, **{"If-Match": f'"0000", {etag}'}) == (200, None)
    assert put(3, **{"If-Match": etag}) == failed
    assert put(3, **{"If-Match": "*"}) == (200, None)
    assert put(3, **{"If-Match": "no quotes"}) == (400, "invalid_header")
    assert put(3, **{"If-None-Match": etag}) == (400, "invalid_header")

    refused = service.client.delete("/adapters/poet", headers={"If-Match": etag})
    assert error(refused) == (412, "precondition_failed", "If-Match")
    assert service.get("poet")["generation"] == 3


def test_of_concurrent_uploads_that_demand_a_new_name_one_wins(service: Service) -> None:
    start = threading.Barrier(6)

    def put(seed: int) -> int:
        files = multipart(*bundle(seed))
        start.wait()
        return service.client.put("/adapters/poet", files=files, headers={"If-None-Match": "*"}).status_code

    with ThreadPoolExecutor(6) as threads:
        statuses = sorted(threads.map(put, range(6)))
    assert statuses == [201, 412, 412, 412, 412, 412]
    assert service.get("poet")["generation"] == 1
    assert len(service.collect()) == 2


def test_concurrent_uploads_to_one_name_happen_one_after_another(service: Service) -> None:
    start = threading.Barrier(6)

    def put(seed: int) -> int:
        files = multipart(*bundle(seed))
        start.wait()
        return service.client.put("/adapters/poet", files=files).json()["generation"]

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(put, range(6))) == [1, 2, 3, 4, 5, 6]
    digest = service.get("poet")["digest"]
    assert service.collect() == [f"blobs/{digest}.safetensors", "names/poet.json"]
    assert list(service.engine.registered) == [digest]


def test_an_ephemeral_upload_is_served_from_memory_until_the_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        response = service.put("sketch", ephemeral="true")
        adapter = response.json()
        assert response.status_code == 201
        assert (adapter["ephemeral"], adapter["tier"]) == (True, "host")
        assert service.files() == [f"memory/{adapter['digest']}.safetensors"]
        assert service.put("sketch", seed=2, ephemeral="true").json()["generation"] == 2
        memory = service.engine.registered[service.get("sketch")["digest"]]
        assert memory.exists()
    assert not memory.exists()
    with serving(tmp_path / "data") as service:
        assert service.names() == []


def test_an_ephemeral_adapter_becomes_durable_when_it_is_uploaded_as_such(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        sketch = service.put("sketch", ephemeral="true").json()
        kept = service.put("sketch").json()
        assert (kept["digest"], kept["generation"], kept["ephemeral"]) == (sketch["digest"], 1, False)
        refused = service.put("sketch", seed=2, ephemeral="true")
        assert error(refused) == (409, "adapter_is_durable", "ephemeral")
    with serving(tmp_path / "data") as service:
        assert service.get("sketch")["digest"] == sketch["digest"]


def test_the_state_is_what_the_engine_says_of_the_digest(service: Service) -> None:
    adapter = service.put("poet").json()
    digest, loading = adapter["digest"], {"stage": "load", "bytes": 0, "total_bytes": adapter["bytes"]}

    def shown(**state: Any) -> tuple[str, str, str | None, dict[str, Any] | None]:
        service.engine.states[digest] = AdapterState(digest=digest, **state)
        adapter = service.get("poet")
        return adapter["state"], adapter["tier"], adapter["reason"], adapter["progress"]

    assert shown(state="idle") == ("ready", "disk", None, None)
    assert shown(state="missing") == ("loading", "disk", None, {**loading, "stage": "download"})
    assert shown(state="loading") == ("loading", "disk", None, loading)
    assert shown(state="idle", tier="host") == ("ready", "host", None, None)
    assert shown(state="loading", tier="host") == ("loading", "host", None, loading)
    assert shown(state="idle", tier="device") == ("ready", "device", None, None)
    assert shown(state="failed", reason="no room") == ("failed", "disk", "no room", None)


def test_an_upload_warns_of_another_base_model(service: Service) -> None:
    first = ["0.self_attn.q_proj"]  # all that the file has: no warning of other modules
    files = multipart(config(base_model_name_or_path="somebody/else", target_modules=first), save(tensors()))

    adapter = service.client.put("/adapters/poet", files=files).json()

    assert len(adapter["warnings"]) == 1
    assert "base_model_name_or_path" in adapter["warnings"][0]
    assert service.get("poet")["warnings"] == adapter["warnings"]


def test_a_strict_server_refuses_another_base_model(tmp_path: Path) -> None:
    with serving(tmp_path / "strict", strict_base=True) as service:
        refused = service.client.put(
            "/adapters/poet", files=multipart(config(base_model_name_or_path="somebody/else"), save(tensors()))
        )
        assert error(refused) == (422, "invalid_adapter", "base_model_name_or_path")
        assert "--strict-base" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", [".hidden", "-x", "a b", "ä", "a" * 129, "a\n", "a%00"])
def test_a_name_that_is_none_is_refused(service: Service, name: str) -> None:
    assert error(service.put(name.replace("\n", "%0A"))) == (400, "invalid_name", "name")
    assert service.files() == []


def test_the_name_of_the_base_is_taken(service: Service) -> None:
    assert error(service.put("base-model")) == (409, "name_is_base_model", "name")


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("PUT", "/adapters/poet?pin=perhaps", "pin"),
        ("PUT", "/adapters/poet?preload=", "preload"),
        ("PUT", "/adapters/poet?pinned=true", "pinned"),
        ("PUT", "/adapters/poet?pin=true&pin=false", "pin"),
        ("DELETE", "/adapters/poet?force=2", "force"),
        ("GET", "/adapters?limit=2", "limit"),
        ("GET", "/adapters/poet?x=1", "x"),
        ("POST", "/adapters?wait=never", "wait"),
        ("POST", "/adapters?preload=perhaps", "preload"),
        ("POST", "/adapters?ephemeral=true", "ephemeral"),
        ("POST", "/adapters/poet/load?tier=device", "tier"),
        ("POST", "/adapters/poet/unload?wait=false", "wait"),
        ("PATCH", "/adapters/poet?pinned=true", "pinned"),
    ],
)
def test_a_query_that_is_not_understood_is_refused_by_name(
    service: Service, method: str, path: str, param: str
) -> None:
    service.put("poet")
    assert error(service.client.request(method, path)) == (400, "invalid_query", param)
    assert service.names() == ["poet"]
