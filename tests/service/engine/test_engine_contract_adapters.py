"""What the service may expect of an engine process with adapters, of the fake one and of the real one alike."""

import time

from runtime.messages import (
    Abort,
    AdapterState,
    Answer,
    DropNamespace,
    FailAdapter,
    Failed,
    LoadAdapter,
    PinsSet,
    RetireAdapter,
    SetPins,
    Tier,
    Tokens,
    UnloadAdapter,
)
from tests.service.engine.either_engine import ADAPTER_BYTES, Adapter, Engine, endless, request, tokens_of


def load(engine: Engine, adapter: Adapter, tier: Tier) -> str | None:
    return engine.ask(LoadAdapter, digest=adapter.digest, tier=tier)


def state(engine: Engine, adapter: Adapter, state: str, tier: Tier | None = None) -> AdapterState:
    """The next report of an adapter in a state and a tier."""
    return engine.next(AdapterState, digest=adapter.digest, state=state, tier=tier)


def test_an_adapter_is_loaded_from_tier_to_tier_and_unloaded(engine: Engine, adapter: Adapter) -> None:
    before = engine.stats()
    adapter.write()
    engine.send(adapter.register())
    state(engine, adapter, "idle")
    engine.send(LoadAdapter(digest=adapter.digest, tier="host"))
    assert set(state(engine, adapter, "idle", "host").seconds) == {"read", "pack"}
    assert load(engine, adapter, "host") is None, "it is there already"
    engine.send(LoadAdapter(digest=adapter.digest))
    assert set(state(engine, adapter, "idle", "device").seconds) == {"copy"}
    assert load(engine, adapter, "device") is None
    assert load(engine, adapter, "host") is None
    stats = engine.stats()
    for tier, earlier, size in ((stats.device, before.device, 3), (stats.host, before.host, 4)):
        assert (tier.adapters, tier.loads - earlier.loads, tier.bytes_pinned) == ([adapter.digest], 1, 0)
        assert 0 < tier.bytes_used < tier.bytes_total == size * ADAPTER_BYTES
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") is None
    stats = engine.stats()
    assert (stats.device.adapters, stats.device.bytes_used, stats.host.adapters) == ([], 0, [adapter.digest])
    assert load(engine, adapter, "device") is None
    engine.send(UnloadAdapter(request_id="unload", digest=adapter.digest, tier="host"))
    state(engine, adapter, "idle", None)
    assert engine.next(Answer) == Answer(request_id="unload")
    stats = engine.stats()
    assert stats.device.bytes_used == stats.host.bytes_used == 0
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="host") is None, "there is nothing left to do"


def test_a_request_loads_its_adapter_which_is_in_use_meanwhile(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    asked_at = time.monotonic()
    engine.send(adapter.register(), endless("long", adapter=adapter.digest))
    loaded = state(engine, adapter, "idle", "device")
    assert set(loaded.stages) == {"read", "pack", "copy"}
    assert all(asked_at <= began <= ended for began, ended in loaded.stages.values()), "it has a clock of its own"
    engine.next(Tokens, request_id="long")
    assert engine.stats().running_adapters == [adapter.digest]
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_in_use"
    engine.send(Abort(request_id="long"))
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") is None
    assert engine.stats().running_adapters == []


def test_the_base_and_an_adapter_answer_differently(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register())
    of_adapter = tokens_of(engine.generate(adapter=adapter.digest, max_tokens=20))
    assert of_adapter != tokens_of(engine.generate(max_tokens=20))


def test_what_waits_for_a_missing_file_goes_on_when_it_is_registered_again(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register())
    state(engine, adapter, "idle")
    load = LoadAdapter(request_id="load", digest=adapter.digest)
    engine.send(load, request("waiting", adapter=adapter.digest))
    assert state(engine, adapter, "missing").reason
    engine.generate(max_tokens=2)  # others run meanwhile
    stats = engine.stats()
    assert (stats.waiting, stats.waiting_adapters, stats.running_adapters) == (1, [adapter.digest], [])
    adapter.write()
    engine.send(adapter.register())
    assert engine.next(Answer).code is None
    engine.next(Tokens, request_id="waiting", finish_reason="length")


def test_a_file_that_cannot_be_had_fails_what_waits_for_it_with_the_reason(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), LoadAdapter(request_id="load", digest=adapter.digest))
    engine.send(request("waiting", adapter=adapter.digest))
    state(engine, adapter, "missing")
    engine.send(FailAdapter(digest=adapter.digest, reason="the bucket said 403"))
    assert state(engine, adapter, "failed").reason == "the bucket said 403"
    answer = engine.next(Answer, request_id="load")
    assert (answer.code, "the bucket said 403" in answer.message) == ("adapter_failed", True)
    failed = engine.next(Failed, request_id="waiting")
    assert (failed.code, "the bucket said 403" in failed.message) == ("adapter_failed", True)
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    assert load(engine, adapter, "host") == "adapter_failed"
    adapter.write()
    engine.send(adapter.register())
    assert load(engine, adapter, "host") is None, "a new registration is a new start"


def test_a_retired_adapter_is_unknown_and_what_waits_for_it_is_told(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), LoadAdapter(request_id="load", digest=adapter.digest))
    engine.send(request("waiting", adapter=adapter.digest))
    state(engine, adapter, "missing")
    engine.send(RetireAdapter(digest=adapter.digest), RetireAdapter(digest="unknown"))
    state(engine, adapter, "retired")
    assert engine.next(Answer, request_id="load").code == "unknown_adapter"
    assert engine.next(Failed, request_id="waiting").code == "adapter_failed"
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    adapter.write()
    engine.send(adapter.register())
    assert len(engine.generate(adapter=adapter.digest)) == 5, "the same bytes may come again"


def test_an_adapter_is_retired_when_the_last_request_on_it_has_ended(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register(), endless("long", adapter=adapter.digest))
    engine.next(Tokens, request_id="long")
    engine.send(RetireAdapter(digest=adapter.digest))
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    assert load(engine, adapter, "host") == "unknown_adapter"
    stats = engine.stats()
    assert (stats.running, stats.device.adapters) == (1, [adapter.digest])
    engine.send(Abort(request_id="long"))
    state(engine, adapter, "retired")


def test_an_unknown_digest_is_refused(engine: Engine) -> None:
    for kind in (LoadAdapter, UnloadAdapter):
        assert engine.ask(kind, digest="unknown", tier="host") == "unknown_adapter"
    assert engine.set_pins({"unknown": "host"}) == {"unknown": "unknown_adapter"}
    engine.send(LoadAdapter(digest="unknown"), FailAdapter(digest="unknown", reason="no"))
    assert engine.ask(DropNamespace, namespace="unknown") is None


def test_a_pinned_adapter_is_not_unloaded_and_pins_can_be_full(
    engine: Engine, adapter: Adapter, other: Adapter
) -> None:
    for each in (adapter, other):
        each.write()
        engine.send(each.register())
    assert engine.set_pins({adapter.digest: "device"}) == {}
    assert load(engine, adapter, "device") is None
    stats = engine.stats()
    assert (stats.device.adapters, stats.device.bytes_pinned) == ([adapter.digest], stats.device.bytes_used)
    assert stats.host.bytes_pinned == 0
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_pinned"
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="host") == "adapter_pinned"
    assert engine.set_pins({adapter.digest: "device", other.digest: "device"}) == {other.digest: "pins_full"}
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_pinned", "the others stay pinned"
    engine.send(SetPins(request_id="unpin", pins={}))
    assert engine.next(AdapterState, digest=adapter.digest, pinned=None).tier == "device"
    assert engine.next(PinsSet) == PinsSet(request_id="unpin")
    assert engine.set_pins({adapter.digest: "device"}) == {}
    assert engine.set_pins({other.digest: "device"}) == {}, "one takes the place of the other"
    assert load(engine, other, "device") is None


def test_a_pin_waits_for_the_file_and_fails_with_it(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), SetPins(request_id="pin", pins={adapter.digest: "host"}))
    state(engine, adapter, "missing")
    engine.send(FailAdapter(digest=adapter.digest, reason="gone"))
    assert state(engine, adapter, "failed").reason == "gone"
    refusal = engine.next(PinsSet, request_id="pin").refused[adapter.digest]
    assert (refusal.code, "gone" in refusal.message) == ("adapter_failed", True)
    adapter.write()
    engine.send(adapter.register())
    assert engine.set_pins({adapter.digest: "host"}) == {}
    assert load(engine, adapter, "host") is None
    assert engine.stats().host.bytes_pinned > 0


def test_pins_that_wait_for_a_file_are_answered_when_others_replace_them(
    engine: Engine, adapter: Adapter, other: Adapter
) -> None:
    other.write()
    engine.send(adapter.register(), other.register(), SetPins(request_id="pin", pins={adapter.digest: "host"}))
    state(engine, adapter, "missing")
    assert engine.set_pins({other.digest: "host"}) == {}
    engine.send(SetPins(request_id="again", pins={adapter.digest: "device", other.digest: "host"}))
    engine.send(SetPins(request_id="none", pins={}))
    refused = engine.next(PinsSet, request_id="again").refused
    assert {digest: refusal.code for digest, refusal in refused.items()} == {adapter.digest: "superseded"}
    assert engine.next(PinsSet) == PinsSet(request_id="none")
    assert load(engine, other, "host") is None
