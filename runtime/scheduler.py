"""Which tokens the next step computes: continuous batching with chunked prefill under a token budget."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from runtime.adapters.errors import AdapterUnavailable
from runtime.chunk import Chunk
from runtime.kv.block_tables import BlockTables
from runtime.request import FinishReason, Request


class QueueFull(Exception):
    """The waiting queue is at its bound."""


class Adapters(Protocol):
    """What the scheduler asks of the adapter pool, which also decides who waits for adapter memory."""

    def prefetch(self, digest: str) -> None: ...
    def cancel(self, digest: str) -> None: ...
    def ready(self, digest: str) -> bool: ...
    def acquire(self, digest: str, steps: int = 0) -> bool: ...
    def release(self, digest: str, *, waits: bool = False) -> None: ...


class EvictedKv(Protocol):
    """What the scheduler asks of the K/V in host memory."""

    def awaits(self, request: Request, spare: int) -> bool: ...


Rejected = list[tuple[Request, Exception]]


class Scheduler:
    """Owns waiting and running requests, and with them every reference to blocks and adapters.

    A request is admitted with blocks for all its tokens; decoding then takes a block at a time and preempts the
    youngest request when none is left: its blocks are freed, its tokens kept, its K/V found again or recomputed. A
    request whose adapter is not resident is passed over, so that loading never holds up a step. Up to its invocation
    it needs none: so far it may run meanwhile, once, and waits again there with its K/V in the prefix cache. One whose
    K/V come back from host memory is passed over as well.
    """

    def __init__(
        self,
        tables: BlockTables,
        adapters: Adapters,
        evicted: EvictedKv,
        *,
        max_running: int,
        max_waiting: int,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.tables = tables
        self.blocks = tables.pool
        self.adapters = adapters
        self.evicted = evicted
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_batch_tokens = max_batch_tokens
        self.clock = clock
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request and start loading its adapter. Raises QueueFull, and what `prefetch` raises."""
        if len(self.waiting) + len(self.running) >= self.max_waiting + self.max_running:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already: try again later")
        if request.adapter is not None:
            self.adapters.prefetch(request.adapter)
        self.waiting.append(request)

    def schedule(self) -> tuple[list[Chunk], Rejected]:
        """The next step's chunks, and the requests that can never run because their adapter failed, with the reason.

        Running requests come first, oldest first; then as many waiting ones as budget and blocks allow.
        """
        chunks: list[Chunk] = []
        rejected: Rejected = []
        prompts = sum(request.missing > 1 for request in self.running)
        budget = self.max_batch_tokens - (len(self.running) - prompts)  # every decoding request has its one token
        preemptions, index = self.preemptions, 0
        while index < len(self.running):
            request = self.running[index]
            if request.is_whole:
                index += 1
                continue
            missing = request.missing
            prompts -= missing > 1
            if request.lacks_adapter and not self._may_go_on(request, rejected):
                continue
            if not self._grow(request):
                break
            index += 1
            if missing == 1:
                chunks.append(self._chunk(request, 1))
                continue
            length = min(request.reach, self._share(budget, prompts))
            budget -= length
            if length:
                chunks.append(self._chunk(request, length))
        if self.preemptions > preemptions:
            return chunks, rejected  # whatever were admitted now would be the next to be preempted
        budget = self._admit(chunks, rejected, budget)
        self._spend(chunks, budget)
        return chunks, rejected

    def _may_go_on(self, request: Request, rejected: Rejected) -> bool:
        """Whether a request that started early can compute something, without its adapter or with it from here on.

        Otherwise it waits again, or is rejected because its adapter has failed.
        """
        if request.reach >= min(request.missing, self.max_batch_tokens):
            return True
        try:
            if self._acquire(request) or request.reach:
                return True
        except AdapterUnavailable as error:
            self.remove(request)
            rejected.append((request, error))
            return False
        self._withdraw(request)
        return False

    def _acquire(self, request: Request) -> bool:
        """Reference a request's adapter, if it has one; False while that is not resident."""
        if request.adapter is not None and not request.holds_adapter:
            request.holds_adapter = self.adapters.acquire(request.adapter, request.max_tokens - len(request))
        return not request.lacks_adapter

    def _share(self, budget: int, prompts: int) -> int:
        """What one prompt may take of the budget: half of it while others come after it, which a long one would bar.

        Those are `prompts` under way, and any that wait and may start.
        """
        followed = prompts > 0 or (self.waiting and len(self.running) < self.max_running)
        return -(-budget // 2) if followed else budget

    def _chunk(self, request: Request, length: int) -> Chunk:
        samples = request.computed + length == len(request) and request.prefix_id is None
        return Chunk(request, request.computed, length, samples)

    def _spend(self, chunks: list[Chunk], budget: int) -> None:
        """Give what nobody was admitted for to the prompts under way, oldest first."""
        for index, (request, _, length, samples) in enumerate(chunks):
            if budget > 0 and not samples:
                longer = min(length + budget, request.reach)
                budget -= longer - length
                chunks[index] = self._chunk(request, longer)

    def _grow(self, request: Request) -> bool:
        """Give a running request blocks for all its tokens; False if that took preempting the request itself."""
        while not self.tables.grow(request):
            youngest = self.running[-1]
            self._withdraw(youngest)
            self.preemptions += 1
            if youngest is request:
                return False
        return True

    def _withdraw(self, request: Request) -> None:
        """Let a running request wait again, as the first of all."""
        self._release(request, waits=True)
        self.waiting.appendleft(request)

    def _admit(self, chunks: list[Chunk], rejected: Rejected, budget: int) -> int:
        """Start waiting requests, and reject those whose adapter failed; returns what is left of the budget."""
        passed_over: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            request = self.waiting.popleft()
            try:
                ready = request.adapter is None or self.adapters.ready(request.adapter)
            except AdapterUnavailable as error:
                self._release_adapter(request)
                rejected.append((request, error))
                continue
            if not ready and not self._starts_early(request):
                passed_over.append(request)
                continue
            spare = len(self.running)  # blocks: the newcomer is not to be preempted when these need their next ones
            if self.evicted.awaits(request, spare):
                request.may_start_early |= not ready  # it is asked again when its K/V are there
                passed_over.append(request)
                continue
            if not self.tables.take(request, spare):
                self.waiting.appendleft(request)
                break
            if ready:
                self._acquire(request)
            self._start(request)
            chunks.append(self._chunk(request, min(request.reach, self._share(budget, 0))))
            budget -= chunks[-1].length
        self.waiting.extendleft(reversed(passed_over))
        return budget

    def _starts_early(self, request: Request) -> bool:
        """Whether a request without its adapter has tokens before its invocation to compute; asked for once.

        What it computes has to be found again when the adapter is there.
        """
        if not request.may_start_early or request.invocation_start == 0 or not self.blocks.prefix_cache:
            return False
        request.may_start_early = False
        return self.tables.known_tokens(self.tables.find(request)) < request.invocation_start

    def _start(self, request: Request) -> None:
        self.running.append(request)
        if request.started_at is None:
            request.started_at = self.clock()
            request.cached_tokens = request.computed

    def written_blocks(self, chunks: Iterable[Chunk]) -> Iterable[int]:
        """The blocks that chunks, and the copies before them, write to."""
        size = self.tables.block_size
        for request, start, length, _ in chunks:
            yield from request.blocks[start // size : -(-(start + length) // size)]
        yield from (copy.target for copy in self.tables.copies)

    @property
    def may_go_ahead(self) -> bool:
        """Whether the next step can be scheduled while nobody knows the results of the one under way.

        Not if somebody might have to be set back or sent to wait, whose blocks are not known as what they are yet.
        """
        if self.blocks.available < len(self.running):
            return False
        return not any(request.needs_tokens or request.lacks_adapter for request in self.running)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """A step of these chunks is under way: `commit` each of them, in order, when its result is known."""
        for request, _, length, samples in chunks:
            request.advance(length, samples=samples)

    def commit(self, chunk: Chunk, token_id: int | None) -> FinishReason | None:
        """Take in a computed chunk and the token sampled after it, if any; frees the request if that ends it."""
        request = chunk.request
        self.tables.register(request, chunk.start, chunk.start + chunk.length)
        if token_id is None:
            return None
        reason = request.append(token_id)
        if reason is not None:
            self.remove(request)
        return reason

    def finish_prefix(self, request: Request) -> list[int]:
        """End a request that was computed to be held; its references to its blocks are the caller's from now on."""
        self.tables.register_tail(request)
        blocks, request.blocks, request.computed = request.blocks, [], 0
        self.remove(request)
        return blocks

    def keep_apart(self, adapter: str) -> None:
        """Let nobody find K/V of an adapter that its running requests compute from now on."""
        for request in self._all():
            request.kv_is_private |= request.kv_namespace == adapter

    def remove(self, request: Request) -> None:
        """End a request, waiting or running, and give back all it holds."""
        if request in self.running:
            self._release(request)
        else:
            self.waiting.remove(request)
            self._release_adapter(request)

    def _release(self, request: Request, *, waits: bool = False) -> None:
        self.running.remove(request)
        request.forget_pending()
        self.tables.give_back(request)
        self._release_adapter(request, waits=waits)
        request.recalled = False

    def _release_adapter(self, request: Request, *, waits: bool = False) -> None:
        """Give back a request's adapter, or its place in line for it; a request that `waits` keeps a place."""
        if request.adapter is not None and request.holds_adapter:
            self.adapters.release(request.adapter, waits=waits)
            request.holds_adapter = False
        elif request.adapter is not None and not waits:
            self.adapters.cancel(request.adapter)

    def check(self, others: Iterable[list[int]] = ()) -> None:
        """Recount the invariants between queues, requests and blocks, of which `others` hold some too."""
        self.tables.check(self._all(), others)
        assert len(self.running) <= self.max_running
        assert all(not s.blocks and s.computed == 0 and not s.holds_adapter for s in self.waiting)
        for request in self.running:
            assert request.computed <= len(request) <= request.max_tokens
            assert request.computed < len(request) or request.prefix_id is not None
            assert not request.lacks_adapter or request.computed <= request.invocation_start
        assert len(set(map(id, self._all()))) == len(self.running) + len(self.waiting)

    def _all(self) -> Iterable[Request]:
        return [*self.running, *self.waiting]
