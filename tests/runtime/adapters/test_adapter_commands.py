"""What an operator asks of the adapter pool: load, unload, pin; and what he is answered."""

import pytest
import torch

from loadtests.soak.traffic import BETWEEN_PINS
from runtime.adapters.pool import AdapterPool
from runtime.messages import AdapterState, Answer
from tests.runtime.adapter_format.adapter_files import MODEL, ONE, SIZE, Clock, adapter, answers, settle, settled

DIGEST, CONTENT = ONE


@pytest.fixture
def make_pool():
    pools = []

    def make(device=8, host=8):
        pools.append(AdapterPool(MODEL, device * SIZE, host * SIZE, torch.float32, "cpu", clock=Clock()))
        return pools[-1]

    yield make
    for pool in pools:
        pool.check()
        pool.close()


def load(pool, *adapters, tier="device"):
    for digest, content in adapters:
        pool.register(digest, content)
        pool.load(digest, tier)
        settle(pool)


def set_pins(pool, **pins):
    """Ask for pins, {tier: digests}, and wait for the answer: the codes of what is refused, by digest."""
    pool.set_pins("p", {digest: tier for tier, digests in pins.items() for digest in digests})
    [(request_id, refused)] = answers(settled(pool))
    assert request_id == "p"
    return refused


def test_a_load_goes_to_the_tier_that_is_asked_for_and_no_further():
    pool = AdapterPool(MODEL, SIZE, SIZE, torch.float32, "cpu")
    load(pool, ONE, tier="host")
    assert (pool.host.adapters, pool.device.adapters) == ([DIGEST], [])
    load(pool, ONE)
    assert pool.device.adapters == [DIGEST]
    pool.close()


def test_an_unloaded_adapter_gives_back_the_tier_and_those_above(make_pool):
    pool = make_pool()
    load(pool, ONE)
    pool.unload("u", DIGEST, "device")
    assert [type(event) for event in pool.poll()] == [AdapterState, Answer], "who gets the answer knows the state"
    assert (pool.host.adapters, pool.device.bytes_used) == ([DIGEST], 0)
    pool.load(DIGEST, "device")
    settle(pool)
    pool.unload("v", DIGEST, "host")
    assert answers(settled(pool)) == [("v", None)]
    assert pool.host.bytes_used == pool.device.bytes_used == 0
    pool.unload("w", DIGEST, "host")
    assert answers(settled(pool)) == [("w", None)], "there is nothing left to do"


def test_a_load_under_way_that_is_unloaded_is_dropped_when_it_ends_unless_it_is_asked_for_again(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    pool.load(DIGEST, "device")
    pool.unload("u", DIGEST, "host")
    assert settle(pool)[-1] == (DIGEST, "idle", None)
    assert pool.host.bytes_used == pool.device.bytes_used == 0
    pool.load(DIGEST, "device")
    pool.unload("v", DIGEST, "host")
    pool.load(DIGEST, "device")
    assert settle(pool)[-1] == (DIGEST, "idle", "device")


def test_a_pinned_adapter_is_loaded_and_outlasts_all_others(make_pool):
    pool = make_pool(device=2, host=2)
    pool.register(*ONE)
    pool.set_pins("p", {DIGEST: "device"})
    events = settled(pool)
    assert answers(events) == [("p", {})]
    assert [event.pinned for event in events if isinstance(event, AdapterState)][-1] == "device"
    for seed in range(1, 5):
        load(pool, adapter(seed))
    assert DIGEST in pool.device.adapters
    assert DIGEST not in pool.host.adapters, "only where it is pinned"
    assert pool.device.bytes_pinned == SIZE
    assert set_pins(pool) == {}
    assert pool.device.bytes_pinned == 0
    for seed in range(1, 3):
        load(pool, adapter(seed))
    assert DIGEST not in pool.device.adapters


def test_pins_take_at_most_half_of_a_tier_and_the_others_of_a_wish_are_pinned_all_the_same(make_pool):
    pool = make_pool(device=4, host=8)
    for digest, content in (adapters := [adapter(seed) for seed in range(3)]):
        pool.register(digest, content)
    first, second, third = (digest for digest, _ in adapters)
    assert set_pins(pool, device=[first, second]) == {}
    assert set_pins(pool, device=[first, second, third]) == {third: "pins_full"}
    assert pool.device.adapters == [first, second], "what may not be pinned is not loaded either"
    assert set_pins(pool, device=[first, second]) == {}, "they are pinned already"
    assert set_pins(pool, host=[first], device=[second, third]) == {}, "a pin moves to another tier"
    assert (pool.device.bytes_pinned, pool.host.bytes_pinned) == (2 * SIZE, SIZE)
    assert set(pool.device.adapters) >= {second, third}
    pool.retire(second)
    assert pool.device.bytes_pinned == SIZE


@pytest.mark.parametrize("order", [1, -1])
def test_pins_that_end_make_room_for_those_that_begin_whatever_their_order(make_pool, order):
    pool = make_pool(device=2, host=2)
    for digest, content in (adapters := [adapter(seed) for seed in range(3)]):
        pool.register(digest, content)
    first, second, third = (digest for digest, _ in adapters)
    assert set_pins(pool, device=[first], host=[second]) == {}
    moved = [(first, "host"), (third, "device")][::order]
    pool.set_pins("p", dict(moved))
    assert answers(settled(pool)) == [("p", {})]
    assert (pool.device.bytes_pinned, pool.host.bytes_pinned) == (SIZE, SIZE)
    assert third in pool.device.adapters


def test_a_pin_is_decided_once_the_size_is_known_or_the_adapter_has_failed(make_pool, tmp_path):
    pool = make_pool()
    pool.register(DIGEST, tmp_path / "adapter")
    pool.set_pins("p", {DIGEST: "host"})
    assert answers(settled(pool)) == []
    (tmp_path / "adapter").write_bytes(CONTENT)
    pool.register(DIGEST, tmp_path / "adapter")
    assert answers(settled(pool)) == [("p", {})]
    assert pool.host.adapters == [DIGEST]
    other, _ = adapter(1)
    pool.register(other, tmp_path / "other")
    pool.set_pins("q", {DIGEST: "device", other: "device", "unknown": "host"})
    events = settled(pool)
    assert answers(events) == []
    assert pool.device.adapters == [DIGEST], "what can be decided does not wait for the rest"
    assert [event.state for event in events if event.digest == other][-1] == "missing"
    pool.fail(other, "gone")
    assert answers(settled(pool)) == [("q", {other: "adapter_failed", "unknown": "unknown_adapter"})]
    assert set_pins(pool, device=[other]) == {other: "adapter_failed"}
    assert pool.device.bytes_pinned == 0


def test_a_refusal_says_why(make_pool, tmp_path):
    pool = make_pool(device=2)
    digest, content = adapter(rank=8)
    pool.register(digest, content)
    pool.register(DIGEST, tmp_path / "adapter")
    pool.set_pins("p", {digest: "device", DIGEST: "host"})
    events = settled(pool)
    pool.fail(DIGEST, "the bucket is gone")
    [*_, answer] = events + pool.poll()
    assert answer.refused[digest].message == (
        f"it takes {2 * SIZE} bytes; 0 of the {SIZE} that pins may take in device memory are"
    )
    assert answer.refused[DIGEST].message == f"adapter {DIGEST} failed to load: the bucket is gone"


@pytest.mark.parametrize("again", [True, False])
def test_pins_that_are_not_decided_are_answered_when_others_replace_them(make_pool, tmp_path, again):
    pool = make_pool()
    pool.register(DIGEST, tmp_path / "adapter")
    pool.set_pins("p", {DIGEST: "host", "unknown": "host"})
    settle(pool)
    pool.set_pins("q", {DIGEST: "device"} if again else {})
    superseded = ("p", {"unknown": "unknown_adapter", DIGEST: "superseded"})
    assert answers(pool.poll()) == ([superseded] if again else [superseded, ("q", {})])
    pool.unload("s", DIGEST, "device")
    assert answers(settled(pool)) == [("s", None)]
    pool.retire(DIGEST)
    assert answers(settled(pool)) == ([("q", {DIGEST: "unknown_adapter"})] if again else [])


def test_what_does_not_fit_beside_the_pins_fails_with_the_figures(make_pool):
    pool = make_pool(device=4)
    pool.register(*ONE)
    assert set_pins(pool, device=[DIGEST]) == {}
    big, content = adapter(1, rank=16)
    pool.register(big, content)
    pool.load(big, "device")
    [state] = [event for event in settled(pool) if event.state == "failed"]
    assert state.reason == (
        f"it takes {4 * SIZE} bytes, and device adapter memory has {4 * SIZE}, of which {SIZE} are pinned"
    )
    assert state.tier is None


def pinned_far_apart(make_pool):
    """A device of eight places with pinned adapters in the second, the fifth and the eighth, in the worst case."""
    pool = make_pool(device=8, host=32)
    adapters = [adapter(seed) for seed in range(8)]
    load(pool, *adapters)
    digests = [digest for digest, _ in adapters]
    assert set_pins(pool, device=[digests[index] for index in (1, 4, 7)]) == {}
    return pool, digests


@pytest.mark.parametrize("at_turn", [True, False])
def test_pins_in_the_worst_places_leave_an_adapter_the_gap_between_them_however_others_come(make_pool, at_turn):
    pool, digests = pinned_far_apart(make_pool)
    fits, content = adapter(8, rank=8)
    pool.register(fits, content)
    unpinned = [digests[index] for index in (0, 2, 3, 5, 6)]
    for digest in unpinned:
        assert pool.acquire(digest, 3)
    if at_turn:
        assert not pool.acquire(fits)
    else:
        pool.load(fits, "device", "l")
    settle(pool)
    assert fits not in pool.device.adapters
    for digest in unpinned:
        pool.release(digest)
    events = settled(pool)
    assert fits in pool.device.adapters
    assert answers(events) == ([] if at_turn else [("l", None)])
    assert {digests[index] for index in (1, 4, 7)} < set(pool.device.adapters)


def test_an_adapter_that_no_gap_between_pinned_ones_holds_fails_with_sizes_and_the_next_step(make_pool):
    pool, digests = pinned_far_apart(make_pool)
    large, content = adapter(8, rank=12)
    pool.register(large, content)
    assert not pool.acquire(large)
    pool.load(large, "device", "l")
    events = settled(pool)
    assert answers(events) == [("l", "adapter_failed")]
    [failed] = [event for event in events if isinstance(event, AdapterState) and event.state == "failed"]
    assert failed.reason == (
        f"it takes {3 * SIZE} bytes, and the adapters pinned in device memory leave at most {2 * SIZE} of its "
        f"{8 * SIZE} in one piece: unpin one of them, and pin it again once this one is loaded"
    )
    assert BETWEEN_PINS in failed.reason, "the soak knows this failure by its words"
    assert set_pins(pool, device=[digests[1], digests[7]]) == {}
    pool.register(large, content)
    load(pool, (large, content))
    assert large in pool.device.adapters


def test_a_pin_that_no_gap_between_pinned_ones_holds_is_refused(make_pool):
    pool = make_pool(device=10, host=32)
    adapters = [adapter(seed) for seed in range(10)]
    load(pool, *adapters)
    apart = [adapters[index][0] for index in (2, 5)]
    assert set_pins(pool, device=apart) == {}
    load(pool, *adapters[8:])
    wide, content = adapter(11, rank=12)
    wider, other = adapter(12, rank=20)
    pool.register(wide, content)
    pool.register(wider, other)
    assert set_pins(pool, device=[*apart, wide]) == {}
    assert set_pins(pool, device=[*apart, wider]) == {wider: "pins_full"}
    assert pool.device.bytes_pinned == 2 * SIZE
