"""Which of several servers is to answer a request: a pure function of what each says of itself."""

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

# A server is crowded, and keeps no request whatever it holds, if it has so many more sequences than the idlest one, as
# a share of its places, or if its queue is so much longer than the shortest. So a hot adapter gets a second home early,
# and servers that are all full keep what they hold (docs/scale.md).
SPREAD = 0.25
QUEUE_SECONDS = 0.5
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
    on the device, then on the host, or most of a base prompt's K/V. Of several that hold as much the least loaded comes
    first; what nobody holds finds its home by rendezvous hashing. Crowded ones are compared by queues and loads first.
    """
    ready = [server for server in servers if server.ready]
    idlest = min((server.load for server in ready), default=0.0)
    shortest = min((server.queue_seconds for server in ready), default=0.0)

    def order(server: Server) -> tuple[object, ...]:
        crowded = server.load >= idlest + SPREAD or server.queue_seconds > shortest + QUEUE_SECONDS
        near, cached = _near(wanted, server), _cached(wanted, server)
        load = server.load if cached or near < ELSEWHERE else 0.0
        place = (server.queue_seconds, server.load, near, -cached) if crowded else (near, -cached, load, 0)
        return not server.ready, crowded, *place, -_weight(wanted.affinity, server.id)

    return sorted(servers, key=order)


def _near(wanted: Wanted, server: Server) -> int:
    """The nearest tier that holds the adapter; of the base that of all servers."""
    return min((NEAR.get(server.adapters.get(name, ""), ELSEWHERE) for name in wanted.adapters), default=ELSEWHERE)


def _cached(wanted: Wanted, server: Server) -> int:
    """How many of a base prompt's beginnings are cached there; those of an adapter's prompt are not told."""
    if wanted.adapters:
        return 0
    return max((count for count, head in enumerate(wanted.heads, 1) if head in server.heads), default=0)


def _weight(affinity: str, server: str) -> int:
    """The weight of a server for a request: the server with the highest one is its home (rendezvous hashing)."""
    return int.from_bytes(blake2b(f"{affinity}\0{server}".encode(), digest_size=8).digest())
