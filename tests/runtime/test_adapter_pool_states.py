"""The adapter pool under requests in any order."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.adapter_pool import AdapterPool, UnknownAdapter
from tests.runtime.adapter_files import DEADLINE_SECONDS, MODEL, SIZE, Clock, adapter, settle

ADAPTERS = {f"{seed}": adapter(seed, rank)[1] for seed, rank in enumerate((4, 4, 8, 12, 2, 16))}


class AnyOrder(RuleBasedStateMachine):
    """Requests that hold adapters come and go; whatever happens, nothing leaks and everybody is served in the end."""

    def __init__(self):
        super().__init__()
        self.pool = AdapterPool(MODEL, 4 * SIZE, torch.float32, "cpu", clock=Clock())
        self.held = []
        self.known = set()

    digests = st.sampled_from(sorted(ADAPTERS))

    @rule(digest=digests)
    def register(self, digest):
        self.pool.register(digest, ADAPTERS[digest])
        self.known.add(digest)

    @rule(digest=digests)
    def retire(self, digest):
        self.pool.retire(digest)
        self.known.discard(digest)

    @rule(digest=digests)
    def prefetch(self, digest):
        if digest in self.known:
            self.pool.prefetch(digest)

    @rule(digest=digests)
    def acquire(self, digest):
        if digest not in self.known:
            with pytest.raises(UnknownAdapter):
                self.pool.acquire(digest)
        elif self.pool.acquire(digest):
            self.held.append(digest)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(wait=st.booleans())
    def poll(self, wait):
        if wait:
            self.pool.wait(DEADLINE_SECONDS)
        self.pool.poll()

    @invariant()
    def counted(self):
        self.pool.check()
        for digest in self.held:
            sites = self.pool.lookup(digest)
            assert sites[0].a.shape[1] == sites[4].parts[0].b.shape[0]
        assert set(self.held) <= set(self.pool.resident)

    def teardown(self):
        for digest in self.held:
            self.pool.release(digest)
        for digest in sorted(self.known):
            polls = 0
            while not self.pool.acquire(digest):
                assert self.pool.wait(DEADLINE_SECONDS) or polls < 20, "an adapter that fits never comes"
                self.pool.poll()
                polls += 1
            self.pool.release(digest)
        for digest in ADAPTERS:
            self.pool.retire(digest)
        settle(self.pool)
        assert self.pool.bytes_used == 0
        assert self.pool.resident == []
        self.pool.close()


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
