"""What an operator asks of the adapter pool: load, unload, pin; and what he is answered."""

import pytest
import torch

from runtime.adapters.pool import AdapterPool
from runtime.messages import AdapterState, Answer
from tests.runtime.adapter_format.adapter_files import MODEL, ONE, SIZE, Clock, adapter, settle, settled

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


def answers(events):
    return [(event.request_id, event.code) for event in events if isinstance(event, Answer)]


def load(pool, *adapters, tier="device"):
    for digest, content in adapters:
        pool.register(digest, content)
        pool.load(digest, tier)
        settle(pool)


def pin(pool, digest, tier="device"):
    """Ask for a pin and wait for the answer's code."""
    pool.pin("p", digest, tier)
    [(request_id, code)] = answers(settled(pool))
    assert request_id == "p"
    return code


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
    pool.pin("p", DIGEST, "device")
    events = settled(pool)
    assert answers(events) == [("p", None)]
    assert [event.pinned for event in events if isinstance(event, AdapterState)][-1] == "device"
    for seed in range(1, 5):
        load(pool, adapter(seed))
    assert DIGEST in pool.device.adapters
    assert DIGEST not in pool.host.adapters, "only where it is pinned"
    assert pool.device.bytes_pinned == SIZE
    assert pin(pool, DIGEST, None) is None
    for seed in range(1, 3):
        load(pool, adapter(seed))
    assert DIGEST not in pool.device.adapters


def test_pins_take_at_most_half_of_a_tier(make_pool):
    pool = make_pool(device=4, host=8)
    adapters = [adapter(seed) for seed in range(3)]
    for digest, content in adapters:
        pool.register(digest, content)
    assert [pin(pool, digest) for digest, _ in adapters] == [None, None, "pins_full"]
    assert pool.device.adapters == [digest for digest, _ in adapters[:2]], "what may not be pinned is not loaded either"
    assert pin(pool, adapters[0][0]) is None, "it is pinned already"
    assert pin(pool, adapters[0][0], "host") is None, "a pin moves to another tier"
    assert (pool.device.bytes_pinned, pool.host.bytes_pinned) == (SIZE, SIZE)
    assert pin(pool, adapters[2][0]) is None
    pool.retire(adapters[1][0])
    assert pool.device.bytes_pinned == SIZE


def test_a_pin_is_decided_once_the_size_is_known_or_the_adapter_has_failed(make_pool, tmp_path):
    pool = make_pool()
    pool.register(DIGEST, tmp_path / "adapter")
    pool.pin("p", DIGEST, "host")
    assert answers(settled(pool)) == []
    (tmp_path / "adapter").write_bytes(CONTENT)
    pool.register(DIGEST, tmp_path / "adapter")
    assert answers(settled(pool)) == [("p", None)]
    assert pool.host.adapters == [DIGEST]
    other, _ = adapter(1)
    pool.register(other, tmp_path / "other")
    pool.pin("q", other, "device")
    pool.pin("r", other, "host")
    assert settle(pool)[-1] == (other, "wanted", None)
    pool.fail(other, "gone")
    assert answers(settled(pool)) == [("q", "adapter_failed"), ("r", "adapter_failed")]
    assert pin(pool, other) == "adapter_failed"
    assert pool.device.bytes_pinned == 0
    assert pin(pool, "unknown") == "unknown_adapter"


def test_a_pin_that_is_not_decided_is_answered_when_it_is_ended_or_its_adapter_retired(make_pool, tmp_path):
    pool = make_pool()
    pool.register(DIGEST, tmp_path / "adapter")
    pool.pin("p", DIGEST, "host")
    settle(pool)
    pool.pin("q", DIGEST, None)
    pool.pin("r", DIGEST, "device")
    pool.unload("s", DIGEST, "device")
    pool.retire(DIGEST)
    assert answers(settled(pool)) == [("p", "superseded"), ("q", None), ("s", None), ("r", "unknown_adapter")]


def test_what_does_not_fit_beside_the_pins_fails_with_the_figures(make_pool):
    pool = make_pool(device=4)
    pool.register(*ONE)
    assert pin(pool, DIGEST) is None
    big, content = adapter(1, rank=16)
    pool.register(big, content)
    pool.load(big, "device")
    [state] = [event for event in settled(pool) if event.state == "failed"]
    assert state.reason == (
        f"it takes {4 * SIZE} bytes, and device adapter memory has {4 * SIZE}, of which {SIZE} are pinned"
    )
    assert state.tier is None


def test_an_adapter_that_is_resident_when_it_is_pinned_moves_up_out_of_the_way_while_it_is_used(make_pool):
    pool = make_pool(device=4)
    load(pool, adapter(1), ONE)
    pool.unload("u", adapter(1)[0], "host")
    settle(pool)
    assert pool.acquire(DIGEST)
    before = pool.lookup(DIGEST)[0].a.clone()
    low = pool.device.extent(DIGEST).data_ptr()
    assert pin(pool, DIGEST) is None
    assert pool.device.extent(DIGEST).data_ptr() == low + 2 * SIZE, "from the second place to the fourth"
    assert torch.equal(pool.lookup(DIGEST)[0].a, before)
    assert pool.lookup(DIGEST)[0].a.data_ptr() == pool.device.extent(DIGEST).data_ptr()
    pool.release(DIGEST)
    big = adapter(2, rank=12)
    load(pool, big)
    assert big[0] in pool.device.adapters
    assert pool.device.bytes_used == 4 * SIZE


def test_pinned_adapters_close_up_when_others_need_the_room_between_them(make_pool):
    pool = make_pool(device=8, host=16)
    first, second, third = (adapter(seed) for seed in range(3))
    load(pool, first, second, third)
    for digest, _ in (first, second, third):
        assert pin(pool, digest) is None
    assert pin(pool, first[0], None) is None  # the one at the top end
    big = adapter(3, rank=24)
    load(pool, big)
    for _ in range(4):
        settle(pool)
    assert set(pool.device.adapters) == {second[0], third[0], big[0]}


@pytest.mark.parametrize("in_host", [True, False])
def test_a_pinned_adapter_closes_up_even_if_the_hole_is_smaller_than_itself(make_pool, in_host):
    pool = make_pool(device=8, host=16)
    top, pinned, big = adapter(0), adapter(1, rank=8), adapter(2, rank=24)
    for digest, content in (top, pinned):
        pool.register(digest, content)
        assert pin(pool, digest) is None
    low = pool.device.extent(pinned[0]).data_ptr()
    before = pool.device.extent(pinned[0]).clone()
    assert pin(pool, top[0], None) is None
    pool.unload("u", top[0], "device")
    if not in_host:
        pool.host.drop(pinned[0])
    pool.register(pinned[0], b"of no use any more")
    settle(pool)
    load(pool, big)
    assert set(pool.device.adapters) == {pinned[0], big[0]}
    assert pool.device.extent(pinned[0]).data_ptr() == low + SIZE
    assert torch.equal(pool.device.extent(pinned[0]), before)
    assert pool.acquire(pinned[0])
    assert pool.lookup(pinned[0])[0].a.data_ptr() == low + SIZE
    pool.release(pinned[0])
