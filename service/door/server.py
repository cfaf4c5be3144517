"""The HTTP server: uvicorn's, with our connections, which lets requests end before it does."""

import asyncio
import logging
import resource
import socket
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from service.door.connection import Connection
from service.door.gate import Gate
from service.settings import Settings

GRACE_SECONDS = 2.0  # for answers to reach their clients after their requests were ended
OTHER_DESCRIPTORS = 256  # files and sockets besides connections
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves an application of `create_app`. A signal drains it: new requests are refused, those in flight may end.

    After `drain_seconds`, or at a second signal, running generations end with an error event, and requests that have
    no answer yet with an error. `options` are uvicorn's.

    uvicorn's httptools was chosen by measuring streams of 500 events, once and beside other work, in µs of a core for
    each event: granian 6.9, httptools 8.8, h11 17.8, hypercorn 24.4. httptools and granian hold silent connections and
    half a head for ever, httptools takes a head of any size; granian offers no way to mend that, and answers malformed
    requests itself.
    """

    def __init__(self, app: Starlette, **options: Any) -> None:
        settings: Settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                access_log=False,
                log_config=None,
                limit_concurrency=settings.max_connections,
                timeout_graceful_shutdown=max(1, int(GRACE_SECONDS)),
                **options,
            )
        )
        self._app, self._drain_seconds = app, settings.drain_seconds
        self._hurried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # while it serves

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second signal ends what is in flight."""
        gate: Gate = self._app.state.gate
        if gate.closed and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hurried.set)  # this is no callback of the loop
        gate.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await drain(self._app, self._drain_seconds, self._hurried)
        await super().shutdown(sockets)


async def drain(app: Starlette, seconds: float, hurried: asyncio.Event | None = None) -> None:
    """Refuse new requests of an application of `create_app`, and let those in flight end.

    After so many seconds, or when it is hurried, generations end with an error event, and requests without an answer
    get an error.
    """
    gate: Gate = app.state.gate
    gate.close()
    others = [] if hurried is None else [hurried.wait()]
    if not await _within(seconds, gate.emptied(), *others):
        app.state.services.engine.end_requests("shutting_down", "the service is shutting down")
        if not await _within(GRACE_SECONDS, gate.emptied()):
            gate.cut()


async def _within(seconds: float, wanted: Coroutine[Any, Any, Any], *others: Coroutine[Any, Any, Any]) -> bool:
    """Wait for what is wanted or for one of the others, but not longer; returns whether it has come."""
    first = asyncio.ensure_future(wanted)
    tasks = [first, *map(asyncio.ensure_future, others)]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    return first.done() and not first.cancelled()


def allow_descriptors(connections: int) -> None:
    """Raise the limit of open files for so many connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_DESCRIPTORS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        need = f"{connections} connections (--max-connections) need {wanted} open files"
        _log.warning("%s, and the system allows %d: allow fewer connections, or raise `ulimit -Hn`", need, allowed)
