import threading

import pytest
import torch

from runtime.adapter_format import canonical_from_tensors
from runtime.adapter_pool import GRACE_POLLS, AdapterFailed, AdapterPool, UnknownAdapter
from tests.runtime.adapter_files import CONFIG, DEADLINE_SECONDS, MODEL, ONE, SIZE, Clock, Q, adapter, lora, settle


@pytest.fixture
def make_pool():
    pools = []

    def make(capacity=64 * SIZE, **options):
        pools.append(AdapterPool(MODEL, capacity, torch.float32, "cpu", **options))
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
    for _ in range(GRACE_POLLS + 1):
        pool.poll()


def test_an_adapter_is_resident_after_its_load_and_its_weights_are_scaled(make_pool):
    pool = make_pool()
    digest, content = ONE
    pool.register(digest, content)
    assert not pool.acquire(digest)
    assert settle(pool) == [(digest, "loading"), (digest, "resident")]
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
    assert [site is not None for site in pool.lookup(digest)] == [i in (0, 4) for i in range(10)]
    assert pool.bytes_used == SIZE
    assert pool.resident == [digest]


def test_a_file_and_bytes_load_the_same(make_pool, tmp_path):
    digest, content = adapter(seed=5, modules=("lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj"))
    (tmp_path / "file").write_bytes(content)
    weights = []
    for source in (content, tmp_path / "file"):
        pool = make_pool(1 << 20)
        load(pool, (digest, source))
        weights.append([site for site in pool.lookup(digest) if site is not None])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.parts[0].b, other.parts[0].b)


def test_an_arena_of_another_dtype_holds_the_same_values_rounded(make_pool):
    digest = ONE[0]
    pool = AdapterPool(MODEL, SIZE, torch.bfloat16, "cpu")
    load(pool, ONE)
    exact = make_pool()
    load(exact, ONE)
    assert torch.equal(pool.lookup(digest)[0].parts[0].b, exact.lookup(digest)[0].parts[0].b.bfloat16())
    assert pool.bytes_used == SIZE // 2
    pool.close()


def test_the_least_recently_used_makes_room(make_pool):
    pool = make_pool(2 * SIZE)
    first, second, third = adapter(1), adapter(2), adapter(3)
    load(pool, first, second)
    assert pool.acquire(first[0])
    pool.release(first[0])
    load(pool, third)
    assert pool.resident == [first[0], third[0]]
    assert (pool.loads, pool.evictions) == (3, 1)


def test_an_adapter_in_use_is_never_evicted_and_the_other_waits_for_its_release(make_pool):
    pool = make_pool(SIZE)
    first, second = adapter(1), adapter(2)
    load(pool, first)
    pool.register(*second)
    settle(pool)
    assert pool.acquire(first[0])
    assert not pool.acquire(second[0])
    assert pool.lacks_room(second[0])
    assert not pool.wait(), "nothing is under way"
    pool.release(first[0])
    assert not pool.lacks_room(second[0])
    assert not pool.acquire(second[0])
    assert settle(pool) == [(first[0], "registered"), (second[0], "loading"), (second[0], "resident")]
    assert pool.acquire(second[0])


def test_nobody_is_evicted_in_vain(make_pool):
    pool = make_pool(3 * SIZE)
    first, middle, last, big = adapter(1), adapter(2), adapter(3), adapter(4, rank=8)
    load(pool, first, middle, last)
    pool.register(*big)
    settle(pool)
    assert pool.acquire(middle[0])
    assert not pool.acquire(big[0])
    assert len(pool.resident) == 3, "evicting both neighbours would not join their room"
    pool.release(middle[0])
    assert not pool.acquire(big[0])
    settle(pool)
    assert pool.acquire(big[0])


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


def test_a_newcomer_that_nobody_uses_does_not_keep_its_room_for_ever(make_pool):
    pool = make_pool(SIZE)
    first, second = adapter(1), adapter(2)
    for digest, content in (first, second):
        pool.register(digest, content)
        settle(pool)
    pool.prefetch(first[0])
    settle(pool)
    assert not pool.acquire(second[0])
    assert settle(pool)[-1] == (second[0], "resident")


def test_an_adapter_larger_than_the_arena_fails_with_both_figures(make_pool):
    pool = make_pool(SIZE - 256)
    pool.register(*ONE)
    assert not pool.acquire(ONE[0])
    [state] = [state for _ in range(2) if pool.wait(DEADLINE_SECONDS) for state in pool.poll()]
    assert state.state == "failed"
    assert str(SIZE) in state.reason
    with pytest.raises(AdapterFailed, match=str(SIZE)):
        pool.acquire(ONE[0])
    with pytest.raises(AdapterFailed, match=str(SIZE - 256)):
        pool.prefetch(ONE[0])


def test_a_failed_load_gives_its_room_back_and_is_tried_again_later(make_pool, tmp_path):
    digest, content = ONE
    path = tmp_path / "adapter"
    path.write_bytes(content)
    clock = Clock()
    pool = make_pool(SIZE, clock=clock)
    pool.register(digest, path)
    settle(pool)
    path.write_bytes(content[:-1])
    assert not pool.acquire(digest)
    assert settle(pool) == [(digest, "loading"), (digest, "failed")]
    assert pool.bytes_used == 0
    with pytest.raises(AdapterFailed, match="bytes"):
        pool.acquire(digest)
    clock.now += 1.1
    assert not pool.acquire(digest)
    assert settle(pool) == [(digest, "failed")]
    clock.now += 1.1
    with pytest.raises(AdapterFailed, match="truncated"):
        pool.prefetch(digest)
    path.write_bytes(content)
    clock.now += 1.0
    pool.prefetch(digest)
    settle(pool)
    assert pool.acquire(digest)
    assert pool.loads == 1


def test_registering_a_failed_adapter_again_gives_it_a_new_start(make_pool, tmp_path):
    digest, content = ONE
    pool = make_pool(clock=Clock())
    pool.register(digest, tmp_path / "missing")
    assert settle(pool) == [(digest, "failed")]
    pool.register(digest, content)
    pool.prefetch(digest)
    assert settle(pool)[-1] == (digest, "resident")


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
    assert pool.bytes_used == SIZE
    pool.release(digest)
    assert pool.bytes_used == 0
    assert settle(pool) == [(digest, "retired")]
    pool.retire(digest)


def test_an_adapter_retired_while_it_loads_leaves_nothing(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    pool.retire(ONE[0])
    with pytest.raises(UnknownAdapter):
        pool.acquire(ONE[0])
    assert settle(pool) == [(ONE[0], "retired")]
    assert pool.bytes_used == 0


def test_registering_again_what_is_retired_but_in_use_revives_it(make_pool):
    pool = make_pool()
    load(pool, ONE)
    assert pool.acquire(ONE[0])
    pool.retire(ONE[0])
    pool.register(*ONE)
    pool.release(ONE[0])
    assert pool.acquire(ONE[0])
    assert pool.loads == 1


def test_a_wait_counts_as_one_miss_and_later_uses_as_hits(make_pool):
    pool = make_pool()
    pool.register(*ONE)
    assert not pool.acquire(ONE[0])
    assert not pool.acquire(ONE[0])
    settle(pool)
    assert pool.acquire(ONE[0])
    assert pool.acquire(ONE[0])
    assert (pool.misses, pool.hits) == (1, 1)


def test_the_engine_is_woken_when_a_load_has_finished(make_pool):
    pool = make_pool()
    woken = threading.Event()
    pool.on_change = woken.set
    pool.register(*ONE)
    assert woken.wait(DEADLINE_SECONDS)
    woken.clear()
    pool.poll()
    pool.prefetch(ONE[0])
    assert woken.wait(DEADLINE_SECONDS)
    assert pool.poll()[-1].bytes == SIZE


def test_an_adapter_of_another_model_fails_to_load(make_pool):
    pool = make_pool()
    digest, content = canonical_from_tensors(lora(Q), CONFIG, MODEL, max_rank=64)
    pool.register(digest, content.replace(b"layers.0", b"layers.7"))
    assert settle(pool) == [(digest, "failed")]
