from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.scheduler import QueueFull
from tests.runtime.scheduler_fakes import B, Clock, FakeAdapters, request, scheduler


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive, run, get stuck, are aborted and preempted at random; everything is recounted each time."""

    def __init__(self):
        super().__init__()
        self.adapters = FakeAdapters()
        self.clock = Clock()
        self.s = scheduler(blocks=12, running=3, waiting=4, budget=6, adapters=self.adapters, clock=self.clock)
        self.ended = set()

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 20),
        adapter=st.sampled_from([None, "a", "b", "c"]),
        invocation_start=st.integers(0, 9),
        whose=st.sampled_from([{}, {"call": "many"}, {"call": "more"}, {"salt": "tenant"}]),
    )
    def add(self, tokens, max_tokens, adapter, invocation_start, whose):
        start = min(invocation_start, len(tokens))
        new = request(tokens, max_tokens, adapter, limit=12 * B, invocation_start=start, **whose)
        full = len(self.s.waiting) + len(self.s.running) >= 7
        try:
            self.s.add(new)
        except QueueFull:
            assert full

    @rule(token=st.integers(0, 1))
    def step(self, token):
        chunks, rejected = self.s.schedule()
        assert sum(chunk.length for chunk in chunks) <= 6
        self.s.check()
        self.s.block_manager.copied()
        self.s.advance(chunks)
        for chunk in chunks:
            assert chunk.length >= 1
            assert chunk.start + chunk.length == chunk.request.computed
            held = chunk.request.adapter is None or chunk.request.holds_adapter
            assert held or chunk.start + chunk.length <= chunk.request.invocation_start
            if self.s.commit(chunk, token if chunk.samples else None):
                self.ended.add(chunk.request)
        for rejected_sequence, _ in rejected:
            assert rejected_sequence.adapter in self.adapters.broken

    @rule(data=st.data())
    def abort(self, data):
        alive = [*self.s.running, *self.s.waiting]
        if alive:
            self.s.remove(data.draw(st.sampled_from(alive)))

    @rule(adapter=st.sampled_from(["a", "b", "c"]), state=st.sampled_from(["resident", "loading", "broken"]))
    def adapter_changes(self, adapter, state):
        in_use = self.adapters.references.get(adapter, 0) > 0
        self.adapters.broken.discard(adapter)
        if state == "resident" or in_use:
            self.adapters.resident.add(adapter)
            return
        self.adapters.resident.discard(adapter)
        if state == "broken":
            self.adapters.broken.add(adapter)

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule()
    def all_adapters_work_and_everything_drains(self):
        self.adapters.broken.clear()
        self.adapters.resident |= {"a", "b", "c"}
        for _ in range(2000):
            if not self.s.running and not self.s.waiting:
                break
            self.step(0)
        assert not self.s.running
        assert not self.s.waiting
        assert self.s.block_manager.pool.used == 0
        assert not any(self.adapters.references.values())

    @invariant()
    def recount(self):
        self.s.check()
        held = {}
        for running in self.s.running:
            if running.holds_adapter:
                held[running.adapter] = held.get(running.adapter, 0) + 1
        assert held == {adapter: count for adapter, count in self.adapters.references.items() if count}
        lacking = [each for each in (*self.s.running, *self.s.waiting) if each.lacks_adapter]
        assert +self.adapters.waiting == Counter(each.adapter for each in lacking)


TestSchedulerUnderRandomOperations = SchedulerMachine.TestCase
TestSchedulerUnderRandomOperations.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
