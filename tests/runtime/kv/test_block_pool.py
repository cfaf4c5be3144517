import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.kv.block_pool import BlockPool
from tests.runtime.kv.block_chains import B, compute, find, identities

ONE, TWO, THREE = range(B), range(2 * B), range(3 * B)


def known(pool, token_ids, **fields):
    return pool.match([each.key for each in identities(token_ids, **fields)])


def test_a_registered_block_is_found_again_after_it_was_freed():
    pool = BlockPool(4)
    blocks = compute(pool, TWO)
    pool.free(blocks)
    assert known(pool, THREE) == blocks
    assert (pool.used, pool.cached, pool.available) == (0, 2, 3)


def test_allocation_takes_free_blocks_before_cached_ones_and_the_end_of_a_chain_first():
    pool = BlockPool(4)
    first, second = compute(pool, TWO)
    pool.free([first, second])
    assert pool.allocate(1) == [3]
    assert pool.allocate(1) == [second]
    assert known(pool, TWO) == [first]
    assert pool.allocate(2) is None


def test_a_failed_allocation_evicts_nothing():
    pool = BlockPool(3)
    blocks = compute(pool, ONE)
    pool.free(blocks)
    assert pool.allocate(3) is None
    assert known(pool, ONE) == blocks


def test_a_namespace_is_dropped_alone_and_held_blocks_of_it_are_no_longer_found():
    pool = BlockPool(8)
    base = compute(pool, TWO)
    ours = compute(pool, THREE, adapter="a", invocation_start=2 * B)
    plain = compute(pool, TWO, adapter="a")
    pool.free(plain)
    assert len(pool.drop_namespace("a")) == 3
    assert known(pool, THREE, adapter="a", invocation_start=2 * B) == base
    assert known(pool, TWO, adapter="a") == []
    pool.check([base, ours])


def test_what_follows_a_dropped_block_goes_with_it():
    pool = BlockPool(8)
    blocks = compute(pool, THREE, adapter="a", invocation_start=2 * B)
    pool.free(blocks)
    plain = compute(pool, TWO, adapter="b")
    assert len(pool.drop_namespace(None)) == 3
    assert known(pool, TWO, adapter="b") == plain
    pool.check([plain])


def test_a_block_after_one_that_is_no_longer_known_stays_unknown():
    pool = BlockPool(8)
    first, *_ = compute(pool, ONE)
    pool.drop_namespace(None)
    [second] = pool.allocate(1)
    assert pool.register(second, identities(TWO)[1], first) == second
    again = compute(pool, ONE)
    assert known(pool, TWO) == again
    pool.check([[first, second], again])


def test_two_that_computed_the_same_hold_the_same_block_from_then_on():
    pool = BlockPool(8)
    chain = identities(TWO)
    mine, other = pool.allocate(2), pool.allocate(2)
    for blocks in (mine, other):
        for index, identity in enumerate(chain):
            blocks[index] = pool.register(blocks[index], identity, blocks[index - 1] if index else None)
    assert mine == other
    assert pool.used == 2
    pool.check([mine, other])


def test_without_a_prefix_cache_nothing_is_ever_found():
    pool = BlockPool(3, prefix_cache=False)
    compute(pool, ONE)
    assert known(pool, ONE) == []
    assert find(pool, ONE) == 0


def test_freeing_a_block_twice_is_our_mistake_and_asserts():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.free(blocks)


@pytest.mark.parametrize("filled", range(1, B))
def test_rule_6_a_tail_is_found_to_its_last_token(filled):
    pool = BlockPool(8)
    pool.free(compute(pool, range(B + filled)))
    for wanted in range(1, 3 * B):
        assert find(pool, range(wanted)) == min(wanted, B + filled)
    assert find(pool, [*range(B + 1), 99]) == B + 1
    assert find(pool, range(2 * B), salt="another tenant") == 0


@pytest.mark.parametrize("invocation_start", range(B, 2 * B + 1))
def test_rule_6_a_straddling_block_is_the_bases_up_to_the_invocation_in_both_directions(invocation_start):
    pool = BlockPool(16)
    pool.free(compute(pool, THREE, adapter="a", invocation_start=invocation_start))
    assert find(pool, THREE) == invocation_start
    assert find(pool, THREE, adapter="b", invocation_start=2 * B + 1) == invocation_start
    assert find(pool, THREE, adapter="b", invocation_start=B + 1) == min(invocation_start, B + 1)
    assert find(pool, THREE, adapter="a", invocation_start=invocation_start) == 3 * B
    pool = BlockPool(16)
    pool.free(compute(pool, THREE))
    assert find(pool, THREE, adapter="a", invocation_start=invocation_start) == invocation_start


def test_rule_6_the_tail_of_an_adapters_own_chain_is_its_own():
    pool = BlockPool(16)
    pool.free(compute(pool, range(2 * B + 2), adapter="a", invocation_start=1))
    assert find(pool, THREE, adapter="a", invocation_start=1) == 2 * B + 2
    assert find(pool, THREE, adapter="a", invocation_start=2) == 1
    assert find(pool, THREE, adapter="a", invocation_start=0) == 0
    assert find(pool, THREE, adapter="b", invocation_start=1) == 1


def test_of_many_that_begin_alike_the_one_that_goes_on_longest_is_found():
    pool = BlockPool(64)
    for second in range(10):
        for third in range(3):
            pool.free(compute(pool, [0, second, third]))
    assert find(pool, [0, 4, 2, 5]) == 3
    assert find(pool, [0, 4, 9, 5]) == 2
    assert find(pool, [0, 99, 2, 5]) == 1
    assert find(pool, [99]) == 0


def test_a_tail_that_goes_on_in_another_block_is_not_kept_twice():
    pool = BlockPool(8)
    pool.free(compute(pool, range(2)))
    pool.free(compute(pool, range(3)))
    assert pool.cached == 1
    pool.free(compute(pool, range(2)))
    assert pool.cached == 1, "and not when the longer one came first"
    pool.free(compute(pool, ONE))
    assert (pool.cached, find(pool, TWO)) == (1, B)
    pool.check([])


def test_a_prefix_that_others_go_on_from_is_kept_until_they_are_gone():
    pool = BlockPool(8)
    prefix = compute(pool, ONE)
    pool.free(prefix)
    branches = [compute(pool, [*ONE, branch]) for branch in range(5)]
    for branch in branches:
        pool.free(branch)
    for left in (5, 4, 3, 2, 1, 0):
        pool.allocate(1)
        assert known(pool, ONE) == prefix
        assert pool.cached == left + 1
    pool.allocate(1)
    assert known(pool, ONE) == []


def test_evicted_blocks_are_told_once_with_their_identities_the_end_of_a_chain_first():
    pool = BlockPool(3)
    first, second = compute(pool, TWO)
    pool.free([first, second])
    assert pool.take_evicted() == []
    pool.allocate(2)
    assert pool.take_evicted() == list(zip((second, first), identities(TWO)[::-1], strict=True))
    assert pool.take_evicted() == []


class BlockPoolMachine(RuleBasedStateMachine):
    """Requests come, share prefixes, register, and go, against a recount after every operation."""

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

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=3 * B),
        adapter=st.sampled_from([None, "a", "b"]),
        invocation_start=st.integers(0, 6),
    )
    def compute(self, token_ids, adapter, invocation_start):
        if self.pool.available >= 3:
            fields = {"adapter": adapter, "invocation_start": invocation_start}
            self.held.append(compute(self.pool, token_ids, **fields))
            assert find(self.pool, token_ids, **fields) == len(token_ids)

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=3 * B),
        adapter=st.sampled_from([None, "a", "b"]),
        invocation_start=st.integers(0, 6),
    )
    def share(self, token_ids, adapter, invocation_start):
        blocks = known(self.pool, token_ids, adapter=adapter, invocation_start=invocation_start)
        self.pool.share(blocks)
        self.held.append(blocks)

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
