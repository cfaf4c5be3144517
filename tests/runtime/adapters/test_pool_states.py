"""The adapter pool under requests, commands and faults in any order."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.adapters.errors import AdapterFailed, UnknownAdapter
from runtime.adapters.pool import AdapterPool
from runtime.messages import Answer, PinsSet
from tests.runtime.adapter_format.adapter_files import (
    DEADLINE_SECONDS,
    MODEL,
    SIZE,
    Clock,
    adapter,
    in_memory,
    settle,
    settled,
)

RANKS = (4, 4, 8, 12, 2, 16)
ADAPTERS = dict(adapter(seed, rank) for seed, rank in enumerate(RANKS))
DIGESTS = list(ADAPTERS)
FILES = {"right": lambda content: content, "corrupt": lambda content: content[:-1] + b"\xff", "missing": None}
digests = st.sampled_from(DIGESTS)
tiers = st.sampled_from(["host", "device"])


class AnyOrder(RuleBasedStateMachine):
    """Requests hold adapters, operators load, pin and unload them, files go and come; whatever happens, nothing leaks.

    In the end everybody who fits is served. The device holds four of the smallest, the host six.
    """

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.pool = AdapterPool(MODEL, 4 * SIZE, 6 * SIZE, torch.float32, "cpu", clock=self.clock)
        self.directory = Path(tempfile.mkdtemp())
        self.waiting = []  # the adapters of requests in the queue
        self.held = []
        self.known = set()
        self.asked = 0
        self.answered = {}
        self.states = {}
        for digest in DIGESTS:
            self.write(digest, "right")

    def path(self, digest):
        return self.directory / digest

    def write(self, digest, condition):
        self.path(digest).unlink(missing_ok=True)
        if FILES[condition]:
            self.path(digest).write_bytes(FILES[condition](ADAPTERS[digest]))

    def ask(self, command, *arguments):
        self.asked += 1
        command(f"{self.asked}", *arguments)

    def take(self, events):
        for event in events:
            if isinstance(event, Answer | PinsSet):
                assert event.request_id not in self.answered, "answered twice"
                self.answered[event.request_id] = event
            else:
                if event.digest in self.states and event.state not in ("failed", "retired"):
                    assert event != self.states[event.digest], "the same report twice"
                self.states[event.digest] = event

    @rule(digest=digests, form=st.sampled_from(["file", "bytes", "in memory"]))
    def register(self, digest, form):
        if form == "in memory":
            self.pool.register(digest, self.pool.loader.content_of(in_memory(ADAPTERS[digest])))
        else:
            self.pool.register(digest, ADAPTERS[digest] if form == "bytes" else self.path(digest))
        self.known.add(digest)

    @rule(digest=digests)
    def retire(self, digest):
        self.pool.retire(digest)
        self.known.discard(digest)

    @rule(old=digests, new=digests)
    def replace(self, old, new):
        self.register(new, "file")
        if old != new:
            self.retire(old)

    @rule(digest=digests, condition=st.sampled_from(list(FILES)))
    def file_changes(self, digest, condition):
        self.write(digest, condition)

    @rule(digest=digests)
    def the_file_cannot_be_had(self, digest):
        self.pool.fail(digest, "gone for good")

    @rule(digest=digests)
    def queue(self, digest):
        if self.use(self.pool.prefetch, digest) is not False:
            self.waiting.append(digest)

    @rule(number=st.integers(0, 9))
    def acquire(self, number):
        if self.waiting:
            digest = self.waiting.pop(number % len(self.waiting))
            self.turn(digest)

    def turn(self, digest):
        """A request from the queue takes its adapter, goes back to the queue or is rejected; whether it took it."""
        try:
            acquired = self.pool.acquire(digest, 3)
        except AdapterFailed:
            assert digest in self.known
            self.pool.cancel(digest)
            return False
        except UnknownAdapter:
            assert digest not in self.known
            self.pool.cancel(digest)
            return False
        (self.held if acquired else self.waiting).append(digest)
        return acquired

    @rule(digest=digests)
    def queue_and_acquire(self, digest):
        self.queue(digest)
        if digest in self.waiting:
            self.acquire(self.waiting.index(digest))

    @rule(number=st.integers(0, 9))
    def abort(self, number):
        if self.waiting:
            self.pool.cancel(self.waiting.pop(number % len(self.waiting)))

    def use(self, method, digest):
        """What a method returns; False where it refuses, if that is right."""
        if digest not in self.known:
            with pytest.raises(UnknownAdapter):
                method(digest)
            return False
        try:
            return method(digest)
        except AdapterFailed:
            return False

    @rule(number=st.integers(0, 9), waits=st.booleans())
    def release(self, number, waits):
        if self.held:
            digest = self.held.pop(number % len(self.held))
            self.pool.release(digest, waits=waits)
            if waits:
                self.waiting.insert(0, digest)

    @rule(digest=digests, tier=tiers, answered=st.booleans())
    def load(self, digest, tier, answered):
        if answered:
            self.asked += 1
        self.pool.load(digest, tier, f"{self.asked}" if answered else None)

    @rule(digest=digests, tier=tiers)
    def unload(self, digest, tier):
        self.ask(self.pool.unload, digest, tier)

    @rule(pins=st.dictionaries(digests, tiers, max_size=3))
    def pin(self, pins):
        self.ask(self.pool.set_pins, pins)

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule(most=st.integers(0, 4))
    def a_step(self, most):
        """As the engine does: what waits is acquired after each poll, in turn, as long as there are slots."""
        self.poll(wait=True)
        waiting, self.waiting = self.waiting, []
        for digest in waiting:
            if not most:
                self.waiting.append(digest)
                continue
            most -= self.turn(digest)

    @rule(wait=st.booleans())
    def poll(self, wait):
        if wait:
            self.pool.wait(DEADLINE_SECONDS)
        self.take(self.pool.poll())
        for digest in DIGESTS:
            state = self.states.get(digest)
            tier = next((tier.name for tier in (self.pool.device, self.pool.host) if tier.holds(digest)), None)
            assert tier == (state.tier if state else None), "a change of tier was not reported"

    @invariant()
    def counted(self):
        self.pool.check()
        for digest in self.held:
            sites = self.pool.lookup(digest)
            assert sites[0].a.shape[1] == sites[4].parts[0].b.shape[0] == RANKS[DIGESTS.index(digest)]
        assert set(self.held) <= set(self.pool.device.adapters)
        assert len(self.answered) <= self.asked, "an answer that nobody asked for"

    @invariant()
    def weights_are_right(self):
        for digest in self.pool.device.adapters:
            a = self.pool.device.extent(digest)[:8]
            assert torch.equal(a, EXPECTED[digest][:8])

    def serve(self, beside_pins):
        """Each adapter that fits into both tiers beside the pins of others can be used, one after the other."""
        for digest in sorted(self.known):
            self.clock.now += 100
            size = SIZE // 4 * RANKS[DIGESTS.index(digest)]
            tiers = (self.pool.device, self.pool.host)
            if beside_pins and size > min(min(tier.limit(digest), tier.gap()) for tier in tiers):
                continue
            polls = 0
            while not self.pool.acquire(digest, 1):
                assert self.pool.wait(DEADLINE_SECONDS) or polls < 50, "an adapter that fits never comes"
                self.take(self.pool.poll())
                self.pool.check()
                polls += 1
            self.pool.release(digest)

    def serve_together(self):
        """Requests for all that fit, at once, each for one step: about one load brings each of them its turn."""
        self.clock.now += 100
        sizes = {digest: SIZE // 4 * RANKS[DIGESTS.index(digest)] for digest in sorted(self.known)}
        waiting = [digest for digest in sizes for _ in range(2) if sizes[digest] <= self.pool.device.capacity_bytes]
        for digest in waiting:
            self.pool.prefetch(digest)
        loads, most, idle = self.pool.device.loads, 2 * len(sizes) + 2, 0
        while waiting:
            self.take(self.pool.poll())
            running = [digest for digest in waiting if self.pool.acquire(digest)]
            for digest in running:
                waiting.remove(digest)
                self.pool.release(digest)
            self.pool.check()
            assert self.pool.device.loads - loads <= most, "they push each other out"
            idle = 0 if running or self.pool.wait(DEADLINE_SECONDS) else idle + 1
            assert idle <= 50, "nothing will ever change"

    def teardown(self):
        for digest in self.held:
            self.pool.release(digest)
        for digest in self.waiting:
            self.pool.cancel(digest)
        for digest in sorted(self.known):
            self.clock.now += 100
            self.write(digest, "right")
            self.pool.register(digest, self.path(digest))
        self.take(settled(self.pool))  # pins are decided then
        self.serve(beside_pins=True)
        self.pool.set_pins("unpin", {})
        self.serve(beside_pins=False)
        self.serve_together()
        for digest in DIGESTS:
            self.pool.retire(digest)
        self.take(settled(self.pool))
        expected = {"unpin", *(f"{number + 1}" for number in range(self.asked))}
        assert self.answered.keys() == expected, "somebody waits"
        for tier in (self.pool.device, self.pool.host):
            assert (tier.bytes_used, tier.bytes_pinned, tier.adapters) == (0, 0, [])
        self.pool.close()
        shutil.rmtree(self.directory)


def packed(digest):
    pool = AdapterPool(MODEL, 4 * SIZE, 4 * SIZE, torch.float32, "cpu")
    pool.register(digest, ADAPTERS[digest])
    pool.load(digest, "device")
    settle(pool)
    pool.close()
    return pool.device.extent(digest)


EXPECTED = {digest: packed(digest) for digest in DIGESTS}

AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
