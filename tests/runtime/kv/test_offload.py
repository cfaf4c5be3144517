"""Blocks between the device and host memory: a block that is found always has the K/V of its key."""

import itertools
import random
from collections import deque
from concurrent.futures import Future

import pytest

from runtime.kv.block_keys import root_key
from runtime.kv.block_manager import BlockManager
from runtime.kv.block_pool import BlockPool
from runtime.kv.offload import Offload
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from tests.runtime.kv.block_chains import B

SALTS = ("", "tenant")
EMPTY = (None,) * B


class QueuedTransfer:
    """Copies what stands for K/V when the test says so, in order; `device` and `host` are the contents."""

    slot_bytes = 10

    def __init__(self, num_blocks, num_slots):
        self.num_slots = num_slots
        self.device = [EMPTY] * num_blocks
        self.host = [EMPTY] * num_slots
        self.queue = deque()

    def offload(self, block, slot):
        self.queue.append(("offload", [(block, slot)], Future()))

    def reload(self, slots, blocks):
        self.queue.append(("reload", list(zip(blocks, slots, strict=True)), Future()))
        return self.queue[-1][2]

    def move(self):
        what, pairs, done = self.queue.popleft()
        for block, slot in pairs:
            if what == "offload":
                self.host[slot] = self.device[block]
            else:
                self.device[block] = self.host[slot]
        done.set_result(None)

    def wait_offloaded(self, blocks):
        awaited = set(blocks)
        while any(what == "offload" and pairs[0][0] in awaited for what, pairs, _ in self.queue):
            self.move()


class Moves:
    """Requests of the base, of tenants and of adapters begin, end and are dropped while blocks come and go."""

    def __init__(self, seed, blocks=None, slots=None):
        self.random = random.Random(seed)
        blocks = blocks or self.random.randint(5, 12)
        slots = slots or self.random.choice([0, 1, 3, 8, 16, 40])
        self.pool = BlockPool(blocks + 1)
        self.manager = BlockManager(self.pool, B)
        self.transfer = QueuedTransfer(blocks + 1, slots)
        self.offload = Offload(self.manager, self.transfer)
        self.running = []
        self.waiting = []
        self.known = {}  # by key, what its block must hold
        self.names = itertools.count()

    def ask(self):
        draw = self.random
        first, length = 100 * draw.randrange(2), draw.choice([8, 15, 16, 18])
        tokens = [*range(first, first + length), *draw.choices([0, 1], k=draw.randrange(2))]
        adapter = draw.choice([None, None, "a", "b"])
        invocation_start = min(draw.choice([0, 5, 8, 13, 30]), len(tokens)) if adapter else 0
        self.waiting.append(self.request(tokens, adapter, invocation_start, draw.choice(["", "", "", *SALTS])))

    def request(self, tokens, adapter=None, invocation_start=0, salt=""):
        command = Generate(
            request_id=str(next(self.names)),
            token_ids=list(tokens),
            params=SamplingParams(seed=0),
            adapter=adapter,
            invocation_start=invocation_start,
            cache_salt=salt,
        )
        return Request(command, max_tokens=100)

    def start(self):
        if self.waiting:
            self.run(self.random.choice(self.waiting))

    def run(self, request):
        """As the scheduler does, with a step that computes all of it."""
        self.offload.register_reloaded()
        spare = len(self.running)
        if self.offload.waits_for_reload(request, spare) or not self.manager.allocate(request, spare):
            return
        if request in self.waiting:
            self.waiting.remove(request)
        self.running.append(request)
        first = request.computed
        self.offload.before_writing([*request.blocks[first // B :], *(copy.target for copy in self.manager.copies)])
        for source, target in self.manager.copies:
            self.transfer.device[target] = self.transfer.device[source]
        self.manager.copied()
        for position in range(first, len(request)):
            self.write(request, position)
        request.computed = len(request)
        self.manager.register(request, first, len(request))
        self.remember(request)

    def write(self, request, position):
        block = request.blocks[position // B]
        content = list(self.transfer.device[block])
        content[position % B] = self.truth(request, position)
        self.transfer.device[block] = tuple(content)

    def truth(self, request, position):
        """What stands for the K/V of a position: all that they depend on."""
        applies = request.adapter is not None and position >= request.invocation_start
        whose = (request.adapter, request.invocation_start) if applies else None
        return request.chain.root, tuple(request.token_ids[: position + 1]), whose

    def remember(self, request):
        for index in range(-(-len(request) // B)):
            identity = request.chain.identity_of(request.token_ids, request.computed, index, B)
            held = range(index * B, index * B + len(identity.token_ids))
            self.known[identity.key] = tuple(self.truth(request, position) for position in held)
        for index, block in enumerate(request.blocks):
            for position in range(index * B, min(index * B + B, len(request))):
                assert self.transfer.device[block][position % B] == self.truth(request, position)

    def end(self):
        if self.running:
            self.manager.free(self.running.pop(self.random.randrange(len(self.running))))

    def abort(self):
        if self.waiting:
            self.waiting.pop(self.random.randrange(len(self.waiting)))

    def move(self):
        if self.transfer.queue:
            self.transfer.move()

    def drop(self):
        """A namespace and all after it: none of it may be found again before it is computed again."""
        namespace = self.random.choice([None, "a", "b"])
        self.offload.drop(namespace, self.pool.drop_namespace(namespace))
        for request in self.running:
            request.chain.private |= request.chain.namespace == namespace
        dropped = [key for key, content in self.known.items() if belongs(content, namespace)]
        for key in dropped:
            del self.known[key]

    def finish(self):
        """All ends, and nothing is left held."""
        while self.running:
            self.end()
        while self.transfer.queue:
            self.transfer.move()
        self.offload.register_reloaded()
        assert self.offload.held == []
        assert self.pool.used == 0

    def check(self):
        used, cached = self.pool.by_namespace()
        for key, content in self.known.items():
            for block in self.pool.match([key]):
                assert self.transfer.device[block][: len(content)] == content
        assert sum((used + cached).values()) == sum(bool(self.pool.match([key])) for key in self.known)
        assert set(self.offload.keys) <= self.known.keys()
        self.manager.check(self.running, self.offload.held)
        self.offload.check(tuple(map(root_key, SALTS)))
        stats = self.offload.stats()
        assert stats.bytes_used == stats.blocks * 10 <= stats.bytes_total


def belongs(content, namespace):
    """Whether a block is of a namespace, or comes after one that is."""
    whose, invocation_start = content[-1][2] or (None, B)
    return whose == namespace or (namespace is None and invocation_start >= B)


@pytest.mark.parametrize("seed", range(40))
def test_in_any_order_of_copies_and_drops_a_block_that_is_found_has_the_kv_of_its_key(seed):
    moves = Moves(seed)
    each = [*[moves.ask] * 3, *[moves.start] * 8, *[moves.end] * 3, *[moves.move] * 5, moves.abort]
    for number in range(1000):
        moves.random.choice(each)() if number % (50 if seed % 2 else 9) else moves.drop()
        moves.check()
    moves.finish()
    assert not seed % 2 or moves.transfer.num_slots < 8 or moves.offload.stats().loads > 20, (
        "hardly anything was reloaded: nothing was shown"
    )


@pytest.mark.parametrize("namespace", [None, "a"])
def test_a_block_that_is_dropped_while_it_is_reloaded_is_not_found_nor_any_after_it(namespace):
    moves = Moves(seed=0, blocks=8, slots=20)
    moves.run(moves.request(range(18), "a", invocation_start=8))
    moves.end()
    for tokens in (range(100, 118), range(200, 204)):  # of the eight blocks, three of the adapter's must go
        moves.run(moves.request(tokens))
    for _ in moves.running[:]:
        moves.end()
    assert len(moves.offload.keys) == 3
    wanting = moves.request([*range(12), 77], "a", invocation_start=8)
    assert moves.offload.waits_for_reload(wanting, spare=0)
    assert len(moves.offload.held[0]) == 3, "the base's two blocks, and the one that comes"
    assert moves.offload.by_namespace()["a"] == 2, "what comes after it is still there"
    moves.offload.drop(namespace, moves.pool.drop_namespace(namespace))
    assert not moves.offload.by_namespace()["a"]
    moves.finish()
    used, cached = moves.pool.by_namespace()
    assert not (used + cached)["a"]
    assert moves.offload.by_namespace()["a"] == 0
