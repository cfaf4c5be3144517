"""Whoever asks something of the adapter pool is answered, once, whatever becomes of it."""

import pytest
import torch

from runtime.adapters.pool import AdapterPool
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


def test_who_asks_for_a_load_is_answered_when_it_has_ended(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    pool.load(DIGEST, "host", "one")
    pool.load(DIGEST, "device", "two")
    assert answers(settled(pool)) == [("one", None), ("two", None)]
    for tier in ("host", "device"):  # it is there already
        pool.load(DIGEST, tier, "again")
        assert answers(pool.poll()) == [("again", None)]


def test_who_asks_for_a_load_that_cannot_be_is_told_at_once(make_pool):
    pool = make_pool()
    pool.load("unknown", "device", "u")
    assert answers(pool.poll()) == [("u", "unknown_adapter")]
    pool.register(DIGEST, b"broken")
    pool.load(DIGEST, "device", "b")
    assert answers(settled(pool)) == [("b", "adapter_failed")]
    pool.load(DIGEST, "device", "c")
    assert answers(pool.poll()) == [("c", "adapter_failed")]


@pytest.mark.parametrize(("end", "code"), [("unload", "load_cancelled"), ("retire", "unknown_adapter")])
def test_who_waits_for_a_load_that_is_given_up_is_told_so(make_pool, end, code):
    pool = make_pool()
    pool.register(*ONE)
    pool.load(DIGEST, "device", "l")
    if end == "unload":
        pool.unload("u", DIGEST, "host")
    else:
        pool.retire(DIGEST)
    assert ("l", code) in answers(settled(pool))


def test_who_asked_for_a_load_is_told_that_it_came_even_if_it_is_evicted_in_the_same_poll(make_pool):
    pool = make_pool(device=1)
    adapters = [adapter(seed) for seed in range(4)]
    for digest, content in adapters:
        pool.register(digest, content)
        pool.load(digest, "host")
    settle(pool)
    for digest, _ in adapters:
        pool.load(digest, "device", digest)
    assert answers(settled(pool)) == [(digest, None) for digest, _ in adapters]
    assert (pool.device.loads, pool.device.evictions) == (4, 3)


def test_who_asks_for_what_is_there_is_told_so_even_if_it_is_evicted_before_the_poll(make_pool):
    pool = make_pool(device=1)
    other, content = adapter(1)
    pool.register(other, content)
    pool.load(other, "host")
    settle(pool)
    load(pool, ONE)
    pool.load(DIGEST, "device", "l")
    assert not pool.acquire(other)
    assert pool.device.adapters == []
    assert ("l", None) in answers(settled(pool))


def test_a_load_that_waits_for_room_is_answered_when_pins_leave_none(make_pool):
    pool = make_pool(device=4)
    big, small, used = adapter(1, rank=16), adapter(2, rank=8), adapter(3, rank=4)
    for digest, content in (big, small, used):
        pool.register(digest, content)
        pool.load(digest, "host")
    settle(pool)
    pool.load(used[0], "device")
    settle(pool)
    assert pool.acquire(used[0])
    pool.prefetch(big[0])
    pool.load(big[0], "device", "waits")
    assert answers(settled(pool)) == []
    pool.set_pins("p", {small[0]: "device"})
    assert answers(pool.poll()) == [("p", {}), ("waits", "adapter_failed")]
    pool.release(used[0])
    assert answers(settled(pool)) == []


@pytest.mark.parametrize("again", ["register", "load", "nothing"])
@pytest.mark.parametrize("end", ["retire", "unload", "fail", "unpin"])
@pytest.mark.parametrize("polled", [0, 1, 2])
def test_whatever_ends_a_wait_each_request_is_answered_once(make_pool, tmp_path, polled, end, again):
    pool = make_pool(device=1, host=2)
    pool.register(DIGEST, tmp_path / "adapter")
    pool.load(DIGEST, "device", "l1")
    pool.set_pins("p1", {DIGEST: "host"})
    pool.load(DIGEST, "host", "l2")
    events = []
    for _ in range(polled):
        pool.wait(0.01)
        events += pool.poll()
    ends = {
        "retire": lambda: pool.retire(DIGEST),
        "unload": lambda: pool.unload("u", DIGEST, "host"),
        "fail": lambda: pool.fail(DIGEST, "gone"),
        "unpin": lambda: pool.set_pins("u", {}),
    }
    ends[end]()
    if again != "nothing":
        pool.register(DIGEST, CONTENT)
    if again == "load":
        pool.load(DIGEST, "device", "l3")
    events += settled(pool)
    pool.fail(DIGEST, "gone")
    events += settled(pool)
    pool.retire(DIGEST)
    events += settled(pool)
    asked = ["l1", "p1", "l2"] + ["u"] * (end in ("unload", "unpin")) + ["l3"] * (again == "load")
    assert sorted(request_id for request_id, _ in answers(events)) == sorted(asked)


def test_what_is_in_use_pinned_or_unknown_is_not_unloaded(make_pool):
    pool = make_pool()
    load(pool, ONE)
    assert pool.acquire(DIGEST)
    pool.unload("a", DIGEST, "device")
    pool.unload("b", "unknown", "device")
    pool.release(DIGEST)
    pool.set_pins("c", {DIGEST: "host"})
    pool.unload("d", DIGEST, "host")
    pool.unload("e", DIGEST, "device")
    assert answers(settled(pool)) == [
        ("a", "adapter_in_use"),
        ("b", "unknown_adapter"),
        ("c", {}),
        ("d", "adapter_pinned"),
        ("e", None),
    ]
    assert (pool.host.adapters, pool.device.adapters) == ([DIGEST], [])
