"""Which tokens the next step computes: continuous batching with chunked prefill under a token budget."""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from runtime.adapter_unavailable import AdapterUnavailable
from runtime.block_pool import BlockPool
from runtime.sequence import FinishReason, Sequence

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


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of a sequence, computed in one step; `samples` if that reaches its end."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


class Scheduler:
    """Owns waiting and running sequences, and with them every reference to blocks and adapters.

    A sequence is admitted with blocks for all its tokens; decoding then takes a block at a time and preempts the
    youngest sequence when none is left: its blocks are freed, its tokens kept, its K/V recomputed later. A
    sequence whose adapter is not resident is passed over, so that loading never holds up a step.
    """

    def __init__(
        self,
        blocks: BlockPool,
        adapters: Adapters,
        *,
        block_size: int,
        max_running: int,
        max_waiting: int,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.blocks = blocks
        self.adapters = adapters
        self.block_size = block_size
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

    def schedule(self) -> tuple[list[Chunk], list[tuple[Sequence, Exception]]]:
        """The next step's chunks, and the sequences that can never run because their adapter failed, with the reason.

        Running sequences come first, oldest first; then as many waiting ones as budget and blocks allow.
        """
        chunks: list[Chunk] = []
        prompts = sum(sequence.missing > 1 for sequence in self.running)
        budget = self.max_batch_tokens - (len(self.running) - prompts)  # every decoding sequence has its one token
        preemptions, index = self.preemptions, 0
        while index < len(self.running) and self._grow(sequence := self.running[index]):
            index += 1
            if sequence.missing == 1:
                chunks.append(self._chunk(sequence, 1))
                continue
            prompts -= 1
            length = min(sequence.missing, self._share(budget, prompts))
            budget -= length
            if length:
                chunks.append(self._chunk(sequence, length))
        if self.preemptions > preemptions:
            return chunks, []  # whatever were admitted now would be the next to be preempted
        rejected, budget = self._admit(chunks, budget)
        self._spend(chunks, budget)
        return chunks, rejected

    def _share(self, budget: int, prompts: int) -> int:
        """What one prompt may take of the budget: half of it while others come after it, which a long one would bar.

        Those are `prompts` under way, and any that wait and may start.
        """
        followed = prompts > 0 or (self.waiting and len(self.running) < self.max_running)
        return -(-budget // 2) if followed else budget

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        return Chunk(sequence, sequence.computed, length, sequence.computed + length == len(sequence))

    def _spend(self, chunks: list[Chunk], budget: int) -> None:
        """Give what nobody was admitted for to the prompts under way, oldest first."""
        for index, (sequence, _, length, samples) in enumerate(chunks):
            if budget > 0 and not samples:
                longer = min(length + budget, sequence.missing)
                budget -= longer - length
                chunks[index] = self._chunk(sequence, longer)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens; False if that took preempting the sequence itself."""
        missing = -(-len(sequence) // self.block_size) - len(sequence.blocks)
        while (taken := self.blocks.allocate(missing)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += taken
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self, chunks: list[Chunk], budget: int) -> tuple[list[tuple[Sequence, Exception]], int]:
        """Start waiting sequences; returns those whose adapter failed, and what is left of the budget."""
        rejected: list[tuple[Sequence, Exception]] = []
        passed_over: list[Sequence] = []
        open_to: set[str] | None = None  # the adapters that may start while one has waited too long for memory
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            adapter = sequence.adapter
            if adapter is not None:
                try:
                    ready = (open_to is None or adapter in open_to) and self.adapters.acquire(adapter)
                except AdapterUnavailable as error:
                    rejected.append((sequence, error))
                    continue
                if not ready:
                    passed_over.append(sequence)
                    patient = self.clock() - sequence.enqueued_at < ADAPTER_PATIENCE_SECONDS
                    if open_to is None and not patient and self.adapters.lacks_room(adapter):
                        open_to = self._staying(adapter)
                    continue
            if not self._reserve(sequence):
                if adapter is not None:
                    self.adapters.release(adapter)
                self.waiting.appendleft(sequence)
                break
            self.running.append(sequence)
            chunks.append(self._chunk(sequence, min(sequence.missing, self._share(budget, 0))))
            budget -= chunks[-1].length
        self.waiting.extendleft(reversed(passed_over))
        return rejected, budget

    def _staying(self, adapter: str) -> set[str]:
        """The adapters in use that need not leave for one that lacks room: those that leave soonest make its room."""
        left: dict[str, int] = {}
        for sequence in self.running:
            if sequence.adapter is not None:
                left[sequence.adapter] = max(left.get(sequence.adapter, 0), sequence.max_tokens - len(sequence))
        soonest = sorted(left, key=lambda other: left[other])
        enough = range(len(soonest) + 1)
        leaving = bisect_left(enough, True, key=lambda n: not self.adapters.lacks_room(adapter, soonest[:n]))
        return set(soonest[leaving:])

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of a waiting sequence, cached ones first; False leaves everything as it was.

        At least the last token is computed again, for its logits. A block for each running sequence is left over,
        so that the newcomer is not preempted at their next step.
        """
        matched = self.blocks.match(sequence.keys_up_to(len(sequence) - 1, self.block_size))
        self.blocks.share(matched)
        missing = -(-len(sequence) // self.block_size) - len(matched)
        taken = None
        if missing + len(self.running) <= self.blocks.available:
            taken = self.blocks.allocate(missing)
        if taken is None:
            self.blocks.free(matched)
            return False
        sequence.blocks = matched + taken
        sequence.computed = len(matched) * self.block_size
        if sequence.started_at is None:
            sequence.started_at = self.clock()
            sequence.cached_tokens = sequence.computed
        return True

    def commit(self, chunk: Chunk, token_id: int | None) -> FinishReason | None:
        """Take in a computed chunk and the token sampled after it, if any; frees the sequence if that ends it."""
        sequence = chunk.sequence
        full_before = sequence.computed // self.block_size
        sequence.computed += chunk.length
        keys = sequence.keys_up_to(sequence.computed, self.block_size)
        for index in range(full_before, len(keys)):
            namespace = sequence.namespace_of(index, self.block_size)
            self.blocks.register(sequence.blocks[index], keys[index], namespace)
        if token_id is None:
            return None
        reason = sequence.append(token_id)
        if reason is not None:
            self.remove(sequence)
        return reason

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, waiting or running, and give back all it holds."""
        if sequence in self.running:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        if sequence.adapter is not None:
            self.adapters.release(sequence.adapter)

    def check(self) -> None:
        """Recount the invariants between queues, sequences and blocks."""
        self.blocks.check([sequence.blocks for sequence in self._all()])
        assert len(self.running) <= self.max_running
        assert all(not sequence.blocks and sequence.computed == 0 for sequence in self.waiting)
        for sequence in self.running:
            assert sequence.computed < len(sequence) <= sequence.max_tokens
            assert len(sequence.blocks) * self.block_size >= sequence.computed
        assert len(set(map(id, self._all()))) == len(self.running) + len(self.waiting)

    def _all(self) -> Iterable[Sequence]:
        return [*self.running, *self.waiting]
