import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.block_pool import BlockPool


def key(name):
    return str(name).encode()


def test_a_registered_block_is_found_again_after_it_was_freed():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    for index, block in enumerate(blocks):
        pool.register(block, key(index), None)
    pool.free(blocks)
    assert pool.match([key(0), key(1), key(2)]) == blocks
    assert (pool.used, pool.cached, pool.available) == (0, 2, 3)


def test_allocation_takes_free_blocks_before_cached_ones_and_tails_before_prefixes():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, key("first"), None)
    pool.register(second, key("second"), None)
    pool.free([first, second])
    assert pool.allocate(1) == [3]
    assert pool.allocate(1) == [second]
    assert pool.match([key("first")]) == [first]
    assert pool.allocate(2) is None


def test_a_failed_allocation_evicts_nothing():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.register(blocks[0], key(0), None)
    pool.free(blocks)
    assert pool.allocate(3) is None
    assert pool.match([key(0)]) == [blocks[0]]


def test_a_namespace_is_dropped_alone_and_held_blocks_of_it_are_no_longer_found():
    pool = BlockPool(5)
    ours, base, held = pool.allocate(3)
    pool.register(ours, key("ours"), "adapter")
    pool.register(base, key("base"), None)
    pool.register(held, key("held"), "adapter")
    pool.free([ours, base])
    assert pool.drop_namespace("adapter") == 2
    assert pool.match([key("ours")]) == pool.match([key("held")]) == []
    assert pool.match([key("base")]) == [base]
    pool.check([[held]])


def test_without_a_prefix_cache_nothing_is_ever_found():
    pool = BlockPool(3, prefix_cache=False)
    blocks = pool.allocate(1)
    pool.register(blocks[0], key(0), None)
    assert pool.match([key(0)]) == []


def test_freeing_a_block_twice_is_our_mistake_and_asserts():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.free(blocks)


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes, register, and go, against a recount after every operation."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12)
        self.held = []

    @rule(count=st.integers(0, 5))
    def allocate(self, count):
        available = self.pool.available
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks is not None:
            self.held.append(blocks)

    @rule(names=st.lists(st.integers(0, 8), max_size=4))
    def share(self, names):
        blocks = self.pool.match(map(key, names))
        self.pool.share(blocks)
        self.held.append(blocks)

    @rule(data=st.data(), name=st.integers(0, 8), namespace=st.sampled_from([None, "a", "b"]))
    def register(self, data, name, namespace):
        blocks = [block for blocks in self.held for block in blocks]
        if blocks:
            self.pool.register(data.draw(st.sampled_from(blocks)), key(name), namespace)
            assert self.pool.match([key(name)])

    @rule(data=st.data())
    def free(self, data):
        if self.held:
            self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(namespace=st.sampled_from([None, "a", "b"]))
    def drop(self, namespace):
        self.pool.drop_namespace(namespace)

    @invariant()
    def recount(self):
        self.pool.check(self.held)


TestBlockPoolUnderRandomOperations = BlockPoolMachine.TestCase
TestBlockPoolUnderRandomOperations.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
