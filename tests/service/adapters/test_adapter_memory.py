"""Adapters over HTTP: loading them into a tier of memory, giving it back, and pins."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.messages import AdapterState
from tests.service.adapters.adapter_service import Service, error, serving


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path / "data") as running:
        yield running


@pytest.fixture
def digest(service: Service) -> str:
    return service.put("poet", preload="false").json()["digest"]


@pytest.mark.parametrize("call", ["load", "unload"])
def test_another_tier_is_refused_and_the_tiers_are_named(service: Service, call: str) -> None:
    response = service.post(f"/adapters/poet/{call}", tier="gpu")
    assert error(response) == (400, "invalid_field", "tier")
    assert response.json()["error"]["message"].endswith("Invalid enum value 'gpu', expected one of device, host")


@pytest.mark.parametrize("tier", ["device", "host"])
def test_an_adapter_is_loaded_where_it_is_asked_for(service: Service, digest: str, tier: str) -> None:
    response = service.post("/adapters/poet/load", tier=tier)
    assert (response.status_code, response.json()["name"]) == (200, "poet")
    assert response.headers["etag"] == f'"{digest}"'
    assert service.engine.loads == [(digest, tier)]
    assert service.engine.pins == {}


def test_a_load_can_be_left_to_itself(service: Service, digest: str) -> None:
    service.engine.refuse = "adapter_failed"  # nobody waits to hear it
    response = service.client.post("/adapters/poet/load?wait=false", json={"tier": "device"})
    assert response.status_code == 202
    assert service.engine.loads == [(digest, "device")]


@pytest.mark.parametrize(
    ("code", "status"),
    [("adapter_failed", 503), ("engine_died", 503), ("engine_unavailable", 503)],
)
def test_a_load_that_does_not_come_says_why(service: Service, digest: str, code: str, status: int) -> None:
    service.engine.refuse = code
    response = service.post("/adapters/poet/load", tier="device")
    assert error(response)[:2] == (status, code)
    assert "retry-after" in response.headers


def test_a_load_can_pin_and_unpin(service: Service, digest: str) -> None:
    pinned = service.post("/adapters/poet/load", tier="host", pin=True).json()
    assert (pinned["pinned"], pinned["pin_tier"], service.engine.pins) == (True, "host", {digest: "host"})
    kept = service.post("/adapters/poet/load", tier="device").json()
    assert (kept["pinned"], kept["pin_tier"]) == (True, "host")
    unpinned = service.post("/adapters/poet/load", tier="device", pin=False).json()
    assert (unpinned["pinned"], unpinned["pin_tier"], service.engine.pins) == (False, None, {})


def test_memory_is_given_back(service: Service, digest: str) -> None:
    service.engine.states[digest] = AdapterState(digest=digest, state="idle", tier="device")
    response = service.post("/adapters/poet/unload", tier="device")
    assert response.status_code == 200
    assert service.engine.unloads == [(digest, "device")]
    assert service.names() == ["poet"]


@pytest.mark.parametrize("code", ["adapter_in_use", "adapter_pinned"])
def test_memory_that_is_needed_is_not_given_back(service: Service, digest: str, code: str) -> None:
    service.engine.refuse = code
    assert error(service.post("/adapters/poet/unload", tier="host"))[:2] == (409, code)


def test_a_pin_is_changed_by_a_patch(service: Service, digest: str) -> None:
    pinned = service.client.patch("/adapters/poet", json={"pinned": True})
    assert (pinned.status_code, pinned.json()["pinned"], pinned.json()["pin_tier"]) == (200, True, "device")
    assert service.engine.pins == {digest: "device"}
    assert service.get("poet") == pinned.json()
    assert service.client.patch("/adapters/poet", json={"pinned": False}).json()["pinned"] is False
    assert service.engine.pins == {}

    service.post("/adapters/poet/load", tier="host", pin=True)
    assert service.client.patch("/adapters/poet", json={"pinned": True}).json()["pin_tier"] == "host"


def test_a_patch_can_demand_what_it_changes(service: Service, digest: str) -> None:
    for etag, status in (('"0000"', 412), (f'"{digest}"', 200)):
        response = service.client.patch("/adapters/poet", json={"pinned": True}, headers={"If-Match": etag})
        assert response.status_code == status


def test_a_pin_without_room_is_refused_and_not_kept(service: Service, digest: str) -> None:
    service.engine.refuse = "pins_full"
    assert error(service.client.patch("/adapters/poet", json={"pinned": True}))[:2] == (409, "pins_full")
    assert error(service.post("/adapters/poet/load", tier="device", pin=True))[:2] == (409, "pins_full")
    assert service.get("poet")["pinned"] is False
    refused = service.put("bard", seed=2, pin="true")
    assert error(refused)[:2] == (409, "pins_full")
    assert service.names() == ["poet"]


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "param"),
    [
        ("POST", "load", {}, "missing_field", "tier"),
        ("POST", "load", {"tier": "disk"}, "invalid_field", "tier"),
        ("POST", "load", {"tier": "device", "pin": "yes"}, "invalid_field", "pin"),
        ("POST", "load", {"tier": "device", "pinned": True}, "unknown_field", "pinned"),
        ("POST", "unload", {}, "missing_field", "tier"),
        ("POST", "unload", {"tier": None}, "invalid_field", "tier"),
        ("POST", "unload", {"tier": "host", "force": True}, "unknown_field", "force"),
        ("PATCH", "", {}, "missing_field", "pinned"),
        ("PATCH", "", {"pinned": 1}, "invalid_field", "pinned"),
        ("PATCH", "", {"pinned": True, "tier": "host"}, "unknown_field", "tier"),
    ],
)
def test_a_wrong_field_is_refused_by_name(
    service: Service, digest: str, method: str, path: str, body: dict[str, object], code: str, param: str
) -> None:
    response = service.client.request(method, f"/adapters/poet/{path}".rstrip("/"), json=body)
    assert error(response) == (400, code, param)
    assert (service.engine.loads, service.engine.unloads, service.engine.pins) == ([], [], {})


def test_a_name_that_does_not_exist_is_not_found(service: Service) -> None:
    for method, path, body in (
        ("POST", "/adapters/nobody/load", {"tier": "device"}),
        ("POST", "/adapters/nobody/unload", {"tier": "device"}),
        ("PATCH", "/adapters/nobody", {"pinned": True}),
    ):
        assert error(service.client.request(method, path, json=body)) == (404, "adapter_not_found", "name")
