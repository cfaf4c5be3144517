"""Ray's request router for the replicas: it asks `service.routing.choice`, and knows what it has sent itself."""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.ray.call import Call
from service.routing.choice import Server, Wanted, ranked


class ResidencyRouter(RequestRouter):
    """Sends a request to the replica that `ranked` puts first, and to the next one if that takes no more.

    Replicas say where their adapters are by `record_routing_stats`, a moment late; what this router has sent and not
    seen ended counts at once.
    """

    def initialize_state(self, places: int = 1) -> None:
        """`places` are those of a replica that has not said anything yet."""
        self._places = places
        self._sent: dict[str, ReplicaID] = {}  # by the id of the request: where it runs

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        call = pending_request.args[0] if pending_request.args else None
        sent, by_id = Counter(self._sent.values()), {each.replica_id.unique_id: each for each in candidate_replicas}
        servers = [self._server(id, each.routing_stats or {}, sent[each.replica_id]) for id, each in by_id.items()]
        wanted = call.wanted if isinstance(call, Call) else Wanted()
        if not wanted.affinity:  # what has no home of its own goes to all in turn
            wanted = Wanted(heads=(pending_request.metadata.internal_request_id,))
        return [[by_id[server.id]] for server in ranked(wanted, servers)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._sent[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._sent.pop(internal_request_id, None)

    def _server(self, id: str, stats: dict[str, Any], sent: int) -> Server:
        return Server(
            id=id,
            ready=stats.get("ready", True),
            places=stats.get("places", self._places),
            in_flight=max(sent, stats.get("in_flight", 0)),
            queue_seconds=stats.get("queue_seconds", 0.0),
            adapters=stats.get("adapters", {}),
            heads=frozenset(stats.get("heads", ())),
        )
