"""Loading and unloading as vLLM's and SGLang's clients do it: their words, their statuses, our adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.adapters.adapter_service import Service, error, serving
from tests.service.ingest.gated_sources import GatedSources, denied


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    allowed = ("s3://bucket", "hf://org", f"file://{tmp_path}")
    with serving(tmp_path / "data", allowed_sources=allowed, sources=GatedSources) as running:
        gate(running).gate.set()
        yield running


def gate(service: Service) -> GatedSources:
    assert isinstance(service.sources, GatedSources)
    return service.sources


def load(service: Service, name: str = "poet", path: str = "s3://bucket/1", **fields: Any) -> httpx.Response:
    return service.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **fields)


def test_vllm_loads_and_unloads(service: Service) -> None:
    response = load(service, base_model_name="base-model")  # which lora-syncer sends
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    digest = service.get("poet")["digest"]
    assert service.engine.loads == [(digest, "device")]

    response = service.post("/v1/unload_lora_adapter", lora_name="poet", lora_int_id=1)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert service.names() == []


def test_vllm_replaces_only_in_place(service: Service) -> None:
    load(service)
    for fields in ({}, {"load_inplace": False}, {"load_inplace": None}):
        response = load(service, path="s3://bucket/2", **fields)
        assert error(response) == (400, "adapter_exists", "lora_name")
        assert response.json()["error"]["message"] == "The lora adapter 'poet' has already been loaded."
    assert service.get("poet")["generation"] == 1
    response = load(service, path="s3://bucket/2", load_inplace=True)
    assert response.text == "Success: LoRA adapter 'poet' added successfully."
    assert service.get("poet")["generation"] == 2


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("s3://bucket/1", "s3://bucket/1"),
        ("hf://org/1", "hf://org/1"),
        ("org/1", "hf://org/1"),
        ("org/repo/1@main", "hf://org/repo/1@main"),
    ],
)
def test_a_path_is_a_url_or_a_repository(service: Service, path: str, source: str) -> None:
    assert load(service, path=path).status_code == 200
    assert service.get("poet")["source"] == source


def test_a_path_is_one_on_the_server_below_what_is_allowed(service: Service, tmp_path: Path) -> None:
    assert load(service, path=f"{tmp_path}/1").status_code == 200
    assert service.get("poet")["source"] == f"file://{tmp_path}/1"
    for path in ("/etc/1", f"{tmp_path}-not/1"):
        assert error(load(service, "bard", path)) == (403, "source_not_allowed", "lora_path")
    for path in (f"{tmp_path}/../1", "poet", "./poet", "../poet/1", "", "https://host/x", "~/poet"):
        assert error(load(service, "bard", path)) == (400, "unsupported_source", "lora_path")


def test_vllm_is_refused_with_its_own_statuses(service: Service) -> None:
    assert error(load(service, "base-model")) == (400, "name_is_base_model", "lora_name")
    assert error(load(service, "a b")) == (400, "invalid_name", "lora_name")
    assert error(service.post("/v1/load_lora_adapter", lora_name="poet")) == (400, "missing_field", "lora_path")
    assert error(service.post("/v1/load_lora_adapter", lora_path="x")) == (400, "missing_field", "lora_name")
    assert error(service.post("/v1/load_lora_adapter", lora_name="", lora_path="org/1"))[0] == 400
    assert error(service.post("/v1/unload_lora_adapter")) == (400, "missing_field", "lora_name")
    unknown = service.post("/v1/unload_lora_adapter", lora_name="poet")
    assert error(unknown) == (404, "adapter_not_found", "lora_name")
    assert unknown.json()["error"]["message"] == "The lora adapter 'poet' cannot be found."
    gate(service).error = denied()
    assert error(load(service)) == (403, "source_access_denied", "lora_path")
    assert service.names() == []


def test_vllm_unloads_what_is_still_being_imported(service: Service) -> None:
    gate(service).gate.clear()
    service.client.post("/adapters?wait=false", json={"name": "poet", "src": "s3://bucket/1"})
    assert error(load(service)) == (409, "import_in_progress", "lora_name")
    assert service.post("/v1/unload_lora_adapter", lora_name="poet").status_code == 200
    assert service.names() == []


def test_sglang_loads_and_unloads(service: Service) -> None:
    response = service.post("/load_lora_adapter", lora_name="poet", lora_path="org/1", pinned=True, lora_id=None)
    loaded = {"success": True, "error_message": None, "loaded_adapters": {"poet": "hf://org/1"}}
    assert (response.status_code, response.json()) == (200, loaded)
    digest = service.get("poet")["digest"]
    assert (service.get("poet")["pinned"], service.engine.pins) == (True, {digest: "device"})

    response = service.post("/unload_lora_adapter", lora_name="poet")
    assert (response.status_code, response.json()) == (200, {**loaded, "loaded_adapters": {}})


def test_sglang_is_refused_with_its_one_status_and_our_reason(service: Service) -> None:
    service.post("/load_lora_adapter", lora_name="poet", lora_path="org/1")
    gate(service).error = denied()
    for path, body, code in (
        ("load", {"lora_name": "poet", "lora_path": "org/2"}, "adapter_exists"),
        ("load", {"lora_name": "bard", "lora_path": "org/2"}, "source_access_denied"),
        ("load", {"lora_name": "bard", "lora_path": "s3://other/2"}, "source_not_allowed"),
        ("load", {"lora_name": "bard"}, "missing_field"),
        ("load", {"lora_name": "base-model", "lora_path": "org/2"}, "name_is_base_model"),
        ("unload", {"lora_name": "bard"}, "adapter_not_found"),
        ("unload", {}, "missing_field"),
    ):
        response = service.post(f"/{path}_lora_adapter", **body)
        answer = response.json()
        assert (response.status_code, answer["success"], answer["error"]["code"]) == (400, False, code)
        assert answer["error_message"] == answer["error"]["message"]
        assert answer["loaded_adapters"] == {"poet": "hf://org/1"}


def test_sglang_hears_of_trouble_of_the_servers_own(service: Service) -> None:
    gate(service).error = OSError(28, "No space left on device")
    response = service.post("/load_lora_adapter", lora_name="poet", lora_path="org/1")
    assert (response.status_code, response.json()["success"]) == (507, False)


def test_the_root_call_replaces_in_place_as_vllms(service: Service) -> None:
    service.post("/load_lora_adapter", lora_name="poet", lora_path="org/1")
    response = service.post("/load_lora_adapter", lora_name="poet", lora_path="org/2", load_inplace=True)
    assert (response.status_code, response.json()["loaded_adapters"]) == (200, {"poet": "hf://org/2"})
    assert service.get("poet")["generation"] == 2
    response = service.post("/load_lora_adapter", lora_name="poet", lora_path="org/1", load_inplace=False)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_exists")


def test_a_directory_that_is_missing_is_not_found(tmp_path: Path) -> None:
    with serving(tmp_path / "data", allowed_sources=(f"file://{tmp_path}",)) as service:
        body = {"lora_name": "poet", "lora_path": f"{tmp_path}/missing"}
        assert error(service.post("/v1/load_lora_adapter", **body)) == (404, "source_not_found", "lora_path")
        response = service.post("/load_lora_adapter", **body)
        assert (response.status_code, response.json()["success"]) == (404, False)
        assert response.json()["error"]["code"] == "source_not_found"
        dynamo = service.post("/v1/loras", lora_name="poet", source={"uri": f"{tmp_path}/missing"})
        assert error(dynamo) == (404, "source_not_found", "source.uri")


def test_dynamo_loads_lists_and_unloads(service: Service) -> None:
    loaded = service.post("/v1/loras", lora_name="org/poet", source={"uri": "s3://bucket/1"})
    assert loaded.status_code == 200
    lora_id = loaded.json().pop("lora_id")
    assert 0 < lora_id < 2**31
    said = {"status": "success", "message": "LoRA adapter 'org/poet' loaded successfully", "lora_name": "org/poet"}
    assert loaded.json() == {**said, "lora_id": lora_id}
    assert service.get("org/poet")["source"] == "s3://bucket/1"

    again = service.post("/v1/loras", lora_name="org/poet", source={"uri": "s3://bucket/1"})
    assert (again.json(), service.get("org/poet")["generation"]) == (loaded.json(), 1)
    other = service.post("/v1/loras", lora_name="org/poet", source={"uri": "s3://bucket/2"})
    assert error(other) == (400, "adapter_exists", "lora_name")

    listed = service.client.get("/v1/loras").json()
    assert listed == {"status": "success", "loras": {"org/poet": lora_id}, "count": 1}
    unloaded = service.client.delete("/v1/loras/org%2Fpoet")
    assert (unloaded.status_code, unloaded.json()["lora_id"]) == (200, lora_id)
    assert error(service.client.delete("/v1/loras/org/poet")) == (404, "adapter_not_found", "lora_name")
    assert service.client.get("/v1/loras").json() == {"status": "success", "loras": {}, "count": 0}


def test_dynamo_may_write_a_source_in_another_way_each_time(service: Service, tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/1", f"file://{tmp_path}/1"):
        assert service.post("/v1/loras", lora_name="poet", source={"uri": uri}).status_code == 200
    assert service.get("poet")["generation"] == 1


def test_what_dynamo_asks_wrongly_is_named(service: Service) -> None:
    assert error(service.post("/v1/loras", lora_name="poet")) == (400, "missing_field", "source")
    assert error(service.post("/v1/loras", lora_name="poet", source={})) == (400, "missing_field", "source.uri")
    refused = service.post("/v1/loras", lora_name="poet", source={"uri": "s3://other/1"})
    assert error(refused) == (403, "source_not_allowed", "source.uri")
    assert error(service.post("/v1/loras", lora_name="a b", source={"uri": "s3://bucket/1"}))[1] == "invalid_name"


def test_sagemaker_imports_by_a_query(service: Service) -> None:
    query = {"name": "org/poet", "src": "s3://bucket/1", "preload": "false", "pin": "true"}
    response = service.client.post("/adapters", params=query)
    assert (response.status_code, response.json()["source"]) == (201, "s3://bucket/1")
    assert (service.names(), service.get("org/poet")["pinned"]) == (["org/poet"], True)
    again = service.client.post("/adapters", params={"name": "bard", "src": "s3://bucket/1", "wait": "false"})
    assert again.status_code == 202


def test_a_query_for_an_import_is_whole_and_alone(service: Service) -> None:
    assert error(service.client.post("/adapters?name=poet")) == (400, "missing_field", "src")
    assert error(service.client.post("/adapters?src=s3://bucket/1")) == (400, "missing_field", "name")
    both = service.client.post("/adapters?name=poet&src=s3://bucket/1", json={"name": "poet", "src": "s3://bucket/1"})
    assert error(both) == (400, "invalid_query", "name")
    refused = service.client.post("/adapters", params={"name": "a b", "src": "s3://bucket/1"})
    assert error(refused) == (400, "invalid_name", "name")
    assert service.names() == []
