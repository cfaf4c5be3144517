"""POST /adapters: bundles in directories of the server, below those that are allowed, and nowhere else."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.ingest import source_files
from tests.service.adapters.adapter_bundles import CONFIG, WEIGHTS, bundle
from tests.service.adapters.adapter_service import MAX_UPLOAD_BYTES, Service, error, serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory with one bundle; beside it lies one that is not allowed."""
    for directory in (tmp_path / "allowed" / "poet", tmp_path / "secret"):
        directory.mkdir(parents=True)
        for name, content in zip((CONFIG, WEIGHTS), bundle(), strict=True):
            (directory / name).write_bytes(content)
    return tmp_path / "allowed"


@pytest.fixture
def service(tmp_path: Path, root: Path) -> Iterator[Service]:
    with serving(tmp_path / "data", allowed_sources=(f"file://{root}",)) as running:
        yield running


def post(service: Service, src: object, **fields: Any) -> httpx.Response:
    return service.client.post("/adapters", json={"name": "poet", "src": str(src), **fields})


def test_a_directory_under_an_allowed_root_is_taken(service: Service, root: Path) -> None:
    response = post(service, f"file://{root}/poet", pin=True)

    assert response.status_code == 201
    adapter = response.json()
    assert (adapter["source"], adapter["pinned"]) == (f"file://{root}/poet", True)
    assert service.engine.loads == [(adapter["digest"], "device")]  # preload is the default
    assert service.put("uploaded").json()["digest"] == adapter["digest"]

    again = post(service, f"{root}/poet/", preload=False)
    assert (again.status_code, again.json()["generation"], again.json()["source"]) == (200, 1, adapter["source"])


def test_what_was_taken_needs_its_source_no_more(service: Service, root: Path) -> None:
    digest = post(service, f"file://{root}/poet", ephemeral=True).json()["digest"]
    for file in (root / "poet").iterdir():
        file.unlink()

    assert service.get("poet")["ephemeral"] is True
    assert service.engine.registered[digest].exists()


def test_nothing_outside_the_roots_is_read(service: Service, root: Path) -> None:
    secret = root.parent / "secret"
    links = {"link": secret, "up": "..", "over": "../secret", "around": f"{root}/../secret", "chain": "over"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "poet" / "higher").symlink_to("../../secret")
    for name, target in (("file", secret / WEIGHTS), ("relative", f"../../secret/{WEIGHTS}"), ("loop", WEIGHTS)):
        (root / name).mkdir()
        (root / name / CONFIG).write_bytes(bundle()[0])
        (root / name / WEIGHTS).symlink_to(target)
    inside = [*links, "link/x", "up/secret", "poet/higher", "file", "relative", "loop"]
    for path in (secret, "/", "/etc", f"{root}-not", *(f"{root}/{path}" for path in inside)):
        for src in (f"file://{path}", str(path)):
            assert error(post(service, src)) == (403, "source_not_allowed", "src"), src
    for path in (f"{root}/../secret", f"{root}/%2e%2e/secret", f"{root}/x/%2E./../../secret", f"{root}%2f..%2fsecret"):
        assert error(post(service, f"file://{path}")) == (400, "unsupported_source", "src")
    assert service.files() == []


def test_a_link_that_appears_behind_the_look_is_not_followed(
    service: Service, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "race").symlink_to(root.parent / "secret")
    monkeypatch.setattr(source_files, "_link", lambda name, directory: None)  # it was a directory when it was looked at
    assert error(post(service, f"file://{root}/race")) == (403, "source_not_allowed", "src")


def test_links_are_followed_inside_a_root(service: Service, root: Path) -> None:
    digest = post(service, f"file://{root}/poet").json()["digest"]
    hub = root / "models--org--poet"  # as the hub's cache lies on a disk
    mount, run = (
        root / "mount",
        root / "run-17",
    )  # as Kubernetes mounts a volume; as a training program names its last run
    for directory in (hub / "blobs", hub / "snapshots" / "abc", mount / "..2026_01_01", run):
        directory.mkdir(parents=True)
    (mount / "..data").symlink_to("..2026_01_01")
    for name, content in zip((CONFIG, WEIGHTS), bundle(), strict=True):
        (hub / "blobs" / f"hash-{name}").write_bytes(content)
        (hub / "snapshots" / "abc" / name).symlink_to(f"../../blobs/hash-{name}")
        (mount / "..2026_01_01" / name).write_bytes(content)
        (mount / name).symlink_to(f"..data/{name}")
        (run / name).write_bytes(content)
    (root / "latest").symlink_to("run-17")
    (root / "absolute").symlink_to(run)
    (root / "poet" / "up").symlink_to("..")
    for path in ("models--org--poet/snapshots/abc", "mount", "latest", "absolute", "poet/up/latest"):
        response = post(service, f"file://{root}/{path}")
        assert response.status_code == 200, response.text
        assert response.json()["digest"] == digest


def test_files_of_two_versions_of_a_mounted_volume_are_not_mixed(
    service: Service, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, seed in (("v1", 1), ("v2", 2)):
        (root / "mount" / version).mkdir(parents=True)
        for name, content in zip((CONFIG, WEIGHTS), bundle(seed), strict=True):
            (root / "mount" / version / name).write_bytes(content)
    for name in (CONFIG, WEIGHTS):
        (root / "mount" / name).symlink_to(f"..data/{name}")
    (root / "mount" / "..data").symlink_to("v1")
    look = source_files._link

    def turned(name: str, directory: int) -> str | None:
        found = look(name, directory)
        if name == WEIGHTS and found is not None:  # between the first look at one file and at the other
            (root / "mount" / "next").symlink_to("v2")
            (root / "mount" / "next").rename(root / "mount" / "..data")
        return found

    monkeypatch.setattr(source_files, "_link", turned)
    assert error(post(service, f"file://{root}/mount"))[1:] == ("source_changed", "src")
    assert post(service, f"file://{root}/mount").status_code == 201, "the next try finds one version"


def test_a_root_may_itself_be_behind_a_link(tmp_path: Path, root: Path) -> None:
    (tmp_path / "current").symlink_to(root)
    with serving(tmp_path / "data", allowed_sources=(f"file://{tmp_path}/current",)) as service:
        assert post(service, f"file://{tmp_path}/current/poet").status_code == 201
        assert error(post(service, f"file://{root}/poet")) == (403, "source_not_allowed", "src")


def test_links_and_other_odd_files_in_a_bundle_are_refused(service: Service, root: Path) -> None:
    for number, name in enumerate((CONFIG, WEIGHTS)):
        linked, piped, nested = (root / f"{kind}{number}" for kind in ("linked", "piped", "nested"))
        for directory in (linked, piped, nested):
            directory.mkdir()
            for other, content in zip((CONFIG, WEIGHTS), bundle(), strict=True):
                if other != name:
                    (directory / other).write_bytes(content)
        (linked / name).symlink_to("/dev/zero")
        os.mkfifo(piped / name)
        (nested / name).mkdir()
        for directory in (linked, piped, nested):
            assert error(post(service, f"file://{directory}")) == (403, "source_not_allowed", "src")
    assert service.files() == []


def test_what_is_not_there_is_not_found_and_the_operator_is_told(
    service: Service, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "half").mkdir()
    (root / "half" / CONFIG).write_bytes(b"{}")
    for path in (root / "nothing", root / "half"):
        caplog.clear()
        assert error(post(service, f"file://{path}")) == (404, "source_not_found", "src")
        assert [record.levelname for record in caplog.records if str(path) in record.getMessage()] == ["WARNING"]
    (root / "half" / "adapter_model.bin").write_bytes(b"")
    message = post(service, f"file://{root}/half").json()["error"]["message"]
    assert "it has adapter_model.bin: python -m service.convert" in message
    assert error(post(service, f"file://{root}/poet/{CONFIG}")) == (403, "source_not_allowed", "src")
    assert service.files() == []


def test_a_source_over_the_limits_is_refused(service: Service, root: Path) -> None:
    (root / "poet" / WEIGHTS).write_bytes(b"x" * (MAX_UPLOAD_BYTES + 1))
    assert error(post(service, f"file://{root}/poet")) == (413, "body_too_large", WEIGHTS)
    (root / "poet" / CONFIG).write_bytes(b" " * ((1 << 20) + 1))
    assert error(post(service, f"file://{root}/poet")) == (413, "body_too_large", CONFIG)
    assert service.files() == []


def test_a_source_is_checked_like_an_upload(service: Service, root: Path) -> None:
    (root / "poet" / WEIGHTS).write_bytes(bundle()[1][:-1])
    assert error(post(service, f"file://{root}/poet"))[:2] == (422, "invalid_adapter")
    assert service.files() == []


@pytest.mark.parametrize("src", ["https://example.com/x", "file://host/path", "file:///a%00b", "org/repo", "poet", ""])
def test_what_is_no_source_is_refused_by_name(service: Service, src: str) -> None:
    assert error(post(service, src)) == (400, "unsupported_source", "src")


@pytest.mark.parametrize("src", ["s3://bucket/prefix", "hf://org/repo"])
def test_a_store_that_is_not_allowed_is_not_asked(service: Service, src: str) -> None:
    assert error(post(service, src)) == (403, "source_not_allowed", "src")


def test_without_allowed_roots_no_file_is_read(tmp_path: Path, root: Path) -> None:
    with serving(tmp_path / "data") as service:
        assert error(post(service, f"file://{root}/poet")) == (403, "source_not_allowed", "src")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"revision": "main"}, 400, "unsupported_revision"),
        ({"revision": 5}, 400, "invalid_field"),
        ({"name": "../x"}, 400, "invalid_name"),
        ({"name": "base-model"}, 409, "name_is_base_model"),
        ({"name": 5}, 400, "invalid_field"),
        ({"pin": "yes"}, 400, "invalid_field"),
        ({"tier": "device"}, 400, "unknown_field"),
        ({"src": None}, 400, "invalid_field"),
    ],
)
def test_a_wrong_field_is_refused(service: Service, root: Path, fields: dict[str, Any], status: int, code: str) -> None:
    body = {"name": "poet", "src": f"file://{root}/poet", **fields}
    response = service.client.post("/adapters", json=body)
    assert error(response)[:2] == (status, code)
    assert next(iter(fields)) in response.json()["error"]["message"]
    assert service.files() == []


def test_a_body_that_is_no_json_or_too_much_is_refused(service: Service) -> None:
    assert error(service.client.post("/adapters", content=b"{"))[:2] == (400, "invalid_json")
    assert error(service.client.post("/adapters", content=b""))[:2] == (400, "invalid_json")
    assert error(service.client.post("/adapters", content=b" " * 20_000))[:2] == (413, "body_too_large")
