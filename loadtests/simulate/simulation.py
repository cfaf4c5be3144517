"""The simulation: conversations come, a router sends their requests to replicas, and time goes from event to event."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from loadtests.simulate.board import Board
from loadtests.simulate.costs import Costs, Transfer
from loadtests.simulate.memory import Moved
from loadtests.simulate.replica import Replica
from loadtests.simulate.routers import Asked, Router
from loadtests.simulate.traffic import BASE, Conversation, Request, adapter_name, conversation_name


class Cluster(NamedTuple):
    """Replicas, and how routers get to know them."""

    replicas: int
    costs: Costs
    sizes: Sequence[float]  # bytes of each adapter
    on_disk: Sequence[int] = ()  # adapters that every replica has on its disk at the start, as many as fit, in order
    publish_seconds: float = 0.5  # between two publications of a replica
    routers: int = 1  # that send, each without knowing what the others send
    one_machine: bool = False  # the replicas share one machine, and `costs.beside` holds while another one computes
    kv_link: Transfer | None = None  # between replicas; None: they do not share K/V
    warm_seconds: float = 0.0  # what moves before is not counted
    closed: int | None = None  # so many conversations go on at one time, whenever they would begin; None: as they begin


class Counted(NamedTuple):
    """What all replicas have counted."""

    moved: Moved = Moved()  # bytes
    times: Moved = Moved()
    hits: int = 0
    misses: int = 0

    def since(self, before: "Counted") -> "Counted":
        moved, times = (
            Moved(*(now - then for now, then in zip(ours, theirs, strict=True)))
            for ours, theirs in ((self.moved, before.moved), (self.times, before.times))
        )
        return Counted(moved, times, *(now - then for now, then in zip(self[2:], before[2:], strict=True)))


def routing(seed: int) -> random.Random:
    """What routers do at random."""
    return random.Random(f"routing {seed}")


Call = tuple[Callable[..., None], tuple[Any, ...]]


class Outcome(NamedTuple):
    """All requests of a run, in the order in which they came, and the replicas as they were at its end."""

    requests: Sequence[Request]
    replicas: Sequence[Replica]
    seconds: float
    events: int
    counted: "Counted"  # since the run was warm


class Simulation:
    """One run: `run`, or `begin` and then `step` until it returns False; once."""

    def __init__(self, cluster: Cluster, router: Router, seed: int = 0) -> None:
        self.cluster, self.router = cluster, router
        costs = cluster.costs
        self.replicas = [Replica(n, costs, cluster.sizes, cluster.on_disk) for n in range(cluster.replicas)]
        if cluster.one_machine:
            for replica in self.replicas:
                replica.neighbours = [each for each in self.replicas if each is not replica]
        self.board = Board(self.replicas, cluster.routers)
        self.now = 0.0
        self.events = 0
        self.requests: list[Request] = []
        self._rng = routing(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._wakes: list[float | None] = [None] * cluster.replicas  # when each replica is woken next
        # What has come to each replica: an engine takes note of it between two steps.
        self._inboxes: list[list[Call]] = [[] for _ in self.replicas]
        self._arriving: Iterator[Conversation] = iter(())
        self._open = 0  # conversations that have begun and not ended
        self._more = True  # conversations will still begin
        self._cold = Counted()

    def run(self, arriving: Iterator[Conversation]) -> Outcome:
        """Run until all requests have ended."""
        self.begin(arriving)
        while self.step():
            pass
        return self.outcome

    def begin(self, arriving: Iterator[Conversation]) -> None:
        self._arriving = arriving
        for _ in range(self.cluster.closed or 1):
            self._begin_next()
        for replica in self.replicas:
            first = self.cluster.publish_seconds * (replica.number + 1) / len(self.replicas)
            self._at(first, self._publish, replica)
        if self.cluster.warm_seconds:
            self._at(self.cluster.warm_seconds, self._warm)

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._events:
            return False
        self.now, _, happens, arguments = heapq.heappop(self._events)
        happens(*arguments)
        self.events += 1
        return True

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.requests, self.replicas, self.now, self.events, self._count().since(self._cold))

    def _warm(self) -> None:
        self._cold = self._count()

    def _count(self) -> Counted:
        memories = [replica.memory for replica in self.replicas]
        moved, times = (
            Moved(*map(sum, zip(*each, strict=True)))
            for each in ([memory.moved for memory in memories], [memory.times for memory in memories])
        )
        hits, misses = sum(memory.hits for memory in memories), sum(memory.misses for memory in memories)
        return Counted(moved, times, hits, misses)

    def _at(self, time: float, happens: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happens, arguments))

    # Conversations

    def _begin_next(self) -> None:
        conversation = next(self._arriving, None)
        if conversation is None:
            self._more = False
            return
        self._open += 1
        self._at(self.now if self.cluster.closed else conversation.begins, self._begin, conversation)

    def _begin(self, conversation: Conversation) -> None:
        if not self.cluster.closed:
            self._begin_next()
        self._arrive(conversation, 0)

    def _arrive(self, conversation: Conversation, turn: int) -> None:
        request = Request(conversation, turn, self.now)
        self.requests.append(request)
        router = self._rng.randrange(self.cluster.routers) if self.cluster.routers > 1 else 0
        asked = Asked(
            None if request.adapter == BASE else adapter_name(request.adapter), conversation_name(conversation.number)
        )
        number = self.router.choose(asked, self.board.views[router], self._rng)
        self.board.sent(router, number)
        replica = self.replicas[number]
        request.router, request.replica = router, number
        replica.coming += 1
        self._at(self.now + self.cluster.costs.request_seconds, self._tell, replica, self._enter, request, replica)

    def _enter(self, request: Request, replica: Replica) -> None:
        """A request has got to the engine of its replica."""
        if not replica.accepts(request):
            replica.coming -= 1
            request.refused, request.ended = True, self.now
            self._after(request)
            return
        replica.expect(request)
        seconds = self._fetch(request, replica)
        if seconds is None:
            self._queue(request, replica)
        else:
            self._at(self.now + seconds, self._tell, replica, self._queue, request, replica)

    def _after(self, request: Request) -> None:
        """A request has ended: its conversation goes on, or another one begins in its place."""
        self.board.ended(request.router, request.replica)
        conversation, turn = request.conversation, request.turn + 1
        if turn < len(conversation.turns) and not request.refused:
            self._at(self.now + conversation.turns[turn].pause, self._arrive, conversation, turn)
            return
        self._open -= 1
        if self.cluster.closed:
            self._begin_next()

    # K/V from another replica

    def _fetch(self, request: Request, replica: Replica) -> float | None:
        """How long it takes to fetch the K/V of a request's conversation; None if computing them is not slower."""
        link, costs = self.cluster.kv_link, self.cluster.costs
        if link is None:
            return None
        kept = self.board.views[0].prefixes.get(conversation_name(request.conversation.number), {})
        known = replica.kv.known(request.conversation.number, request.prompt)
        most = min(max(kept.values(), default=0), request.prompt - 1)
        if most <= known:
            return None
        seconds = link.seconds((most - known) * costs.kv_bytes_per_token)
        if seconds >= compute_seconds(costs, known, most):
            return None
        request.cached, request.fetched = most, most - known
        return seconds

    # Replicas

    def _queue(self, request: Request, replica: Replica) -> None:
        replica.coming -= 1
        replica.add(request, self.now)

    def _tell(self, replica: Replica, happens: Callable[..., None], *arguments: Any) -> None:
        """Something has come to a replica: it happens after the step that goes on, or now if there is none."""
        self._inboxes[replica.number].append((happens, arguments))
        ends = replica.interrupt(self.now)
        at = self.now if ends is None else ends
        due = self._wakes[replica.number]
        if due is None or at < due:
            self._wakes[replica.number] = at
            self._at(at, self._wake, replica, at)

    def _wake(self, replica: Replica, due: float) -> None:
        if self._wakes[replica.number] != due:
            return  # it was woken before
        self._wakes[replica.number] = None
        ended = replica.commit(self.now)
        inbox = self._inboxes[replica.number]
        for happens, arguments in inbox:
            happens(*arguments)
        inbox.clear()
        replica.plan_next(self.now)
        for seconds, load in replica.start_loads():
            self._at(self.now + seconds, self._tell, replica, replica.finish_load, load)
        for request in ended:
            self._after(request)
        if replica.plan is not None:
            self._wakes[replica.number] = at = replica.plan.ends
            self._at(at, self._wake, replica, at)

    def _publish(self, replica: Replica) -> None:
        self.board.publish(replica, self.now)
        if self._open or self._more:
            self._at(self.now + self.cluster.publish_seconds, self._publish, replica)


def compute_seconds(costs: Costs, known: int, prompt: int) -> float:
    """How long an engine with nothing else to do takes for the tokens `known` to `prompt` of one prompt."""
    step = costs.limits.max_batch_tokens
    rows = costs.steps.table(step)
    seconds = 0.0
    for start in range(known, prompt, step):
        tokens = min(step, prompt - start)
        seconds += rows[tokens] + tokens * (start + tokens / 2) * costs.steps.prompt_attended_seconds
    return seconds
