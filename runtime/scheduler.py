"""Which tokens the next step computes: continuous batching with chunked prefill under a token budget."""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from runtime.adapters.unavailable import AdapterUnavailable
from runtime.chunk import Chunk
from runtime.kv.block_tables import BlockTables
from runtime.request import FinishReason, Sequence

# How long a sequence may be passed over for want of adapter memory before later ones have to wait for it.
ADAPTER_PATIENCE_SECONDS = 1.0


class QueueFull(Exception):
    """The waiting queue is at its bound."""


class Adapters(Protocol):
    """What the scheduler asks of the adapter pool."""

    def prefetch(self, digest: str) -> None: ...
    def acquire(self, digest: str) -> bool: ...
    def release(self, digest: str) -> None: ...
    def lacks_room(self, digest: str, leaving: Collection[str] = ()) -> bool: ...


class EvictedKv(Protocol):
    """What the scheduler asks of the K/V in host memory."""

    def awaits(self, sequence: Sequence, spare: int) -> bool: ...


Rejected = list[tuple[Sequence, Exception]]


class Scheduler:
    """Owns waiting and running sequences, and with them every reference to blocks and adapters.

    A sequence is admitted with blocks for all its tokens; decoding then takes a block at a time and preempts the
    youngest sequence when none is left: its blocks are freed, its tokens kept, its K/V found again or recomputed. A
    sequence whose adapter is not resident is passed over, so that loading never holds up a step. Up to its activation
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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and start loading its adapter. Raises QueueFull, and what `prefetch` raises."""
        if len(self.waiting) + len(self.running) >= self.max_waiting + self.max_running:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already: try again later")
        if sequence.adapter is not None:
            self.adapters.prefetch(sequence.adapter)
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Chunk], Rejected]:
        """The next step's chunks, and the sequences that can never run because their adapter failed, with the reason.

        Running sequences come first, oldest first; then as many waiting ones as budget and blocks allow.
        """
        chunks: list[Chunk] = []
        rejected: Rejected = []
        prompts = sum(sequence.missing > 1 for sequence in self.running)
        budget = self.max_batch_tokens - (len(self.running) - prompts)  # every decoding sequence has its one token
        preemptions, index = self.preemptions, 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.is_whole:
                index += 1
                continue
            missing = sequence.missing
            prompts -= missing > 1
            if sequence.lacks_adapter and not self._may_go_on(sequence, rejected):
                continue
            if not self._grow(sequence):
                break
            index += 1
            if missing == 1:
                chunks.append(self._chunk(sequence, 1))
                continue
            length = min(sequence.reach, self._share(budget, prompts))
            budget -= length
            if length:
                chunks.append(self._chunk(sequence, length))
        if self.preemptions > preemptions:
            return chunks, rejected  # whatever were admitted now would be the next to be preempted
        budget = self._admit(chunks, rejected, budget)
        self._spend(chunks, budget)
        return chunks, rejected

    def _may_go_on(self, sequence: Sequence, rejected: Rejected) -> bool:
        """Whether a sequence that started early can compute something, without its adapter or with it from here on.

        Otherwise it waits again, or is rejected because its adapter has failed.
        """
        if sequence.reach >= min(sequence.missing, self.max_batch_tokens):
            return True
        try:
            if self._acquire(sequence) or sequence.reach:
                return True
        except AdapterUnavailable as error:
            self.remove(sequence)
            rejected.append((sequence, error))
            return False
        self._withdraw(sequence)
        return False

    def _acquire(self, sequence: Sequence) -> bool:
        """Reference a sequence's adapter, if it has one; False while that is not resident."""
        if sequence.adapter is not None and not sequence.holds_adapter:
            sequence.holds_adapter = self.adapters.acquire(sequence.adapter)
        return not sequence.lacks_adapter

    def _share(self, budget: int, prompts: int) -> int:
        """What one prompt may take of the budget: half of it while others come after it, which a long one would bar.

        Those are `prompts` under way, and any that wait and may start.
        """
        followed = prompts > 0 or (self.waiting and len(self.running) < self.max_running)
        return -(-budget // 2) if followed else budget

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        samples = sequence.computed + length == len(sequence) and sequence.prefix_id is None
        return Chunk(sequence, sequence.computed, length, samples)

    def _spend(self, chunks: list[Chunk], budget: int) -> None:
        """Give what nobody was admitted for to the prompts under way, oldest first."""
        for index, (sequence, _, length, samples) in enumerate(chunks):
            if budget > 0 and not samples:
                longer = min(length + budget, sequence.reach)
                budget -= longer - length
                chunks[index] = self._chunk(sequence, longer)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens; False if that took preempting the sequence itself."""
        while not self.tables.grow(sequence):
            youngest = self.running[-1]
            self._withdraw(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _withdraw(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, as the first of all."""
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self, chunks: list[Chunk], rejected: Rejected, budget: int) -> int:
        """Start waiting sequences, and reject those whose adapter failed; returns what is left of the budget."""
        passed_over: list[Sequence] = []
        open_to: set[str] | None = None  # the adapters that may start while one has waited too long for memory
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            adapter = sequence.adapter
            try:
                ready = adapter is None or ((open_to is None or adapter in open_to) and self._acquire(sequence))
            except AdapterUnavailable as error:
                rejected.append((sequence, error))
                continue
            if adapter is not None and not ready and not self._starts_early(sequence):
                passed_over.append(sequence)
                patient = self.clock() - sequence.enqueued_at < ADAPTER_PATIENCE_SECONDS
                if open_to is None and not patient and self.adapters.lacks_room(adapter):
                    open_to = self._staying(adapter)
                continue
            spare = len(self.running)  # blocks: the newcomer is not to be preempted when these need their next ones
            if self.evicted.awaits(sequence, spare):
                sequence.may_start_early |= sequence.lacks_adapter  # it is asked again when its K/V are there
                self._release_adapter(sequence)
                passed_over.append(sequence)
                continue
            if not self.tables.take(sequence, spare):
                self._release_adapter(sequence)
                self.waiting.appendleft(sequence)
                break
            self._start(sequence)
            chunks.append(self._chunk(sequence, min(sequence.reach, self._share(budget, 0))))
            budget -= chunks[-1].length
        self.waiting.extendleft(reversed(passed_over))
        return budget

    def _staying(self, adapter: str) -> set[str]:
        """The adapters in use that need not leave for one that lacks room: those that leave soonest make its room."""
        left: dict[str, int] = {}
        for sequence in self.running:
            if sequence.adapter is not None and sequence.holds_adapter:
                left[sequence.adapter] = max(left.get(sequence.adapter, 0), sequence.max_tokens - len(sequence))
        soonest = sorted(left, key=lambda other: left[other])
        enough = range(len(soonest) + 1)
        leaving = bisect_left(enough, True, key=lambda n: not self.adapters.lacks_room(adapter, soonest[:n]))
        return set(soonest[leaving:])

    def _starts_early(self, sequence: Sequence) -> bool:
        """Whether a sequence without its adapter has tokens before its activation to compute; asked for once.

        What it computes has to be found again when the adapter is there.
        """
        if not sequence.may_start_early or sequence.activation == 0 or not self.blocks.prefix_cache:
            return False
        sequence.may_start_early = False
        return self.tables.known_tokens(self.tables.find(sequence)) < sequence.activation

    def _start(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        if sequence.started_at is None:
            sequence.started_at = self.clock()
            sequence.cached_tokens = sequence.computed

    def written_blocks(self, chunks: Iterable[Chunk]) -> Iterable[int]:
        """The blocks that chunks, and the copies before them, write to."""
        size = self.tables.block_size
        for sequence, start, length, _ in chunks:
            yield from sequence.blocks[start // size : -(-(start + length) // size)]
        yield from (copy.target for copy in self.tables.copies)

    @property
    def may_go_ahead(self) -> bool:
        """Whether the next step can be scheduled while nobody knows the results of the one under way.

        Not if somebody might have to be set back or sent to wait, whose blocks are not known as what they are yet.
        """
        if self.blocks.available < len(self.running):
            return False
        return not any(sequence.needs_tokens or sequence.lacks_adapter for sequence in self.running)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """A step of these chunks is under way: `commit` each of them, in order, when its result is known."""
        for sequence, _, length, samples in chunks:
            sequence.advance(length, samples=samples)

    def commit(self, chunk: Chunk, token_id: int | None) -> FinishReason | None:
        """Take in a computed chunk and the token sampled after it, if any; frees the sequence if that ends it."""
        sequence = chunk.sequence
        self.tables.register(sequence, chunk.start, chunk.start + chunk.length)
        if token_id is None:
            return None
        reason = sequence.append(token_id)
        if reason is not None:
            self.remove(sequence)
        return reason

    def finish_prefix(self, sequence: Sequence) -> list[int]:
        """End a sequence that was computed to be held; its references to its blocks are the caller's from now on."""
        self.tables.register_tail(sequence)
        blocks, sequence.blocks, sequence.computed = sequence.blocks, [], 0
        self.remove(sequence)
        return blocks

    def keep_apart(self, adapter: str) -> None:
        """Let nobody find K/V of an adapter that its running sequences compute from now on."""
        for sequence in self._all():
            sequence.keeps_kv_to_itself |= sequence.kv_adapter == adapter

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, waiting or running, and give back all it holds."""
        if sequence in self.running:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.forget_pending()
        self.tables.give_back(sequence)
        self._release_adapter(sequence)
        sequence.recalled = False

    def _release_adapter(self, sequence: Sequence) -> None:
        if sequence.adapter is not None and sequence.holds_adapter:
            self.adapters.release(sequence.adapter)
            sequence.holds_adapter = False

    def check(self, others: Iterable[list[int]] = ()) -> None:
        """Recount the invariants between queues, sequences and blocks, of which `others` hold some too."""
        self.tables.check(self._all(), others)
        assert len(self.running) <= self.max_running
        assert all(not s.blocks and s.computed == 0 and not s.holds_adapter for s in self.waiting)
        for sequence in self.running:
            assert sequence.computed <= len(sequence) <= sequence.max_tokens
            assert sequence.computed < len(sequence) or sequence.prefix_id is not None
            assert not sequence.lacks_adapter or sequence.computed <= sequence.activation
        assert len(set(map(id, self._all()))) == len(self.running) + len(self.waiting)

    def _all(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]
