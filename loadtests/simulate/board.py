"""What replicas publish, and what each router therefore knows."""

from collections.abc import Sequence

from loadtests.simulate.replica import Replica
from loadtests.simulate.routers import View
from loadtests.simulate.traffic import adapter_name, conversation_name


class Board:
    """The published state of all replicas, which is as old as its last publication; one view for each router.

    A router knows at once which requests it has sent itself and which of them have ended. Its load of a replica is
    their number or what the replica has published, whichever is more (`service.ray.router`).
    """

    def __init__(self, replicas: Sequence[Replica], routers: int) -> None:
        self._device: dict[str, set[int]] = {}
        self._host: dict[str, set[int]] = {}
        self._prefixes: dict[str, dict[int, int]] = {}
        self._published = [0] * len(replicas)
        self._open = [[0] * len(replicas) for _ in range(routers)]
        self._loads = [[0] * len(replicas) for _ in range(routers)]
        self._queues = [0.0] * len(replicas)
        names, places = tuple(f"replica-{replica.number}" for replica in replicas), replicas[0].limits.max_running
        published = (self._queues, self._device, self._host, self._prefixes)
        self.views = [View(names, places, loads, *published) for loads in self._loads]

    def sent(self, router: int, replica: int) -> None:
        self._count(router, replica, 1)

    def ended(self, router: int, replica: int) -> None:
        self._count(router, replica, -1)

    def _count(self, router: int, replica: int, more: int) -> None:
        self._open[router][replica] += more
        self._loads[router][replica] = max(self._open[router][replica], self._published[replica])

    def publish(self, replica: Replica, now: float) -> None:
        """Take over what has changed on a replica since it last published."""
        number = replica.number
        self._published[number] = replica.load
        for router in range(len(self._loads)):
            self._count(router, number, 0)
        self._queues[number] = replica.queue_seconds(now)
        for tier, adapter, present in replica.memory.changes:
            of_tier = self._device if tier == "device" else self._host
            if present:
                of_tier.setdefault(adapter_name(adapter), set()).add(number)
            else:
                of_tier[adapter_name(adapter)].discard(number)
        replica.memory.changes.clear()
        for conversation in replica.kv.changes:
            self._note(conversation_name(conversation), number, replica.kv.conversations.get(conversation, 0))
        replica.kv.changes.clear()

    def _note(self, conversation: str, number: int, tokens: int) -> None:
        kept = self._prefixes.setdefault(conversation, {})
        if tokens:
            kept[number] = tokens
        else:
            kept.pop(number, None)
            if not kept:
                del self._prefixes[conversation]
