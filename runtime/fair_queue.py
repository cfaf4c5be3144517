"""Waiting requests in turn, so that nobody waits for all of somebody else's many."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

from runtime.messages import Group
from runtime.request import Request

# Group → the groups inside it, from tenants down to calls, each level in the order of its turns; a call → its requests
Tree = OrderedDict[Any, Any]


class FairQueue:
    """Round robin on three levels: tenants, the adapters of each, the calls on each; within a call by arrival.

    A group that comes has its turn after those that wait. `take` ends the turn of all groups that a request is in.
    """

    def __init__(self) -> None:
        self._tenants: Tree = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All requests in turn; those that the loop has reached may be taken or removed meanwhile."""
        return _in_turn(self._tenants)

    def append(self, request: Request) -> None:
        """Queue a request behind the others of its call."""
        self._requests(request).append(request)
        self._length += 1

    def appendleft(self, request: Request) -> None:
        """Queue a request that is the next one of all."""
        self._requests(request).appendleft(request)
        self._length += 1
        self.prefer(request)

    def prefer(self, request: Request) -> None:
        """Give the groups of a waiting request the next turn."""
        for level, key in self._levels(request):
            level.move_to_end(key, last=False)

    def take(self, request: Request) -> None:
        """Remove a request that starts: it was its groups' turn, and now it is that of the others."""
        for level, key in self._levels(request):
            level.move_to_end(key)
        self.remove(request)

    def remove(self, request: Request) -> None:
        for level, key in reversed(self._levels(request)):
            if isinstance(level[key], deque):
                level[key].remove(request)
            if not level[key]:
                del level[key]
        self._length -= 1

    def inside(self, group: Group) -> Iterator[tuple[Group, Iterator[Request]]]:
        """The groups directly inside a group, () for all tenants, each with its requests in turn."""
        level = self._tenants
        for key in group:
            level = level.get(key, {})
        for key in list(level):
            yield (*group, key), _in_turn(level[key])

    def _requests(self, request: Request) -> deque[Request]:
        tenant, adapter, call = request.groups[-1]
        adapters: Tree = self._tenants.setdefault(tenant, OrderedDict())
        calls: Tree = adapters.setdefault(adapter, OrderedDict())
        requests: deque[Request] = calls.setdefault(call, deque())
        return requests

    def _levels(self, request: Request) -> list[tuple[Tree, str | None]]:
        """The dictionaries from that of all tenants down, each with the key of the request's group in it."""
        tenant, adapter, call = request.groups[-1]
        adapters = self._tenants[tenant]
        return [(self._tenants, tenant), (adapters, adapter), (adapters[adapter], call)]

    def check(self) -> None:
        """Recount the requests, each of which must be where its groups say."""
        waiting = list(self)
        assert len(waiting) == self._length
        assert all(request in self._requests(request) for request in waiting)
        assert all(calls and all(calls.values()) for adapters in self._tenants.values() for calls in adapters.values())


def _in_turn(groups: "Tree | deque[Request]") -> Iterator[Request]:
    if isinstance(groups, deque):
        yield from list(groups)
        return
    turns: deque[Iterator[Request]] = deque()
    for group in list(groups.values()):
        turns.append(_in_turn(group))
        yield next(turns[-1])
    while turns:
        turn = turns.popleft()
        for request in turn:
            yield request
            turns.append(turn)
            break


def in_turn(requests: Iterable[Request]) -> list[Request]:
    """Requests that came in this order, in the order of a queue of them."""
    queue = FairQueue()
    for request in requests:
        queue.append(request)
    return list(queue)
