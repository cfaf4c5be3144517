"""Ray's request router for the replicas: it asks `service.routing.choice`, and knows what it has sent itself."""

import math
import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.ray.call import Call
from service.routing.choice import Server, Wanted, ranked

UNAVAILABLE_SECONDS = 2.0  # that a replica which could not be reached is asked last: it is dead, or its network is slow


class ResidencyRouter(RequestRouter):
    """Sends a request to the replica that `ranked` puts first, and to the next one if that takes no more.

    Replicas say where their adapters are by `record_routing_stats`, a moment late; what this router has sent and not
    seen ended counts at once.
    """

    def initialize_state(self, places: int = 1) -> None:
        """`places` are those of a replica that has not said anything yet."""
        self._places = places
        self._sent: dict[str, ReplicaID] = {}  # by the id of the request: where it runs
        self._dead: set[ReplicaID] = set()  # of those that Ray's controller still names
        self._unavailable: dict[ReplicaID, float] = {}  # when one could not be reached last, by time.monotonic()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Leave out the dead: until a check of their health, the controller names them with all news of the others."""
        named = {each.replica_id for each in replicas}
        self._dead &= named
        self._unavailable = {id: at for id, at in self._unavailable.items() if id in named}
        super().update_replicas([each for each in replicas if each.replica_id not in self._dead])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._dead.add(replica_id)
        super().on_replica_actor_died(replica_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        self._unavailable[replica_id] = time.monotonic()
        super().on_replica_actor_unavailable(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        call = pending_request.args[0] if pending_request.args else None
        sent, by_id = Counter(self._sent.values()), {each.replica_id.unique_id: each for each in candidate_replicas}
        wanted, avoid = (call.wanted, call.avoid) if isinstance(call, Call) else (Wanted(), "")
        servers = [self._server(each, sent[each.replica_id], avoid) for each in by_id.values()]
        if not wanted.affinity:  # what has no home of its own goes to all in turn
            wanted = Wanted(heads=(pending_request.metadata.internal_request_id,))
        return [[by_id[server.id]] for server in ranked(wanted, servers)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._sent[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._sent.pop(internal_request_id, None)

    def _server(self, replica: RunningReplica, sent: int, avoid: str) -> Server:
        stats, id = replica.routing_stats or {}, replica.replica_id.unique_id
        reached = time.monotonic() - self._unavailable.get(replica.replica_id, -math.inf) > UNAVAILABLE_SECONDS
        return Server(
            id=id,
            ready=reached and id != avoid and stats.get("ready", True),
            places=stats.get("places", self._places),
            in_flight=max(sent, stats.get("in_flight", 0)),
            queue_seconds=stats.get("queue_seconds", 0.0),
            adapters=stats.get("adapters", {}),
            heads=frozenset(stats.get("heads", ())),
        )
