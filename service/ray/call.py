"""A request on its way from the ingress to a replica, and a body that is too large to go as one value."""

import asyncio
from typing import Any, NamedTuple

import ray
from starlette.types import Message, Scope

from service.routing.choice import Wanted

WINDOW = 8  # messages of a body between the one that receives them and the one that wants them
CARRIED = (  # what of an ASGI scope can be sent
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


class Call(NamedTuple):
    """A request: an ASGI scope, and its body or whoever hands over the pieces of it."""

    scope: dict[str, Any]
    wanted: Wanted  # for the router
    body: bytes = b""
    pieces: Any = None  # the handle of an actor `Pieces`, instead of a body
    id: str = ""  # of the body there


def carried(scope: Scope) -> dict[str, Any]:
    return {name: scope[name] for name in CARRIED if name in scope}


@ray.remote(num_cpus=0)
class Pieces:
    """Hands the pieces of bodies from the ingress that receives them to the replicas that want them.

    It holds `WINDOW` messages of each: who receives a body waits for who reads it.
    """

    def __init__(self) -> None:
        self._bodies: dict[str, asyncio.Queue[Message]] = {}

    async def put(self, id: str, message: Message) -> None:
        """Hand over the next message of a body; returns when there is room for another one."""
        await self._bodies.setdefault(id, asyncio.Queue(WINDOW)).put(message)

    async def take(self, id: str) -> Message:
        """The next message of a body."""
        return await self._bodies.setdefault(id, asyncio.Queue(WINDOW)).get()

    async def drop(self, id: str) -> None:
        """Forget a body whose request has been answered."""
        self._bodies.pop(id, None)
