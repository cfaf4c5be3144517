"""A request on its way from the ingress to a replica, and a body that is too large to go as one value."""

import asyncio
from collections import deque
from typing import Any, NamedTuple

import ray
from starlette.types import Message, Scope

from service.routing.choice import Wanted

ELSEWHERE = "rootstock.elsewhere"  # the message of a replica without an engine, instead of an answer
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
    attempt: int = 0  # which replica in a row gets it, because the ones before have died or have no engine
    avoid: str = ""  # the replica that had none


def carried(scope: Scope) -> dict[str, Any]:
    return {name: scope[name] for name in CARRIED if name in scope}


class Body:
    """The messages of a body that wait to be read, and by which attempt at its request they may be."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.changed = asyncio.Condition()
        self.attempt = 0
        self.begun = False  # a message was handed out, which nobody has any more


@ray.remote(num_cpus=0)
class Pieces:
    """Hands the pieces of bodies from the ingress that receives them to the replicas that want them.

    It holds `WINDOW` messages of each: who receives a body waits for who reads it.
    """

    def __init__(self) -> None:
        self._bodies: dict[str, Body] = {}

    async def put(self, id: str, message: Message) -> None:
        """Hand over the next message of a body; returns when there is room for another one."""
        body = self._bodies.setdefault(id, Body())
        async with body.changed:
            await body.changed.wait_for(lambda: len(body.messages) < WINDOW)
            body.messages.append(message)
            body.changed.notify_all()

    async def take(self, id: str, attempt: int) -> Message:
        """The next message of a body; for an attempt that another one has followed, that the client has gone."""
        body = self._bodies.setdefault(id, Body())
        async with body.changed:
            await body.changed.wait_for(lambda: body.attempt != attempt or bool(body.messages))
            if body.attempt != attempt:
                return {"type": "http.disconnect"}
            body.begun = True
            message = body.messages.popleft()
            body.changed.notify_all()
            return message

    async def repeat(self, id: str, attempt: int) -> bool:
        """Give a body to another attempt, and nothing more to the last one; False if that has begun to read it."""
        body = self._bodies.setdefault(id, Body())
        async with body.changed:
            if not body.begun:
                body.attempt = attempt
                body.changed.notify_all()
            return not body.begun

    async def drop(self, id: str) -> None:
        """Forget a body whose request has been answered."""
        self._bodies.pop(id, None)
