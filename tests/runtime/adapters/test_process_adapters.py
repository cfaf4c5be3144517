"""The engine process and adapters: every command and every report of them over the socket."""

import json

import pytest

from runtime.messages import (
    AdapterState,
    Answer,
    FailAdapter,
    Failed,
    GetStats,
    LoadAdapter,
    PinsSet,
    Ready,
    RegisterAdapter,
    RetireAdapter,
    SetPins,
    Stats,
    Tokens,
    UnloadAdapter,
)
from runtime.models.config import ModelConfig
from tests.runtime.adapter_format.adapter_files import canonical_bytes
from tests.runtime.engine_peer import Peer, generate
from tests.runtime.tiny_engine import ADAPTER_CONFIG, adapter_tensors
from tests.runtime.tiny_model import TINY


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    peer = Peer(tmp_path, adapter_bytes=2**16, host_adapter_bytes=2**17)
    peer.next(Ready)
    yield peer
    peer.close()


@pytest.fixture
def adapter(engine, tmp_path):
    """The digest of an adapter, its path, and its file, which is not there yet."""
    arrays = {name: tensor.numpy() for name, tensor in adapter_tensors().items()}
    model = ModelConfig.from_directory(tmp_path)
    digest, content = canonical_bytes(arrays, ADAPTER_CONFIG, model)
    return digest, tmp_path / f"{digest}.safetensors", content


def until(engine, state, tier=None):
    """The report of an adapter in a state and a tier."""
    while True:
        event = engine.next(AdapterState)
        if (event.state, event.tier) == (state, tier):
            return event


def test_a_file_is_missing_fetched_and_served(engine, adapter):
    digest, path, content = adapter
    engine.send(RegisterAdapter(digest=digest, path=str(path)))
    until(engine, "idle")
    engine.send(generate("a", adapter=digest))
    assert "missing" in until(engine, "missing").reason
    engine.send(generate("b"))
    assert engine.next(Tokens).request_id == "b", "others run meanwhile"
    path.write_bytes(content)
    engine.send(RegisterAdapter(digest=digest, path=str(path)))
    resident = until(engine, "idle", "device")
    assert set(resident.seconds) == {"read", "pack", "copy"}
    while engine.next(Tokens).request_id != "a":
        pass


def test_a_file_that_cannot_be_had_fails_its_requests_with_the_reason_and_nothing_else(engine, adapter):
    digest, path, _ = adapter
    path.write_bytes(b"not an adapter")
    engine.send(RegisterAdapter(digest=digest, path=str(path)))
    engine.send(generate("a", adapter=digest))
    assert "corrupt" in until(engine, "missing").reason
    engine.send(FailAdapter(digest=digest, reason="the bucket said 403"))
    failed = engine.next(Failed)
    assert (failed.request_id, failed.code) == ("a", "adapter_failed")
    assert "the bucket said 403" in failed.message
    engine.send(generate("b"))
    assert engine.next(Tokens).request_id == "b"


def test_an_adapter_is_loaded_pinned_unpinned_unloaded_and_retired(engine, adapter):
    digest, path, content = adapter
    path.write_bytes(content)
    engine.send(RegisterAdapter(digest=digest, path=str(path)))
    engine.send(LoadAdapter(digest=digest, tier="host"))
    until(engine, "idle", "host")
    engine.send(SetPins(request_id="pin", pins={digest: "device"}))
    answer, state = engine.next_of_each(PinsSet, AdapterState, until=lambda event: event.tier == "device")
    assert answer == PinsSet(request_id="pin")
    assert (state.state, state.pinned) == ("idle", "device")
    engine.send(UnloadAdapter(request_id="unload", digest=digest, tier="device"))
    refused = engine.next(Answer)
    assert (refused.request_id, refused.code) == ("unload", "adapter_pinned")
    engine.send(GetStats())
    stats = engine.next(Stats)
    assert stats.device.adapters == stats.host.adapters == [digest]
    assert (stats.device.bytes_total, stats.host.bytes_total) == (2**16, 2**17)
    assert (stats.device.bytes_pinned, stats.device.loads, stats.host.bytes_pinned) == (stats.device.bytes_used, 1, 0)
    engine.send(SetPins(request_id="unpin", pins={}))
    assert engine.next(PinsSet) == PinsSet(request_id="unpin")
    engine.send(UnloadAdapter(request_id="unload", digest=digest, tier="host"))
    answer, state = engine.next_of_each(Answer, AdapterState, until=lambda event: event.tier is None)
    assert answer == Answer(request_id="unload")
    assert (state.state, state.pinned) == ("idle", None)
    engine.send(RetireAdapter(digest=digest))
    until(engine, "retired")
    engine.send(UnloadAdapter(request_id="late", digest=digest, tier="host"))
    assert engine.next(Answer).code == "unknown_adapter"


def test_a_pin_waits_for_the_file_and_says_when_it_cannot_be(engine, adapter):
    digest, path, _ = adapter
    engine.send(SetPins(request_id="a", pins={"unknown": "host"}))
    assert engine.next(PinsSet).refused["unknown"].code == "unknown_adapter"
    engine.send(RegisterAdapter(digest=digest, path=str(path)))
    engine.send(SetPins(request_id="b", pins={digest: "host"}))
    until(engine, "missing")
    engine.send(FailAdapter(digest=digest, reason="gone"))
    answer, state = engine.next_of_each(PinsSet, AdapterState, until=lambda event: event.state == "failed")
    refusal = answer.refused[digest]
    assert (answer.request_id, refusal.code, state.reason) == ("b", "adapter_failed", "gone")
    assert "gone" in refusal.message
