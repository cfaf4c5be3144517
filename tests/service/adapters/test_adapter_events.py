"""The log of what happens to adapters: a line for each event, with who did it, which content, and how long it took."""

import logging
from pathlib import Path

import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until


class Events:
    """The events in the log, in their order."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "service")
        self._caplog = caplog

    def of(self, message: str) -> list[dict[str, object]]:
        return [record.fields for record in list(self._caplog.records) if record.getMessage() == message]

    def one(self, message: str) -> dict[str, object]:
        """The only event of a kind; it may come after its answer."""
        wait_until(lambda: bool(self.of(message)))
        [event] = self.of(message)
        return event


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    return Events(caplog)


def upload(server: LiveServer, name: str, seed: int = 0, query: str = "") -> dict[str, object]:
    answer = server.client.put(f"/adapters/{name}{query}", files=multipart(*bundle(seed=seed)))
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, object] = answer.json()
    return found


def test_an_upload_and_the_load_that_follows(server: LiveServer, events: Events) -> None:
    adapter = upload(server, "poet")
    known = {"name": "poet", "digest": adapter["digest"], "bytes": adapter["bytes"]}
    event = events.one("adapter upload")
    assert event | known | {"who": "127.0.0.1"} == event
    assert event["seconds"] > 0  # type: ignore[operator]
    loaded = events.one("adapter load")
    assert loaded | known | {"who": "engine", "tier": "device", "read_ms": 10.0, "copy_ms": 40.0} == loaded


def test_another_content_under_a_name_is_told_with_the_one_before(server: LiveServer, events: Events) -> None:
    first, second = upload(server, "muse", 1), upload(server, "muse", 2)
    replaced = events.one("adapter replaced")
    assert (replaced["name"], replaced["digest"], replaced["was"]) == ("muse", second["digest"], first["digest"])
    upload(server, "muse", 2)
    assert len(events.of("adapter replaced")) == 1


def test_pins_loads_and_the_end_of_an_adapter(server: LiveServer, events: Events) -> None:
    digest = upload(server, "bard", 3, "?preload=false")["digest"]
    call = server.client
    assert call.patch("/adapters/bard", json={"pinned": True}).status_code == 200
    assert call.patch("/adapters/bard", json={"pinned": False}).status_code == 200
    assert call.post("/adapters/bard/unload", json={"tier": "host"}).status_code == 200
    assert call.post("/adapters/bard/load", json={"tier": "host"}).status_code == 200
    assert call.delete("/adapters/bard").status_code == 204
    for action, tier in {"pin": "device", "unpin": None, "delete": None}.items():
        event = events.one(f"adapter {action}")
        assert (event["name"], event["digest"], event.get("tier")) == ("bard", digest, tier)
    for message in ("adapter load", "adapter unload"):
        wait_until(lambda message=message: len({event["who"] for event in events.of(message)}) == 2)  # type: ignore[misc]
        assert {event["digest"] for event in events.of(message)} == {digest}


def test_what_fails_is_told_with_its_reason(server: LiveServer, events: Events) -> None:
    config, weights = bundle()
    name = "a" * 60
    assert server.client.put(f"/adapters/{name}", files=multipart(config, weights[:-8])).status_code == 422
    event = events.one("adapter failed")
    assert (event["name"], event["during"], event["code"]) == (name, "upload", "invalid_adapter")
    assert "weights" in str(event["reason"]) or "adapter_model" in str(event["reason"])


def test_an_import_is_told_with_its_source_also_if_nobody_waits(
    tiny_model: Path, tmp_path: Path, events: Events
) -> None:
    for name, content in zip(("adapter_config.json", "adapter_model.safetensors"), bundle(), strict=True):
        (tmp_path / "poet").mkdir(exist_ok=True)
        (tmp_path / "poet" / name).write_bytes(content)
    source = f"file://{tmp_path}"
    with live_server(fake_settings(tiny_model, tmp_path / "data", allowed_sources=(source,))) as live:
        body = {"name": "poet", "src": f"{source}/poet"}
        assert live.client.post("/adapters?wait=false", json=body).status_code == 202
        event = events.one("adapter import")
        assert (event["name"], event["source"], event["who"]) == ("poet", f"{source}/poet", "127.0.0.1")
        live.client.post("/adapters", json=body | {"src": f"{source}/none"})
        failed = events.one("adapter failed")
    assert (failed["during"], failed["code"]) == ("import", "source_not_found")
