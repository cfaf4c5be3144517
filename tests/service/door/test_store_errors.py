"""A disk that does not work is no fault of the service: every verb answers 503 or 507, and nothing is half done."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOENT)
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
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fails_is_told_as_such(
    live: LiveServer, verb: str, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "as injected", "/a/path")

    digest = live.client.get("/adapters/kept").json()["digest"]
    with monkeypatch.context() as broken:
        broken.setattr(tempfile, "mkstemp", fail)
        broken.setattr(tempfile, "mkdtemp", fail)
        answer = VERBS[verb](live)
    expected = (507, "storage_full") if number in NO_ROOM else (503, "storage_unavailable")
    assert (answer.status_code, answer.json()["error"]["code"]) == expected, answer.text
    assert "/a/path" not in answer.text
    assert "as injected" in caplog.text
    kept = live.client.get("/adapters/kept").json()
    assert (kept["digest"], kept["pinned"]) == (digest, False)
    assert '"new"' not in live.client.get("/v1/models").text
