"""Who gets adapter memory, and in which order: places in line, what is kept for whom, and who is held back."""

import pytest
import torch

from runtime.adapters.loads import PATIENCE_SECONDS
from runtime.adapters.pool import AdapterPool
from tests.runtime.adapter_format.adapter_files import MODEL, SIZE, Clock, adapter, settle


@pytest.fixture
def make_pool():
    pools = []

    def make(device=64 * SIZE, host=64 * SIZE, **options):
        pools.append(AdapterPool(MODEL, device, host, torch.float32, "cpu", **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.check()
        pool.close()


def load(pool, *adapters):
    """Register adapters, acquire each and give it back: oldest use first."""
    for digest, source in adapters:
        pool.register(digest, source)
        assert not pool.acquire(digest)
        settle(pool)
        assert pool.acquire(digest)
        pool.release(digest)


@pytest.mark.parametrize("leaves", ["acquires it", "is aborted"])
def test_an_adapter_on_the_device_is_kept_for_its_request_and_then_makes_room_for_the_next_in_line(make_pool, leaves):
    pool = make_pool(2 * SIZE)
    adapters = [adapter(seed) for seed in range(4)]
    for digest, content in adapters:
        pool.register(digest, content)
        pool.prefetch(digest)
        settle(pool)  # two that load at once end in either order
    first, second, third, fourth = (digest for digest, _ in adapters)
    assert (pool.device.adapters, pool.device.evictions) == ([first, second], 0)
    assert len(pool.host.adapters) == 4, "the others have come as near as they could"
    assert not pool.acquire(third), "two requests that came before it wait for what is there"
    if leaves == "acquires it":
        assert pool.acquire(second)
        pool.release(second)
    else:
        pool.cancel(second)
    settle(pool)
    assert pool.device.adapters == [first, third]
    assert pool.acquire(third)
    pool.release(third)
    settle(pool)
    assert pool.device.adapters == [first, fourth]


def test_an_earlier_request_takes_the_room_of_one_that_came_later(make_pool):
    pool = make_pool(SIZE)
    early, late = adapter(1), adapter(2)
    pool.register(early[0], b"")
    pool.register(*late)
    pool.prefetch(early[0])
    pool.prefetch(late[0])
    assert (late[0], "idle", "device") in settle(pool)
    pool.register(*early)  # the first file was broken
    assert not pool.acquire(early[0])
    assert (early[0], "idle", "device") in settle(pool)
    assert not pool.acquire(late[0])
    assert pool.acquire(early[0])
    pool.release(early[0])
    assert settle(pool)[-1] == (late[0], "idle", "device")


def test_a_preempted_request_finds_its_adapter_when_it_comes_again(make_pool):
    pool = make_pool(SIZE)
    preempted, waiting = adapter(1), adapter(2)
    load(pool, preempted)
    assert pool.acquire(preempted[0])
    pool.register(*waiting)
    pool.prefetch(waiting[0])
    settle(pool)
    pool.release(preempted[0], waits=True)
    settle(pool)
    assert pool.device.adapters == [preempted[0]]
    assert pool.acquire(preempted[0])
    pool.release(preempted[0])
    assert settle(pool)[-1] == (waiting[0], "idle", "device")


def two_in_use(make_pool, *steps):
    """A pool whose device is full of two adapters, each in use for so many steps at most; its clock."""
    clock = Clock()
    pool = make_pool(2 * SIZE, clock=clock)
    used = [adapter(seed)[0] for seed in range(2)]
    load(pool, adapter(0), adapter(1))
    for digest, most in zip(used, steps, strict=True):
        assert pool.acquire(digest, most)
    return pool, clock, used


def test_an_adapter_that_lacks_room_for_long_holds_back_those_that_have_to_leave_for_it(make_pool):
    pool, clock, (a, b) = two_in_use(make_pool, 6, 12)
    big, content = adapter(2, rank=8)
    pool.register(big, content)
    pool.prefetch(big)
    settle(pool)
    assert not pool.acquire(big)
    assert pool.acquire(a), "for a while, others that are there are used"
    clock.now += PATIENCE_SECONDS + 0.1
    pool.poll()
    assert not pool.acquire(a)
    assert not pool.acquire(b)
    for digest in (a, a, b):
        pool.release(digest)
    settle(pool)
    assert pool.acquire(big)


def test_only_the_adapter_that_is_free_first_is_held_back_and_others_are_used_on(make_pool):
    pool, clock, (a, b) = two_in_use(make_pool, 12, 6)
    other, content = adapter(2)
    pool.register(other, content)
    pool.prefetch(other)
    settle(pool)
    clock.now += PATIENCE_SECONDS + 0.1
    assert pool.acquire(b), "no request waits at its turn"
    pool.release(b)
    assert not pool.acquire(other)
    pool.poll()
    assert not pool.acquire(b)
    assert pool.acquire(a)
    pool.release(b)
    settle(pool)
    assert pool.acquire(other)


def test_a_request_that_came_first_is_not_held_back(make_pool):
    pool, clock, (a, _) = two_in_use(make_pool, 6, 12)
    pool.prefetch(a)
    other, content = adapter(2)
    pool.register(other, content)
    pool.prefetch(other)
    pool.prefetch(a)
    settle(pool)
    clock.now += PATIENCE_SECONDS + 0.1
    assert not pool.acquire(other)
    pool.poll()
    assert pool.acquire(a)
    assert not pool.acquire(a)
