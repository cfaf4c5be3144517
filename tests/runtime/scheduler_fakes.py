"""A scheduler with fakes of the pools that it uses, and requests for it."""

import itertools
from collections import Counter

from runtime.adapters.errors import AdapterUnavailable
from runtime.kv.block_manager import BlockManager
from runtime.kv.block_pool import BlockPool
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.scheduler import Scheduler

B = 4


class FakeAdapters:
    """A pool whose adapters are resident, loading or broken as the test says."""

    def __init__(self):
        self.resident = {"a", "b"}
        self.broken = set()
        self.references = Counter()
        self.waiting = Counter()  # requests that have not acquired their adapter
        self.prefetched = []

    def prefetch(self, digest):
        self.prefetched.append(digest)
        self.waiting[digest] += 1

    def cancel(self, digest):
        self.waiting[digest] -= 1
        assert self.waiting[digest] >= 0

    def ready(self, digest):
        if digest in self.broken:
            raise AdapterUnavailable(f"adapter {digest} is broken")
        return digest in self.resident

    def acquire(self, digest, steps=0):
        assert steps >= 0
        if not self.ready(digest):
            return False
        self.cancel(digest)
        self.references[digest] += 1
        return True

    def release(self, digest, *, waits=False):
        self.references[digest] -= 1
        assert self.references[digest] >= 0
        self.waiting[digest] += waits
        return True


class FakeOffload:
    """Offloading under which some requests wait for a reload."""

    def __init__(self):
        self.reloading = set()

    def waits_for_reload(self, request, spare):
        return request in self.reloading


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def scheduler(blocks=64, running=8, waiting=8, budget=16, adapters=None, offload=None, clock=None):
    return Scheduler(
        BlockManager(BlockPool(blocks + 1), B),
        adapters or FakeAdapters(),
        offload or FakeOffload(),
        max_running=running,
        max_waiting=waiting,
        max_batch_tokens=budget,
        clock=clock or Clock(),
    )


names = itertools.count()


def request(tokens, max_tokens=8, adapter=None, limit=64, invocation_start=0, first=0, call="", salt="", **params):
    token_ids = list(range(first, first + tokens)) if isinstance(tokens, int) else tokens
    command = Generate(
        request_id=f"r{next(names)}",
        token_ids=token_ids,
        params=SamplingParams(max_tokens=max_tokens, seed=0, **params),
        adapter=adapter,
        invocation_start=invocation_start,
        cache_salt=salt,
        call=call,
    )
    made = Request(command, max_tokens=limit)
    made.enqueued_at = 0.0
    return made


def step(s, token=7):
    """One step in which every sampling request gets `token`; returns {request: (start, count)}."""
    chunks, rejected = s.schedule()
    assert not rejected
    s.check()
    s.block_manager.copied()
    s.advance(chunks)
    for chunk in chunks:
        s.commit(chunk, token if chunk.samples else None)
    s.check()
    return {chunk.request: (chunk.start, chunk.length) for chunk in chunks}
