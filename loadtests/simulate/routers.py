"""Which replica gets a request: the routers that are compared, each a function of what replicas have published."""

import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

SPREAD = 0.25  # of a replica's places; docs/scale.md says what it does
QUEUE_SECONDS = 0.5
NOBODY: frozenset[int] = frozenset()
NAMES = ("random", "round robin", "least loaded", "power of two", "rendezvous", "ours", "ours by load", "ours relative")


class Asked(NamedTuple):
    """What a router knows of a request."""

    adapter: str | None
    conversation: str

    @property
    def affinity(self) -> str:
        """What has the same home: the adapter, or for the base the conversation."""
        return self.conversation if self.adapter is None else self.adapter


class View(NamedTuple):
    """What a router knows of the replicas: as last published, and what of their loads is its own."""

    names: Sequence[str]  # of the replicas
    places: int  # requests that a replica runs at one time
    loads: Sequence[int]  # requests that run or wait, by replica
    queues: Sequence[float]  # seconds that a new request would wait, by replica
    device: Mapping[str, Iterable[int]]  # the replicas that have an adapter on the device, by adapter
    host: Mapping[str, Iterable[int]]
    prefixes: Mapping[str, Mapping[int, int]]  # by conversation: what each replica keeps of it, all above 0


class Router(NamedTuple):
    name: str
    choose: Callable[[Asked, View, random.Random], int]


def at_random(asked: Asked, view: View, rng: random.Random) -> int:
    return rng.randrange(len(view.loads))


class RoundRobin:
    """The replicas in turn."""

    def __init__(self) -> None:
        self._next = -1

    def __call__(self, asked: Asked, view: View, rng: random.Random) -> int:
        self._next = (self._next + 1) % len(view.loads)
        return self._next


def least_loaded(asked: Asked, view: View, rng: random.Random) -> int:
    """Of those with the least load, one at random."""
    loads = view.loads
    lowest = min(loads)
    return rng.choice([replica for replica, load in enumerate(loads) if load == lowest])


def power_of_two(asked: Asked, view: View, rng: random.Random) -> int:
    """Of two at random, the one with less load."""
    one, other = rng.randrange(len(view.loads)), rng.randrange(len(view.loads))
    return min(one, other, key=lambda replica: view.loads[replica])


def rendezvous(asked: Asked, view: View, rng: random.Random) -> int:
    """Consistent hashing: of the adapter, or of the conversation for the base."""
    return homes(asked.affinity, tuple(view.names))[0]


class Affinity(NamedTuple):
    """What a replica holds decides, until it is crowded; `service.routing.choice` has it with `by_load` and `relative`.

    A replica is crowded if all its places are taken, if its queue is longer than `queue_seconds`, or if its load is
    `spread` of its places or more above the least loaded one. Of those that are not crowded, these in this order: one
    that has the adapter on the device, one that has it in host memory, any. Among equals: for the base the one that
    keeps most of the conversation, then the first by rendezvous hashing. If all are crowded: the shortest queue, then
    the least load, then as above.

    With `by_load` the least loaded one of those that have the adapter is chosen, and of those that keep as much of a
    conversation of the base. With `relative` a replica is crowded only in comparison with the least loaded one and the
    shortest queue, so that replicas which are all full are not all crowded. Without both it is the rule that the
    simulation began with.
    """

    spread: float = SPREAD
    queue_seconds: float = QUEUE_SECONDS
    by_load: bool = False
    relative: bool = False

    def choose(self, asked: Asked, view: View, rng: random.Random) -> int:
        loads = view.loads
        limit = min(loads) + self.spread * view.places  # from here on a replica is crowded
        queues, longest = view.queues, self.queue_seconds
        if self.relative:
            longest += min(queues)
        else:
            limit = min(limit, view.places)
        kept = view.prefixes.get(asked.conversation, {}) if asked.adapter is None else {}
        for holders in self._holders(asked, view, kept):
            fitting = [each for each in holders if loads[each] < limit and queues[each] <= longest]
            if fitting:
                return self._best(fitting, asked, view, kept)
        for replica in homes(asked.affinity, tuple(view.names)):
            if loads[replica] < limit and queues[replica] <= longest:
                return replica
        return self._least_crowded(asked, view, kept)

    def _holders(self, asked: Asked, view: View, kept: Mapping[int, int]) -> tuple[Iterable[int], ...]:
        if asked.adapter is None:
            return (kept,)
        return view.device.get(asked.adapter, NOBODY), view.host.get(asked.adapter, NOBODY)

    def _best(self, replicas: Sequence[int], asked: Asked, view: View, kept: Mapping[int, int]) -> int:
        if len(replicas) == 1:
            return replicas[0]

        def rank(replica: int) -> tuple[int, int, int]:
            load = view.loads[replica] if self.by_load else 0
            return -kept.get(replica, 0), load, -weight(asked.affinity, view.names[replica])

        return min(replicas, key=rank)

    def _least_crowded(self, asked: Asked, view: View, kept: Mapping[int, int]) -> int:
        pairs = list(zip(view.queues, view.loads, strict=True))
        least = min(pairs)
        equals = [replica for replica, pair in enumerate(pairs) if pair == least]
        for holders in self._holders(asked, view, kept):
            if fitting := [replica for replica in equals if replica in set(holders)]:
                return self._best(fitting, asked, view, kept)
        return self._best(equals, asked, view, kept)


def by_name(name: str, spread: float = SPREAD) -> Router:
    """Return a router that has not routed yet. Raises ValueError."""
    functions: dict[str, Callable[[Asked, View, random.Random], int]] = {
        "random": at_random,
        "round robin": RoundRobin(),
        "least loaded": least_loaded,
        "power of two": power_of_two,
        "rendezvous": rendezvous,
        "ours": Affinity(spread).choose,
        "ours by load": Affinity(spread, by_load=True).choose,
        "ours relative": Affinity(spread, by_load=True, relative=True).choose,
    }
    if name not in functions:
        raise ValueError(f"there is no router {name!r}, only {', '.join(functions)}")
    return Router(name, functions[name])


@lru_cache(2**15)
def homes(affinity: str, names: tuple[str, ...]) -> "array[int]":
    """The replicas in the order of rendezvous hashing: by their weights for what is routed."""
    order = sorted(range(len(names)), key=lambda replica: weight(affinity, names[replica]), reverse=True)
    return array("H", order)


def weight(affinity: str, name: str) -> int:
    return int.from_bytes(blake2b(f"{affinity}\0{name}".encode(), digest_size=8).digest())
