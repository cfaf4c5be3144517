"""A disk that does not work is no fault of the service: every verb answers 503 or 507, and nothing is half done."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from storage import local
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOENT)
PLACES = {  # where a write fails
    "making a file": ((tempfile, "mkstemp"), (tempfile, "mkdtemp")),
    "flushing": ((os, "fsync"),),
    "renaming": ((os, "rename"),),
    "locking": ((local, "locked"),),
}
VERBS: dict[str, Callable[[LiveServer], httpx.Response]] = {
    "upload": lambda live: live.client.put("/adapters/new", files=multipart(*bundle(1))),
    "replace": lambda live: live.client.put("/adapters/kept", files=multipart(*bundle(2))),
    "import": lambda live: live.post("/adapters", name="new", src=live.services.settings.allowed_sources[0]),
    "vLLM's import": lambda live: live.post(
        "/v1/load_lora_adapter", lora_name="new", lora_path=live.services.settings.allowed_sources[0]
    ),
    "pin": lambda live: live.client.patch("/adapters/kept", json={"pinned": True}),
    "load and pin": lambda live: live.post("/adapters/kept/load", tier="device", pin=True),
    "delete": lambda live: live.client.delete("/adapters/kept"),
}


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    source = tmp_path_factory.mktemp("source")
    config, weights = bundle(3)
    (source / "adapter_config.json").write_bytes(config)
    (source / "adapter_model.safetensors").write_bytes(weights)
    settings = fake_settings(tiny_model, tmp_path_factory.mktemp("data"), allowed_sources=(f"file://{source}",))
    with live_server(settings) as running:
        assert running.client.put("/adapters/kept", files=multipart(*bundle())).status_code == 201
        yield running


@pytest.mark.parametrize("number", [*NO_ROOM, *BROKEN], ids=errno.errorcode.get)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fails_is_told_as_such(
    live: LiveServer,
    verb: str,
    place: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "as injected", "/a/path")

    digest = live.client.get("/adapters/kept").json()["digest"]
    with monkeypatch.context() as broken:
        for module, function in PLACES[place]:
            broken.setattr(module, function, fail)
        answer = VERBS[verb](live)
    expected = (507, "storage_full") if number in NO_ROOM else (503, "storage_unavailable")
    assert (answer.status_code, answer.json()["error"]["code"]) == expected, answer.text
    assert "/a/path" not in answer.text
    assert "as injected" in caplog.text
    kept = live.client.get("/adapters/kept").json()
    assert (kept["digest"], kept["pinned"]) == (digest, False)
    assert '"new"' not in live.client.get("/v1/models").text


@pytest.mark.parametrize("verb", ["upload", "replace", "pin", "delete"])
def test_a_change_that_was_made_and_not_flushed_may_be_made_again(
    tiny_model: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of a name is flushed after the file is in place: whether the change lasts is not known then."""
    flush, broken = local.sync_directory, False

    def fail(directory: Path) -> None:
        if broken and directory.name == "names":
            raise OSError(errno.EIO, "as injected")
        flush(directory)

    monkeypatch.setattr(local, "sync_directory", fail)
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        assert live.client.put("/adapters/kept", files=multipart(*bundle())).status_code == 201
        broken = True
        assert VERBS[verb](live).status_code == 503
        broken = False
        assert VERBS[verb](live).status_code in ((404,) if verb == "delete" else (200, 201)), "a deleted name is gone"
        kept = live.client.get("/adapters/kept")
        assert kept.status_code == (404 if verb == "delete" else 200)
        if verb == "pin":
            assert kept.json()["pinned"]


@pytest.mark.parametrize("number", BROKEN, ids=errno.errorcode.get)
def test_a_store_that_cannot_be_read_stops_nothing_that_is_known(
    tiny_model: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers of names need is in memory."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "as injected", "/a/path")

    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        assert live.client.put("/adapters/kept", files=multipart(*bundle())).status_code == 201
        monkeypatch.setattr(local.LocalStore, "_open", fail)
        monkeypatch.setattr(os, "scandir", fail)
        for path in ("/adapters", "/adapters/kept", "/v1/models", "/health/ready", "/metrics"):
            assert live.client.get(path).status_code == 200
        assert live.complete("hello").status_code == 200
