"""Imports in the background: how far they are, how they fail, how they end, and how many there are at once."""

import contextlib
import itertools
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage import identity
from storage.store import StoreFull
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import Service, error, serving
from tests.service.ingest.gated_sources import TOTAL, GatedSources, denied

PLACES = 3  # for uploads and imports; one client has two of them
GATED: dict[str, Any] = {"allowed_sources": ("s3://bucket",), "sources": GatedSources, "max_uploads": PLACES}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path / "data", **GATED) as running:
        yield running
        gate(running).gate.set()


def gate(service: Service) -> GatedSources:
    assert isinstance(service.sources, GatedSources)
    return service.sources


def post(service: Service, name: str = "poet", seed: int = 0, wait: str = "false", **fields: Any) -> httpx.Response:
    body = {"name": name, "src": f"s3://bucket/{seed}", **fields}
    return service.client.post("/adapters", json=body, params={"wait": wait})


def state(service: Service, name: str = "poet") -> str | None:
    response = service.client.get(f"/adapters/{name}")
    return response.json()["state"] if response.is_success else None


def test_an_import_is_told_of_from_its_beginning_to_its_end(service: Service) -> None:
    response = post(service)
    assert response.status_code == 202
    assert (response.json()["name"], response.json()["state"]) == ("poet", "loading")

    half = {"stage": "download", "bytes": TOTAL // 2, "total_bytes": TOTAL}
    service.eventually(lambda: service.get("poet")["progress"] == half)
    loading = service.get("poet")
    unknown = ("digest", "generation", "kind", "rank", "bytes", "reason", "last_used_at", "pin_tier")
    assert {loading[field] for field in unknown} == {None}
    assert (loading["source"], loading["tier"], loading["targets"]) == ("s3://bucket/0", "remote", [])
    assert service.names() == ["poet"]
    assert "etag" not in service.client.get("/adapters/poet").headers
    assert service.client.get("/use/poet").status_code == 404, "nothing runs on it yet"

    gate(service).gate.set()
    service.eventually(lambda: state(service) == "ready")
    ready = service.get("poet")
    assert (ready["generation"], ready["progress"], ready["source"]) == (1, None, "s3://bucket/0")
    assert service.engine.loads == [(ready["digest"], "device")]
    assert len(service.files()) == 2


def test_a_failure_is_shown_until_the_name_is_published_or_deleted(service: Service) -> None:
    gate(service).error = denied()
    gate(service).gate.set()
    for healed in (True, False):
        assert post(service).status_code == 202
        service.eventually(lambda: state(service) == "failed")
        failed = service.get("poet")
        assert (failed["reason"], failed["progress"], failed["digest"]) == (denied().message, None, None)
        assert service.names() == ["poet"]
        assert service.files() == []
        if healed:
            assert service.put("poet").status_code == 201
            assert service.get("poet")["reason"] is None
        assert service.client.delete("/adapters/poet").status_code == 204
        assert error(service.client.get("/adapters/poet")) == (404, "adapter_not_found", "name")
        assert service.collect() == []
        service.engine.loads.clear()


def test_a_failed_import_may_be_tried_again(service: Service) -> None:
    gate(service).gate.set()
    gate(service).error = denied()
    post(service)
    service.eventually(lambda: state(service) == "failed")
    gate(service).error = None
    assert post(service, wait="true").status_code == 201
    assert service.get("poet")["state"] == "ready"


def test_a_fault_of_ours_is_shown_as_one_and_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    gate(service).gate.set()
    gate(service).error = RuntimeError("secret path")
    post(service)
    service.eventually(lambda: state(service) == "failed")
    assert service.get("poet")["reason"] == "an internal error; the server's log has it"
    assert "the import of poet failed" in caplog.text
    gate(service).error = None
    assert post(service, wait="true").status_code == 201


def test_a_failure_that_its_caller_was_told_is_not_kept(service: Service) -> None:
    gate(service).gate.set()
    gate(service).error = denied()
    assert error(post(service, wait="true")) == (403, "source_access_denied", "src")
    assert state(service) is None


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(StoreFull("no room"), 507, "storage_full"), (OSError(28, "No space left on device"), 507, "storage_full")],
)
def test_a_full_disk_ends_an_import_with_a_clear_error(
    service: Service, failure: Exception, status: int, code: str
) -> None:
    gate(service).gate.set()
    gate(service).error = failure
    assert error(post(service, wait="true"))[:2] == (status, code)
    assert service.files() == []


def test_what_fails_over_a_version_leaves_that_version_serving(service: Service) -> None:
    before = service.put("poet", seed=7).json()
    gate(service).error = denied()
    post(service)
    service.eventually(lambda: service.get("poet")["progress"] is not None)
    importing = service.get("poet")
    assert (importing["state"], importing["digest"]) == ("ready", before["digest"])
    gate(service).gate.set()
    service.eventually(lambda: service.get("poet")["reason"] is not None)
    after = service.get("poet")
    assert (after["state"], after["digest"]) == ("ready", before["digest"])
    assert denied().message in after["reason"]
    assert service.names() == ["poet"]


def test_while_a_name_is_imported_nothing_else_is_put_there(service: Service) -> None:
    post(service)
    busy = (409, "import_in_progress", "name")
    assert error(post(service)) == busy
    assert error(post(service, wait="true")) == busy
    assert error(service.put("poet")) == busy
    assert error(service.post("/adapters/poet/load", tier="device")) == busy
    assert error(service.post("/adapters/poet/unload", tier="device")) == busy
    assert error(service.client.patch("/adapters/poet", json={"pinned": True})) == busy
    assert service.put("another").status_code == 201
    gate(service).gate.set()
    service.eventually(lambda: state(service) == "ready")
    assert post(service, wait="true").status_code == 200


def test_deleting_a_name_ends_its_import(service: Service) -> None:
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(post, service, wait="true")
        service.eventually(lambda: gate(service).running == 1)
        assert service.client.delete("/adapters/poet").status_code == 204
        assert state(service) is None
        assert error(waiting.result()) == (409, "import_cancelled", "name")
    assert (gate(service).running, service.files()) == (0, [])
    assert error(service.client.delete("/adapters/poet")) == (404, "adapter_not_found", "name")


def test_deleting_a_name_that_is_replaced_takes_both_away(service: Service) -> None:
    service.put("poet", seed=7)
    post(service)
    service.eventually(lambda: gate(service).running == 1)
    assert error(service.client.delete("/adapters/poet", headers={"If-Match": '"0000"'}))[0] == 412
    assert gate(service).running == 1
    assert service.client.delete("/adapters/poet").status_code == 204
    assert state(service) is None
    service.eventually(lambda: gate(service).running == 0)
    service.eventually(lambda: service.collect() == [])


def test_a_name_is_free_at_once_though_a_store_holds_the_thread_of_its_import(service: Service) -> None:
    gate(service).deaf = True
    post(service, seed=1)
    service.eventually(lambda: service.get("poet")["progress"]["bytes"] > 0)
    assert service.client.delete("/adapters/poet").status_code == 204
    assert post(service, seed=2).status_code == 202
    service.eventually(lambda: gate(service).running == 2)
    gate(service).gate.set()
    service.eventually(lambda: state(service) == "ready")
    assert service.get("poet")["source"] == "s3://bucket/2"
    service.eventually(lambda: len(service.files()) == 2)


def test_an_import_that_waits_for_others_can_be_deleted(service: Service) -> None:
    for seed, name in enumerate(("first", "second", "third")):
        post(service, name, seed)
    service.eventually(lambda: gate(service).running == 2)
    assert service.get("third")["progress"] == {"stage": "download", "bytes": 0, "total_bytes": None}
    assert service.client.delete("/adapters/third").status_code == 204
    gate(service).gate.set()
    service.eventually(lambda: {adapter["state"] for adapter in service.adapters()} == {"ready"})
    assert service.names() == ["first", "second"]


def test_imports_and_uploads_share_a_bound_that_imports_wait_for_and_uploads_do_not(service: Service) -> None:
    names = [f"poet-{number}" for number in range(6)]
    for seed, name in enumerate(names):
        assert post(service, name, seed).status_code == 202
    service.eventually(lambda: gate(service).running == 2)
    refused = service.put("uploaded")
    assert error(refused) == (503, "too_many_uploads", None)
    assert "retry-after" in refused.headers

    gate(service).gate.set()
    service.eventually(lambda: [adapter["state"] for adapter in service.adapters()] == ["ready"] * 6)
    assert gate(service).most_running == 2
    # An import that has been published may still be clearing up in its place.
    service.eventually(lambda: service.put("uploaded").is_success)


def test_uploads_that_dawdle_take_their_places(service: Service) -> None:
    head = b"PUT /adapters/x HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-tar\r\nContent-Length: 5000\r\n\r\n"
    clients = itertools.count(2)
    with contextlib.ExitStack() as connections:

        def refused() -> bool:
            """One more that dawdles, for one that came beside another upload was refused itself; then an upload."""
            client = (f"127.0.0.{next(clients)}", 0)  # each has another address, since none may have both places
            connection = connections.enter_context(socket.create_connection(service.address, 20, client))
            connection.sendall(head + b"x")
            return error_of(service.put("poet")) == "too_many_uploads"

        service.eventually(refused)
        post(service)
        assert gate(service).running == 0
    service.eventually(lambda: gate(service).running == 1)


def error_of(response: httpx.Response) -> str | None:
    return None if response.is_success else error(response)[1]


def test_the_conditions_of_an_import_hold_when_it_is_published(service: Service) -> None:
    service.put("poet", seed=7)
    etag = service.client.get("/adapters/poet").headers["etag"]
    body = {"name": "poet", "src": "s3://bucket/0"}
    for headers in ({"If-None-Match": "*"}, {"If-Match": '"0000"'}):
        assert error(service.client.post("/adapters", json=body, headers=headers))[:2] == (412, "precondition_failed")
    gate(service).gate.set()
    assert service.client.post("/adapters", json=body, headers={"If-Match": etag}).status_code == 200
    assert error(service.client.post("/adapters", json=body, headers={"If-Match": etag}))[0] == 412


def test_a_shutdown_ends_imports_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "data", **GATED) as service:
        for seed in range(4):
            post(service, f"poet-{seed}", seed)
        service.eventually(lambda: gate(service).running == 2)
    assert gate(service).running == 0
    assert [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()] == [identity.FILE]


def test_an_ephemeral_import_touches_no_disk(service: Service) -> None:
    post(service, ephemeral=True)
    service.eventually(lambda: gate(service).running == 1)
    assert service.get("poet")["ephemeral"] is True
    assert [name for name in service.files() if not name.startswith("memory/")] == []
    gate(service).gate.set()
    service.eventually(lambda: state(service) == "ready")
    assert (service.get("poet")["ephemeral"], service.get("poet")["tier"]) == (True, "host")
    assert service.files() == [f"memory/{service.get('poet')['digest']}.safetensors"]


@pytest.mark.parametrize("kind", ["uploads", "imports"])
def test_no_client_takes_all_places(service: Service, kind: str) -> None:
    """One client has all but one, by slow uploads or by imports from a slow source; another client has the last one."""
    with contextlib.ExitStack() as connections:
        for number in range(PLACES - 1):
            if kind == "imports":
                assert post(service, f"slow-{number}", number).status_code == 202
            else:
                slow = connections.enter_context(socket.create_connection(service.address))
                head = f"PUT /adapters/slow-{number} HTTP/1.1\r\nhost: here\r\ncontent-type: application/x-tar\r\n"
                slow.sendall(f"{head}content-length: 1000\r\n\r\n".encode())
        # Before that another upload might take the place of a slow one, which would be refused for good
        service.eventually(lambda: service.imports._slots._value == 1)
        refused = service.client.put("/adapters/second", files=multipart(*bundle()))
        assert error(refused)[:2] == (503, "too_many_uploads")
        assert "of this key or address" in refused.text
        post(service, "waits")
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=service.client.base_url, transport=transport, timeout=30) as other:
            assert other.put("/adapters/third", files=multipart(*bundle())).status_code == 201
    gate(service).gate.set()
    service.eventually(lambda: not service.imports._of_clients)
    assert service.client.put("/adapters/second", files=multipart(*bundle())).is_success
    assert state(service, "waits") == "ready"
