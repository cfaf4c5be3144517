"""Which of several servers is to answer a request: a pure function of what each says of itself."""

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

# Shares of a server's places. One that has so many more sequences than the idlest is crowded: it keeps no request,
# whatever it holds, so that a hot adapter gets a second home before its first one is full.
SPREAD = 0.25
QUEUE_SECONDS = 0.5  # a server whose queue is longer is crowded too
NEAR = {"device": 0, "host": 1}  # tiers, the nearest first; elsewhere is farther than both
ELSEWHERE = 2


class Wanted(NamedTuple):
    """What a request asks for, as far as its choice of a server depends on it."""

    adapters: tuple[str, ...] = ()  # the names that its adapter may have; none: the base
    heads: tuple[str, ...] = ()  # hashes of longer and longer beginnings of its prompt

    @property
    def affinity(self) -> str:
        """What has the same home while nothing else speaks for another server; a conversation has one of its own."""
        if self.adapters:
            return self.adapters[-1]
        return self.heads[min(1, len(self.heads) - 1)] if self.heads else ""


class Server(NamedTuple):
    """What a server says of itself, and what the chooser knows beside."""

    id: str
    ready: bool = True
    places: int = 1  # sequences that can run at one time
    in_flight: int = 0  # sequences that run or wait
    queue_seconds: float = 0.0  # that a new request would wait
    adapters: Mapping[str, Literal["device", "host"]] = {}  # by name: where memory holds them
    heads: Collection[str] = ()  # of base prompts whose K/V are cached

    @property
    def load(self) -> float:
        return self.in_flight / self.places


def ranked(wanted: Wanted, servers: Sequence[Server]) -> list[Server]:
    """The servers in the order in which they should be asked.

    Those that are ready come first; of them those that are not crowded; of them those whose memory holds the adapter,
    on the device, then on the host. Among equals loads are compared, in steps of `SPREAD`; then how much of a base
    prompt is cached; then rendezvous hashing, by which a request finds its last server while nothing speaks against it.
    Crowded ones are compared by their queues and loads first.
    """
    idlest = min((server.load for server in servers if server.ready), default=0.0)

    def order(server: Server) -> tuple[object, ...]:
        surplus = server.load - idlest
        crowded = server.load >= 1 or server.queue_seconds > QUEUE_SECONDS or surplus >= SPREAD
        load = max(0, int(surplus / SPREAD))
        near = (
            0
            if not wanted.adapters
            else min(NEAR.get(server.adapters.get(name, ""), ELSEWHERE) for name in wanted.adapters)
        )
        place = (server.queue_seconds, server.load, near) if crowded else (near, load)
        return not server.ready, crowded, *place, -_cached(wanted, server), -_weight(wanted.affinity, server.id)

    return sorted(servers, key=order)


def _cached(wanted: Wanted, server: Server) -> int:
    """How many of a base prompt's beginnings are cached there; those of an adapter's prompt are not told."""
    if wanted.adapters:
        return 0
    return max((count for count, head in enumerate(wanted.heads, 1) if head in server.heads), default=0)


def _weight(affinity: str, server: str) -> int:
    """The weight of a server for a request: the server with the highest one is its home (rendezvous hashing)."""
    return int.from_bytes(blake2b(f"{affinity}\0{server}".encode(), digest_size=8).digest())
