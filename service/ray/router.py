"""Ray's request router for the replicas: it asks `service.routing.choice`, and remembers who has died."""

import math
import time

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.ray.call import Call
from service.routing.choice import Server, Wanted, ranked

DEAD_SECONDS = 60.0  # that one which has died is left out, longer than it takes Ray's controller to notice
UNAVAILABLE_SECONDS = 2.0  # that a replica which could not be reached is asked last: it is dead, or its network is slow


class ResidencyRouter(RequestRouter):
    """Sends a request to the replica that `ranked` puts first, and to the next one if that takes no more.

    Replicas say where their adapters are by `record_routing_stats`, a moment late; the calls on each that Ray's router
    has sent and not seen ended count at once.
    """

    def initialize_state(self, places: int = 1) -> None:
        """`places` are those of a replica that has not said anything yet."""
        self._places = places
        self._dead: dict[ReplicaID, float] = {}  # of those that Ray's controller still names: when, by time.monotonic()
        self._unavailable: dict[ReplicaID, float] = {}  # when one could not be reached last, by the same clock

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Leave out the dead: until a check of their health, the controller names them with all news of the others."""
        named, now = {each.replica_id for each in replicas}, time.monotonic()
        self._dead = {id: at for id, at in self._dead.items() if id in named and now - at < DEAD_SECONDS}
        self._unavailable = {id: at for id, at in self._unavailable.items() if id in named}
        super().update_replicas([each for each in replicas if each.replica_id not in self._dead])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._dead[replica_id] = time.monotonic()
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
        wanted, avoid = (call.wanted, call.avoid) if isinstance(call, Call) else (Wanted(), "")
        by_id = {each.replica_id.unique_id: each for each in candidate_replicas}
        servers = [self._server(each, avoid) for each in by_id.values()]
        if not wanted.affinity:  # what has no home of its own goes to all in turn
            wanted = Wanted(heads=(pending_request.metadata.internal_request_id,))
        return [[by_id[server.id]] for server in ranked(wanted, servers)]

    def _server(self, replica: RunningReplica, avoid: str) -> Server:
        stats, id = replica.routing_stats or {}, replica.replica_id.unique_id
        reached = time.monotonic() - self._unavailable.get(replica.replica_id, -math.inf) > UNAVAILABLE_SECONDS
        return Server(
            id=id,
            ready=reached and id != avoid and stats.get("ready", True),
            places=stats.get("places", self._places),
            in_flight=max(self.replica_queue_len_cache.get(replica.replica_id) or 0, stats.get("in_flight", 0)),
            queue_seconds=stats.get("queue_seconds", 0.0),
            adapters=stats.get("adapters", {}),
            heads=frozenset(stats.get("heads", ())),
        )
