"""One replica: an engine that computes steps, with its queue, its adapters and its K/V."""

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loadtests.simulate.costs import Costs, StepCosts
from loadtests.simulate.memory import AdapterMemory, Load
from loadtests.simulate.prefixes import KvMemory, rounded
from loadtests.simulate.traffic import BASE, Request

WINDOW_SECONDS = 30.0  # of the past, in which first tokens are counted
STEPS_OF_LATE = 8  # by which the wait of a load for a step is estimated
LONGEST_PLAN = 16  # steps that are computed as one event, while nothing starts or ends


class Plan(NamedTuple):
    """Equal steps that go on now."""

    begins: float
    seconds: float  # of one step
    steps: int
    chunks: Sequence[tuple[Request, int]]  # prompts and their tokens; then it is one step

    @property
    def ends(self) -> float:
        return self.begins + self.seconds * self.steps


class Replica:
    """Follows `runtime.scheduler`: every decoding request has a token in each step, prompts share what is left.

    Waiting requests start by round robin over their adapters; one whose adapter is not on the device is skipped. Not as
    there: tenants, preemption, swaps between groups, and the half of a long prompt that waits for its adapter (aLoRA).
    """

    def __init__(self, number: int, costs: Costs, sizes: Sequence[float], on_disk: Iterable[int] = ()) -> None:
        self.number, self.costs, self.limits = number, costs, costs.limits
        self.neighbours: list[Replica] = []  # on the same machine
        self.memory = AdapterMemory(costs, sizes, on_disk)
        self.kv = KvMemory(int(self.limits.kv_bytes / costs.kv_bytes_per_token))
        self.plan: Plan | None = None
        self.steps = 0
        self.busy_seconds = 0.0
        self.computed_tokens = 0  # of prompts
        self.waiting: OrderedDict[int, deque[Request]] = OrderedDict()  # by adapter, in turn
        self.num_waiting = 0
        self.coming = 0  # requests that were sent here and are not in the queue yet
        self._ready: OrderedDict[int, None] = OrderedDict()  # those of `waiting` whose adapter is on the device
        self._prompts: list[Request] = []  # they run, and their prompt is not computed
        self._decoding: list[tuple[int, int, Request]] = []  # a heap by the step of the last token
        self._adapters: Counter[int] = Counter()  # of running requests
        self._adapter_rows = 0  # decoding requests with an adapter
        self._attended = 0  # tokens of all decoding requests
        self._places = 0
        self._first_tokens: deque[float] = deque(maxlen=4096)  # when requests had their first tokens, of late
        self._steps_of_late: deque[float] = deque(maxlen=STEPS_OF_LATE)  # seconds of each
        self._waits_since = 0.0  # when the first of those that wait came to an empty queue
        self._tables = {
            id(each): each.table(self.limits.max_batch_tokens) for each in (costs.steps, costs.beside) if each
        }

    @property
    def running(self) -> int:
        return len(self._prompts) + len(self._decoding)

    @property
    def load(self) -> int:
        """Requests that run, wait or are on their way."""
        return self.running + self.num_waiting + self.coming

    def queue_seconds(self, now: float) -> float:
        """How long a new request of the base would wait for its turn, by `service.engine.backlog`."""
        if self.load < self.limits.max_running:
            return 0.0
        queued = self.load - self.limits.max_running
        since = max(self._waits_since, now - WINDOW_SECONDS) if self.num_waiting else now
        while self._first_tokens and self._first_tokens[0] < since:
            self._first_tokens.popleft()
        own = 1 + len(self.waiting.get(BASE, ()))
        place = own + sum(min(len(queue), own) for adapter, queue in self.waiting.items() if adapter != BASE)
        return min(place, queued + 1) * (now - since) / (len(self._first_tokens) + 1)

    def accepts(self, request: Request) -> bool:
        """Whether the queue has a place, and the K/V memory could ever hold the request."""
        return self.num_waiting < self.limits.max_waiting and rounded(request.tokens) <= self.kv.capacity

    def expect(self, request: Request) -> None:
        """Ask for a request's adapter, and give it a place in line; `add` it once its K/V are there."""
        self._places += 1
        request.place = self._places
        if request.adapter != BASE:
            self.memory.ask(request.adapter, request.place)

    def add(self, request: Request, now: float) -> None:
        adapter = request.adapter
        if not self.num_waiting:
            self._waits_since = now
        self.waiting.setdefault(adapter, deque()).append(request)
        self.num_waiting += 1
        if adapter == BASE or self.memory.has(adapter):
            self._ready[adapter] = None
        else:
            self.memory.ask_again(adapter, request.place)

    # Loads

    def start_loads(self) -> list[tuple[float, Load]]:
        """Start the stages of loads for which there is room; returns how many seconds each takes."""
        if self.memory.quiet:
            return []
        first_places = {adapter: requests[0].place for adapter, requests in self.waiting.items()}
        started = self.memory.advance(first_places, self._wait_for_step())
        for start in started:
            for victim in start.victims:
                if victim in self.waiting:
                    del self._ready[victim]
                    self.memory.ask_again(victim, first_places[victim])
        return [(start.seconds, start.load) for start in started]

    def _wait_for_step(self) -> float:
        """How long a load waits each time that it gives way to a step: for the step, or until it loses patience."""
        if self.plan is None:
            return 0.0
        steps = [*self._steps_of_late, self.plan.seconds]
        return sum(steps) / sum(max(1.0, seconds / self.costs.waits.longest_seconds) for seconds in steps)

    def finish_load(self, load: Load) -> None:
        if self.memory.finish(load) and load.adapter in self.waiting:
            self._ready[load.adapter] = None

    # Steps

    def interrupt(self, now: float) -> float | None:
        """End the plan with the step that goes on, because something has come; returns when, None if it is idle."""
        plan = self.plan
        if plan is None:
            return None
        if plan.steps > 1:
            steps = min(plan.steps, max(1, math.ceil((now - plan.begins) / plan.seconds - 1e-9)))
            plan = self.plan = plan._replace(steps=steps)
        return plan.ends

    def commit(self, now: float) -> list[Request]:
        """Take in the steps that end now; returns the requests that have ended."""
        plan, self.plan = self.plan, None
        if plan is None:
            return []
        self.busy_seconds += plan.seconds * plan.steps
        self.steps += plan.steps
        self._steps_of_late.extend([plan.seconds] * min(plan.steps, STEPS_OF_LATE))
        self._attended += plan.steps * len(self._decoding)
        ended = []
        while self._decoding and self._decoding[0][0] <= self.steps:
            request = heapq.heappop(self._decoding)[2]
            self._attended -= request.tokens - 1
            self._adapter_rows -= request.adapter != BASE
            ended.append(request)
        for request, tokens in plan.chunks:
            request.computed += tokens
            self.computed_tokens += tokens
            if request.computed == request.prompt:
                self._prompts.remove(request)
                request.first = now
                self._first_tokens.append(now)
                if request.answer == 1:
                    ended.append(request)
                    continue
                self._adapter_rows += request.adapter != BASE
                self._attended += request.prompt
                heapq.heappush(self._decoding, (self.steps + request.answer - 1, request.place, request))
        for request in ended:
            self._end(request, now)
        return ended

    def _end(self, request: Request, now: float) -> None:
        request.ended = now
        self.kv.give_back(request.conversation.number, request.tokens)
        if request.adapter != BASE:
            self.memory.release(request.adapter)
        self._adapters[request.adapter] -= 1
        if not self._adapters[request.adapter]:
            del self._adapters[request.adapter]

    def plan_next(self, now: float) -> None:
        """Begin the next steps, if a request can run."""
        chunks, budget = self._continue_prompts(self.limits.max_batch_tokens - len(self._decoding))
        budget = self._admit(chunks, budget)
        for index, (request, tokens) in enumerate(chunks):
            more = min(budget, request.prompt - request.computed - tokens)
            chunks[index] = request, tokens + more
            budget -= more
        if not self._decoding and not chunks:
            return
        steps = 1 if chunks else min(LONGEST_PLAN, self._decoding[0][0] - self.steps)
        self.plan = Plan(now, self._seconds(chunks, steps), steps, chunks)

    def _continue_prompts(self, budget: int) -> tuple[list[tuple[Request, int]], int]:
        """Divide what decoding leaves of a step's tokens among running prompts; a quarter is left for waiting ones."""
        chunks = []
        others = self.num_waiting > 0 and self.running < self.limits.max_running
        kept = budget // 4 if others else 0
        for index, request in enumerate(self._prompts):
            followed = others or index < len(self._prompts) - 1
            share = min(-(-budget // 2) if followed else budget, max(budget - kept, 0))
            tokens = min(request.prompt - request.computed, share)
            if tokens:
                chunks.append((request, tokens))
                budget -= tokens
        return chunks, budget

    def _admit(self, chunks: list[tuple[Request, int]], budget: int) -> int:
        while budget > 0 and self._ready and self.running < self.limits.max_running:
            adapter = next(iter(self._ready))
            request = self.waiting[adapter][0]
            if not self.kv.fits(request.tokens):
                break
            self._start(request)
            followed = self.num_waiting > 0 and self.running < self.limits.max_running
            tokens = min(request.prompt - request.computed, -(-budget // 2) if followed else budget)
            chunks.append((request, tokens))
            budget -= tokens
        return budget

    def _start(self, request: Request) -> None:
        adapter = request.adapter
        queue = self.waiting[adapter]
        queue.popleft()
        self.num_waiting -= 1
        if queue:  # it was its adapter's turn
            self.waiting.move_to_end(adapter)
            self._ready.move_to_end(adapter)
        else:
            del self.waiting[adapter], self._ready[adapter]
        known = max(self.kv.known(request.conversation.number, request.prompt), request.cached)
        request.cached = request.computed = known
        self.kv.take(request.conversation.number, request.tokens)
        if adapter != BASE:
            self.memory.acquire(adapter)
            self.memory.waits_no_more()
        self._adapters[adapter] += 1
        self._prompts.append(request)

    def _seconds(self, chunks: Sequence[tuple[Request, int]], steps: int) -> float:
        """The seconds of each of so many steps, in the mean."""
        busy = any(neighbour.plan is not None for neighbour in self.neighbours)
        costs: StepCosts = self.costs.beside if busy and self.costs.beside is not None else self.costs.steps
        decoding = len(self._decoding)
        attended = self._attended + decoding * (steps - 1) / 2
        rows, with_adapter, prompts_attended = decoding, self._adapter_rows, 0.0
        for request, tokens in chunks:
            rows += tokens
            with_adapter += tokens if request.adapter != BASE else 0
            prompts_attended += tokens * (request.computed + tokens / 2)
        distinct = len(self._adapters) - (BASE in self._adapters)
        return (
            self._tables[id(costs)][rows]
            + decoding * costs.decoding_row_seconds
            + with_adapter * costs.adapter_row_seconds
            + distinct * costs.adapter_seconds
            + attended * costs.attended_seconds
            + prompts_attended * costs.prompt_attended_seconds
        )

    def check(self) -> None:
        """Recount what the replica owns."""
        self.memory.check()
        self.kv.check()
        running = [*self._prompts, *(request for _, _, request in self._decoding)]
        assert self.num_waiting == sum(map(len, self.waiting.values()))
        assert self._adapters == Counter(request.adapter for request in running)
        with_adapter = Counter(request.adapter for request in running if request.adapter != BASE)
        assert with_adapter == self.memory.references
        assert set(self._ready) == {each for each in self.waiting if each == BASE or self.memory.has(each)}
        assert self._adapter_rows == sum(request.adapter != BASE for _, _, request in self._decoding)
        generated = [request.answer - (done - self.steps) for done, _, request in self._decoding]
        decoding = [request for _, _, request in self._decoding]
        context = sum(r.prompt + tokens - 1 for r, tokens in zip(decoding, generated, strict=True))
        assert self._attended == context
