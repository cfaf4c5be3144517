"""How long a new request would wait for its turn, by how fast those before it get theirs."""

import time
from collections import Counter, deque
from collections.abc import Callable

from runtime.messages import Generate, Group

WINDOW_SECONDS = 30.0  # of the past, in which starts are counted


class Backlog:
    """The sequences that have no token yet, and when others got their first.

    The engine runs `places` sequences at a time, and starts waiting ones in turn (`runtime.fair_queue`).
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places, self._clock = places, clock
        self._waiting: dict[str, tuple[Group, ...]] = {}  # by request id
        self._waits_since = 0.0  # when the first of them came to an empty queue
        self._running: set[str] = set()  # request ids
        self._starts: deque[float] = deque()  # times of the last ones

    @property
    def waiting(self) -> int:
        """How many sequences have had no token yet."""
        return len(self._waiting)

    def queued(self, command: Generate) -> None:
        """A sequence is sent to the engine."""
        if not self._waiting:
            self._waits_since = self._clock()
        self._waiting[command.request_id] = command.groups

    def started(self, request_id: str) -> None:
        """A sequence has got a token; only its first one counts."""
        if self._waiting.pop(request_id, None) is not None:
            self._running.add(request_id)
            self._starts.append(self._clock())

    def ended(self, request_id: str) -> None:
        """A sequence has ended, whether it had started or not."""
        self._waiting.pop(request_id, None)
        self._running.discard(request_id)

    def wait_seconds(self, tenant: str, adapter: str | None) -> float:
        """How long the first sequence of a new call would wait: its place in the queue, by starts a second of late.

        A queue that has not moved at all counts as one that is about to.
        """
        queued = len(self._waiting) + len(self._running) - self.places  # the others have their places
        if queued < 0:
            return 0.0
        now = self._clock()
        since = max(self._waits_since, now - WINDOW_SECONDS) if self._waiting else now
        while self._starts and self._starts[0] < since:
            self._starts.popleft()
        place = min(self._place((tenant, adapter)), queued + 1)
        return place * (now - since) / (len(self._starts) + 1)

    def _place(self, group: Group) -> int:
        """Which start from now is that of a new call, at the latest: each group beside its own has as many turns."""
        waiting = Counter(each for groups in self._waiting.values() for each in groups)
        place = 1 + sum(each[:-1] == group for each in waiting)  # every call on the adapter has one turn
        for level in (group, group[:1]):
            beside = (count for each, count in waiting.items() if each[:-1] == level[:-1] and each != level)
            place += sum(min(count, place) for count in beside)
        return place
