"""Which tokens the next step computes: continuous batching with chunked prefill under a token budget."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from runtime.adapters.errors import AdapterUnavailable
from runtime.adapters.pool import AdapterPool
from runtime.fair_queue import FairQueue, in_turn
from runtime.grammar.constraint import GrammarFailed
from runtime.kv.block_manager import BlockManager
from runtime.kv.offload import Offload
from runtime.messages import Group
from runtime.request import FinishReason, Request


class Chunk(NamedTuple):
    """The part of a request that one step computes: tokens `start` to `start + length`."""

    request: Request
    start: int
    length: int
    samples: bool  # it ends at the request's last token, after which one more is sampled

    @property
    def scored(self) -> range:
        """The rows of the chunk whose logits give the log-probability of the prompt's next token."""
        request = self.request
        if not request.scores:
            return range(0)
        stop = min(self.length, request.num_prompt - 1 - self.start)
        return range(max(request.unscored - 1 - self.start, 0), stop)


KEPT_SHARE = 128  # one in so many places of the queue is for calls that have no request here yet
SCORED_ROWS = 128  # of a step: logits are large, so those of a long prompt are computed in pieces


class QueueFull(Exception):
    """The waiting queue is full."""


Rejected = list[tuple[Request, AdapterUnavailable | GrammarFailed]]


class Swap(NamedTuple):
    """A running request that gives its place to a waiting one."""

    waits: Request
    runs: Request


class Scheduler:
    """Owns all requests, and with them every reference to blocks and adapters.

    Waiting requests start in turn by tenant, adapter and call (`FairQueue`). Where all places are taken, a group that
    waits and runs nothing gets one from the group beside it that runs most.

    A request is admitted with blocks for all its tokens; decoding takes one block at a time. When no block is left,
    the youngest request is preempted: its blocks are freed, its tokens kept, and its K/V found in the prefix cache or
    computed again. A request whose adapter is not resident is skipped, so that loading never delays a step; it may
    run once without the adapter up to `invocation_start`, and then waits with its K/V in the prefix cache. A request
    whose K/V are reloaded from host memory is skipped as well, and one whose grammar is being compiled.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        adapters: AdapterPool,
        offload: Offload,
        *,
        max_running: int,
        max_waiting: int,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.block_manager = block_manager
        self.adapters = adapters
        self.offload = offload
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_batch_tokens = max_batch_tokens
        self.clock = clock
        self.requests: dict[str, Request] = {}  # by id: all that run or wait
        self.waiting = FairQueue()
        self.running: list[Request] = []  # in order of admission
        self._of_call: Counter[Group] = Counter()  # requests that run or wait
        self.preemptions = 0
        self._swap: Swap | None = None  # to be done when the next step is scheduled
        self._scorable = SCORED_ROWS  # rows that the step being scheduled may still score

    def __contains__(self, request: Request) -> bool:
        return self.requests.get(request.request_id) is request

    def add(self, request: Request) -> None:
        """Queue a request and prefetch its adapter. Raises QueueFull, and AdapterUnavailable from the prefetch."""
        free = self.max_waiting + self.max_running - len(self.requests)
        kept = min(self.max_waiting // KEPT_SHARE, self.max_running) if self._of_call[request.groups[-1]] else 0
        if free <= kept:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already: try again later")
        if request.adapter is not None:
            self.adapters.prefetch(request.adapter)
        self.requests[request.request_id] = request
        self._of_call[request.groups[-1]] += 1
        self.waiting.append(request)

    def schedule(self) -> tuple[list[Chunk], Rejected]:
        """Choose the next step's chunks: of running requests, then of waiting ones in turn.

        Also returns the requests that ended because their adapter or grammar failed, with the reason.
        """
        chunks: list[Chunk] = []
        rejected: Rejected = []
        self._scorable = SCORED_ROWS
        self._do_swap()
        preemptions = self.preemptions
        budget = self._continue_running(chunks, rejected)
        if self.preemptions == preemptions:  # else an admitted request would be the next one to be preempted
            budget, crowded = self._admit(chunks, rejected, budget)
            self._spend(chunks, budget)
            self._swap = self._find_swap() if crowded else None
        return chunks, rejected

    def _do_swap(self) -> None:
        """Let a waiting request start in this step, unless it has ended since it was chosen."""
        swap, self._swap = self._swap, None
        if swap is None or swap.waits not in self:
            return
        if swap.runs in self.running:
            self._requeue(swap.runs)
            self.preemptions += 1
        self.waiting.prefer(swap.waits)

    def _find_swap(self) -> Swap | None:
        """A waiting request of a group that runs nothing, and the youngest of a group beside it that runs several.

        Groups are beside each other as tenants, as adapters of one tenant or as calls on one adapter, in this order.
        """
        runs = Counter(group for request in self.running for group in request.groups)
        most: dict[Group, Group] = {}  # by group, that inside it which runs most
        for group, count in runs.items():
            if count > 1 and count > runs[most.get(group[:-1], ())]:
                most[group[:-1]] = group
        for parent in sorted(most, key=len):
            youngest = next(request for request in reversed(self.running) if most[parent] in request.groups)
            for group, requests in self.waiting.inside(parent):
                waits = None if runs[group] else next(filter(self._could_start, requests), None)
                if waits is not None and self._is_worth_it(waits, most[parent]):
                    return Swap(waits, youngest)
        return None

    def _could_start(self, request: Request) -> bool:
        """Whether nothing but a place is missing, as far as one can say before its K/V are looked for."""
        try:
            ready = request.constraint is None or request.constraint.ready
            return ready and (request.adapter is None or self.adapters.ready(request.adapter))
        except (AdapterUnavailable, GrammarFailed):
            return False  # it ends when its turn comes

    def _is_worth_it(self, waits: Request, group: Group) -> bool:
        """Whether a place is missing, or else blocks, of which the group holds more than the request would."""
        if len(self.running) >= self.max_running:
            return True
        held = sum(len(request.blocks) for request in self.running if group in request.groups)
        return held > len(waits) // self.block_manager.block_size + 1

    def _continue_running(self, chunks: list[Chunk], rejected: Rejected) -> int:
        """Add a chunk for each running request that can go on. Returns the tokens that are left of the budget."""
        prompts: list[Request] = []
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if request.is_whole:
                index += 1
                continue
            if request.lacks_adapter and not self._can_continue(request, rejected):
                continue
            if not self._grow(request):
                break
            index += 1
            if request.missing == 1:
                chunks.append(self._chunk(request, 1))
            else:
                prompts.append(request)
        return self._continue_prompts(chunks, prompts, self.max_batch_tokens - len(chunks))

    def _continue_prompts(self, chunks: list[Chunk], prompts: list[Request], budget: int) -> int:
        """Divide what decoding has left of the budget among running prompts; a quarter is left for waiting ones."""
        kept = budget // 4 if self.waiting and len(self.running) < self.max_running else 0
        for index, request in enumerate(in_turn(prompts)):
            share = min(self._share(budget, len(prompts) - index - 1), max(budget - kept, 0))
            length = self._scored_length(request, min(request.reach, share))
            budget -= length
            if length:
                chunks.append(self._chunk(request, length))
        return budget

    def _can_continue(self, request: Request, rejected: Rejected) -> bool:
        """Whether a request that started without its adapter can compute more, with or without it.

        If not, it is queued again, or it ends because its adapter failed.
        """
        if request.reach >= min(request.missing, self.max_batch_tokens):
            return True
        try:
            if self._acquire_adapter(request) or request.reach:
                return True
        except AdapterUnavailable as error:
            self.remove(request)
            rejected.append((request, error))
            return False
        self._requeue(request)
        return False

    def _share(self, budget: int, prompts: int) -> int:
        """Tokens of the budget for one prompt: half while other prompts follow, so that a long one lets them in.

        `prompts` that run follow it, or requests that wait and may start.
        """
        followed = prompts > 0 or (self.waiting and len(self.running) < self.max_running)
        return -(-budget // 2) if followed else budget

    def _chunk(self, request: Request, length: int) -> Chunk:
        samples = request.computed + length == len(request) and request.generates
        return Chunk(request, request.computed, length, samples)

    def _scored_length(self, request: Request, length: int) -> int:
        """As many of the next `length` tokens of a request as leave a step's scored rows within their bound."""
        if not request.scores:
            return length
        scored = self._chunk(request, length).scored
        if len(scored) > self._scorable:
            length = scored.start + self._scorable
        self._scorable -= min(len(scored), self._scorable)
        return length

    def _spend(self, chunks: list[Chunk], budget: int) -> None:
        """Give the rest of the budget to the prompts in the step, oldest first."""
        for index, (request, _, length, samples) in enumerate(chunks):
            if budget > 0 and not samples and not request.scores:
                longer = min(length + budget, request.reach)
                budget -= longer - length
                chunks[index] = self._chunk(request, longer)

    def _grow(self, request: Request) -> bool:
        """Allocate blocks for all tokens of a running request; False if the request itself had to be preempted."""
        while not self.block_manager.grow(request):
            youngest = self.running[-1]
            self._requeue(youngest)
            self.preemptions += 1
            if youngest is request:
                return False
        return True

    def _requeue(self, request: Request) -> None:
        """Move a running request to the front of the queue."""
        self._release(request, waits=True)
        self.waiting.appendleft(request)

    def _admit(self, chunks: list[Chunk], rejected: Rejected, budget: int) -> tuple[int, bool]:
        """Start waiting requests, and end those that cannot start.

        Returns the rest of the budget, and whether a request waits for a place or for blocks.
        """
        for request in self.waiting:
            if budget <= 0 or len(self.running) >= self.max_running:
                return budget, len(self.running) >= self.max_running
            try:
                if request.constraint is not None and not request.constraint.ready:
                    continue
                ready = request.adapter is None or request.holds_adapter or self.adapters.ready(request.adapter)
            except (AdapterUnavailable, GrammarFailed) as error:
                self.remove(request)
                rejected.append((request, error))
                continue
            if request.scores and not self._scorable:
                continue
            if not ready and not self._starts_early(request):
                continue
            spare = len(self.running)  # a block for each: the newcomer is not preempted when they need their next one
            if self.offload.waits_for_reload(request, spare):
                request.may_start_early |= not ready  # it may try again once its K/V are on the device
                continue
            if not self.block_manager.allocate(request, spare):
                return budget, True
            if ready:
                self._acquire_adapter(request)
            self._start(request)
            length = self._scored_length(request, min(request.reach, self._share(budget, 0)))
            chunks.append(self._chunk(request, length))
            budget -= chunks[-1].length
        return budget, False

    def _starts_early(self, request: Request) -> bool:
        """Whether a request without its adapter has tokens before `invocation_start` to compute; once for each wait.

        Their K/V must be found again when the adapter is resident, so the prefix cache has to be on.
        """
        pool = self.block_manager.pool
        if not request.may_start_early or request.invocation_start == 0 or not pool.prefix_cache:
            return False
        request.may_start_early = False
        return self.block_manager.known_tokens(self.block_manager.find(request)) < request.invocation_start

    def _start(self, request: Request) -> None:
        self.waiting.take(request)
        self.running.append(request)
        if request.started_at is None:
            request.started_at = self.clock()
            request.cached_tokens = request.computed

    def written_blocks(self, chunks: Iterable[Chunk]) -> Iterable[int]:
        """The blocks that a step of these chunks writes to, those of the copies before it included."""
        size = self.block_manager.block_size
        for request, start, length, _ in chunks:
            yield from request.blocks[start // size : -(-(start + length) // size)]
        yield from (copy.target for copy in self.block_manager.copies)

    @property
    def can_schedule_ahead(self) -> bool:
        """Whether the next step can be scheduled before the results of the launched one are known.

        It cannot if a request might be preempted or queued again: its blocks are registered only with the results.
        """
        if self._swap is not None:
            return False
        if self.block_manager.pool.available < len(self.running):
            return False
        return not any(request.lacks_adapter for request in self.running)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """A step of these chunks was launched: `commit` each of them, in order, once its result is known."""
        for request, _, length, samples in chunks:
            request.advance(length, samples=samples)

    def commit(self, chunk: Chunk, token_id: int | None) -> FinishReason | None:
        """Register what a chunk computed and append the token sampled after it. Frees the request if it ends."""
        request = chunk.request
        self.block_manager.register(request, chunk.start, chunk.start + chunk.length)
        if token_id is None:
            return self._end_of_prompt(request, chunk.start + chunk.length)
        reason = request.append(token_id)
        if reason is not None:
            self.remove(request)
        return reason

    def _end_of_prompt(self, request: Request, computed: int) -> FinishReason | None:
        """End a request that generates nothing, once its prompt is computed."""
        if computed < len(request) or request.generates or request.prefix_id is not None:
            return None
        self.remove(request)
        return "length"

    def finish_prefix(self, request: Request) -> list[int]:
        """End a request that computed a prefix. The caller owns the references to the returned blocks."""
        self.block_manager.register_tail(request)
        blocks, request.blocks, request.computed = request.blocks, [], 0
        self.remove(request)
        return blocks

    def keep_adapter(self, digest: str) -> None:
        """Reference an adapter that is to be retired for the requests that were preempted on it: they go on with it."""
        for request in self.waiting:
            if request.adapter == digest and request.started_at is not None:
                with suppress(AdapterUnavailable):
                    self._acquire_adapter(request)

    def make_private(self, namespace: str) -> None:
        """Register no more blocks that unfinished requests compute in a namespace."""
        for request in self.requests.values():
            request.chain.private |= request.chain.namespace == namespace

    def remove(self, request: Request) -> None:
        """End a request that runs or waits, and release all that it holds."""
        del self.requests[request.request_id]
        call = request.groups[-1]
        self._of_call[call] -= 1
        if not self._of_call[call]:
            del self._of_call[call]
        if request in self.running:
            self._release(request)
        else:
            self.waiting.remove(request)
            self._release_adapter(request)

    def _release(self, request: Request, *, waits: bool = False) -> None:
        self.running.remove(request)
        request.forget_pending()
        self.block_manager.free(request)
        self._release_adapter(request, waits=waits)
        request.reloaded = False

    def _acquire_adapter(self, request: Request) -> bool:
        """Reference the adapter of a request that has one; False while it is not resident."""
        if request.adapter is not None and not request.holds_adapter:
            request.holds_adapter = self.adapters.acquire(request.adapter, request.max_tokens - len(request))
        return not request.lacks_adapter

    def _release_adapter(self, request: Request, *, waits: bool = False) -> None:
        """Release a request's adapter, or give up its place in line for it; a request that `waits` keeps a place."""
        if request.adapter is not None and request.holds_adapter:
            request.holds_adapter = not self.adapters.release(request.adapter, waits=waits)
        elif request.adapter is not None and not waits:
            self.adapters.cancel(request.adapter)

    def check(self, others: Iterable[list[int]] = ()) -> None:
        """Recount queues, requests and block references; `others` are the references of other holders."""
        assert sorted(map(id, self.requests.values())) == sorted(map(id, [*self.running, *self.waiting]))
        assert all(request.request_id == request_id for request_id, request in self.requests.items())
        assert self._of_call == Counter(request.groups[-1] for request in self.requests.values())
        self.waiting.check()
        self.block_manager.check(self.requests.values(), others)
        assert len(self.running) <= self.max_running
        assert all(not s.blocks and s.computed == 0 for s in self.waiting)
        for request in self.running:
            assert request.computed <= len(request) <= request.max_tokens
            assert request.computed < len(request) or not request.generates
            assert not request.lacks_adapter or request.computed <= request.invocation_start
