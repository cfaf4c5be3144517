"""The adapter pool as requests use it: residency, eviction, retirement."""

import threading

import pytest
import torch

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapters.errors import AdapterFailed, UnknownAdapter
from runtime.adapters.pool import AdapterPool
from tests.runtime.adapter_format.adapter_files import (
    CONFIG,
    DEADLINE_SECONDS,
    MODEL,
    ONE,
    SIZE,
    Q,
    adapter,
    canonical_bytes,
    in_memory,
    lora,
    settle,
)


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


def test_an_adapter_is_on_the_device_after_its_load_and_its_weights_are_scaled(make_pool):
    pool = make_pool()
    digest, content = ONE
    pool.register(digest, content)
    assert settle(pool) == [(digest, "idle", None)]
    assert not pool.acquire(digest)
    assert settle(pool) == [(digest, "loading", None), (digest, "idle", "device")]
    assert pool.acquire(digest)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in lora().items()}
    site = pool.lookup(digest)[0]
    [part] = site.parts
    assert torch.equal(site.a.t(), tensors[f"base_model.model.{Q}.lora_A.weight"])
    assert torch.equal(part.b, 2 * tensors[f"base_model.model.{Q}.lora_B.weight"].t())
    assert part.b.is_contiguous()
    assert (part.columns, part.ranks, part.bias) == (slice(0, 64), slice(0, 4), None)
    [value] = pool.lookup(digest)[4].parts
    assert value.columns == slice(96, 128), "v follows q and k"
    assert [site is not None for site in pool.lookup(digest)] == [i in (0, 4) for i in range(15)], "norms last"
    assert pool.device.bytes_used == pool.host.bytes_used == SIZE
    assert pool.device.adapters == pool.host.adapters == [digest]


def test_a_load_reports_the_seconds_of_each_of_its_stages_once(make_pool, tmp_path):
    pool = make_pool()
    (tmp_path / "file").write_bytes(ONE[1])
    pool.register(ONE[0], tmp_path / "file")
    assert not pool.acquire(ONE[0])
    events = [pool.poll()]
    while pool.wait(DEADLINE_SECONDS):
        events.append(pool.poll())
    seconds = [event.seconds for polled in events for event in polled if event.seconds]
    assert [set(stages) for stages in seconds] == [{"read", "pack", "copy"}]
    assert all(value > 0 for value in seconds[0].values())


def test_a_file_and_bytes_load_the_same(make_pool, tmp_path):
    digest, content = adapter(seed=5, modules=("lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"))
    (tmp_path / "file").write_bytes(content)
    weights = []
    for source in (content, tmp_path / "file"):
        pool = make_pool(1 << 20, 1 << 20)
        load(pool, (digest, source))
        assert pool.acquire(digest)
        weights.append([site for site in pool.lookup(digest) if site is not None])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.parts[0].b, other.parts[0].b)


def test_of_what_is_in_memory_nothing_is_left_to_read_before_there_can_be_room_for_it(make_pool):
    pool = make_pool(2 * SIZE)
    digest, content = adapter(seed=5)
    pool.register(digest, pool.loader.content_of(in_memory(content)))
    pool.load(digest, "device")
    assert pool.wait(DEADLINE_SECONDS)
    pool.poll()
    assert pool.device.adapters == [digest], "it took one wait"
    large, content = adapter(seed=6, rank=12)
    pool.register(large, pool.loader.content_of(in_memory(content)))
    pool.load(large, "device")
    [state] = [event for event in pool.poll() if event.digest == large]
    assert (state.state, state.tier) == ("failed", None)
    assert "device adapter memory has" in state.reason


def test_an_adapter_in_memory_of_another_model_is_refused_and_not_known(make_pool):
    pool = make_pool()
    digest, content = ONE
    with pytest.raises(InvalidAdapter, match=r"layers\.7"):
        pool.register(digest, pool.loader.content_of(in_memory(content.replace(b"layers.0", b"layers.7"))))
    assert pool.digests == []


def test_an_arena_of_another_dtype_holds_the_same_values_rounded(make_pool):
    digest = ONE[0]
    pool = AdapterPool(MODEL, SIZE, SIZE, torch.bfloat16, "cpu")
    exact = make_pool()
    for each in (pool, exact):
        load(each, ONE)
        assert each.acquire(digest)
    assert torch.equal(pool.lookup(digest)[0].parts[0].b, exact.lookup(digest)[0].parts[0].b.bfloat16())
    assert pool.device.bytes_used == SIZE // 2
    pool.close()


def test_the_least_recently_used_makes_room_and_comes_back_from_host_memory(make_pool, tmp_path):
    pool = make_pool(2 * SIZE)
    first, second, third = adapter(1), adapter(2), adapter(3)
    path = tmp_path / "second"
    path.write_bytes(second[1])
    load(pool, first, (second[0], path))
    assert pool.acquire(first[0])
    pool.release(first[0])
    load(pool, third)
    assert sorted(pool.device.adapters) == sorted([first[0], third[0]])
    assert (pool.device.loads, pool.device.evictions, pool.host.evictions) == (3, 1, 0)
    path.unlink()
    assert not pool.acquire(second[0])
    assert (second[0], "idle", "device") in settle(pool)
    assert (pool.host.hits, pool.host.misses, pool.host.loads) == (1, 3, 3)


def test_an_adapter_stays_on_the_device_when_its_host_copy_is_evicted_and_is_copied_down_when_asked(make_pool):
    pool = make_pool(host=2 * SIZE)
    first, second, third = adapter(1), adapter(2), adapter(3)
    load(pool, first, second, third)
    assert first[0] not in pool.host.adapters
    assert first[0] in pool.device.adapters
    pool.register(first[0], b"of no use any more")
    pool.load(first[0], "host")
    settle(pool)
    assert first[0] in pool.host.adapters
    assert torch.equal(pool.host.extent(first[0]), pool.device.extent(first[0]))


def test_an_adapter_in_use_is_never_evicted_and_the_other_waits_in_host_memory_for_its_release(make_pool):
    pool = make_pool(SIZE)
    first, second = adapter(1), adapter(2)
    load(pool, first)
    pool.register(*second)
    assert pool.acquire(first[0])
    assert not pool.acquire(second[0])
    settle(pool)
    assert not pool.wait(), "nothing is under way"
    assert pool.host.holds(second[0]), "only a copy is left to do"
    pool.release(first[0])
    assert not pool.acquire(second[0])
    assert set(settle(pool)) == {(first[0], "idle", "host"), (second[0], "idle", "device")}
    assert pool.acquire(second[0])


def test_nobody_is_evicted_in_vain(make_pool):
    pool = make_pool(3 * SIZE)
    first, middle, last, big = adapter(1), adapter(2), adapter(3), adapter(4, rank=8)
    load(pool, first, middle, last)
    pool.register(*big)
    settle(pool)
    assert pool.acquire(middle[0])
    assert not pool.acquire(big[0])
    settle(pool)
    assert len(pool.device.adapters) == 3, "evicting both neighbours would not join their room"
    pool.release(middle[0])
    assert not pool.acquire(big[0])
    settle(pool)
    assert pool.acquire(big[0])
    assert pool.device.adapters == [last[0], big[0]]


def test_who_waited_for_an_adapter_gets_to_use_it_before_another_evicts_it(make_pool):
    pool = make_pool(2 * SIZE)
    busy, first, second = adapter(1), adapter(2), adapter(3)
    load(pool, busy)
    assert pool.acquire(busy[0])
    for digest, content in (first, second):
        pool.register(digest, content)
    settle(pool)
    assert not pool.acquire(first[0])
    assert not pool.acquire(second[0])
    settle(pool)
    assert not pool.acquire(second[0]), "the first has just come"
    assert pool.acquire(first[0])


@pytest.mark.parametrize("small", ["device", "host"])
def test_an_adapter_larger_than_a_tier_fails_with_both_figures(make_pool, small):
    pool = make_pool(**{small: SIZE - 256})
    pool.register(*ONE)
    assert not pool.acquire(ONE[0])
    assert settle(pool)[-1] == (ONE[0], "failed", None)
    with pytest.raises(AdapterFailed, match=str(SIZE)):
        pool.acquire(ONE[0])
    with pytest.raises(AdapterFailed, match=f"{small} adapter memory has {SIZE - 256}"):
        pool.prefetch(ONE[0])


def test_a_retired_adapter_is_unknown_at_once_and_freed_with_its_last_reference(make_pool):
    pool = make_pool()
    digest = ONE[0]
    load(pool, ONE)
    assert pool.acquire(digest)
    assert pool.acquire(digest)
    pool.retire(digest)
    with pytest.raises(UnknownAdapter, match=digest):
        pool.acquire(digest)
    with pytest.raises(UnknownAdapter):
        pool.prefetch(digest)
    pool.release(digest)
    assert pool.lookup(digest)[0] is not None
    assert pool.device.bytes_used == SIZE
    pool.release(digest)
    assert pool.device.bytes_used == pool.host.bytes_used == 0
    assert settle(pool) == [(digest, "retired", None)]
    pool.retire(digest)


def test_an_adapter_retired_while_it_loads_leaves_nothing(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    assert not pool.acquire(ONE[0])
    pool.retire(ONE[0])
    with pytest.raises(UnknownAdapter):
        pool.acquire(ONE[0])
    assert settle(pool)[-1] == (ONE[0], "retired", None)
    assert pool.device.bytes_used == pool.host.bytes_used == 0


def test_registering_again_what_is_retired_but_in_use_revives_it(make_pool):
    pool = make_pool()
    load(pool, ONE)
    assert pool.acquire(ONE[0])
    pool.retire(ONE[0])
    pool.register(*ONE)
    pool.release(ONE[0])
    assert pool.acquire(ONE[0])
    assert pool.device.loads == 1


def test_a_wait_counts_as_one_miss_and_later_uses_as_hits(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    assert not pool.acquire(ONE[0])
    assert not pool.acquire(ONE[0])
    settle(pool)
    assert pool.acquire(ONE[0])
    assert pool.acquire(ONE[0])
    assert (pool.device.misses, pool.device.hits) == (1, 1)


def test_the_engine_is_woken_when_a_stage_has_finished(make_pool):
    pool = make_pool()
    woken = threading.Event()
    pool.watch(woken.set)
    pool.register(*ONE)
    pool.prefetch(ONE[0])
    while ONE[0] not in pool.device.adapters:
        assert woken.wait(DEADLINE_SECONDS)
        woken.clear()
        pool.poll()


def test_an_adapter_of_another_model_fails_to_load(make_pool):
    pool = make_pool()
    digest, content = canonical_bytes(lora(Q), CONFIG)
    pool.register(digest, content.replace(b"layers.0", b"layers.7"))
    pool.prefetch(digest)
    assert settle(pool)[-1] == (digest, "failed", None)
