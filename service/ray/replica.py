"""A replica: the whole service with an engine of its own, asked through Ray instead of a socket."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from ray import serve
from starlette.types import Message

from service.app import create_app
from service.configure import settings_for
from service.door.server import drain
from service.ray.call import ELSEWHERE, Call
from service.routing.routes import Routing, routing_of
from service.services import Services

ENGINE_SECONDS = 300.0  # without an engine that serves, after which Ray replaces the replica
BUFFERED = 64  # messages of an answer that wait for Ray


class Replica:
    """Answers calls of the ingress. The service restarts its engine by itself; Ray replaces what cannot be mended.

    `engine_command` is for tests.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, options: dict[str, Any], engine_command: Sequence[str] | None = None
    ) -> None:
        settings = await asyncio.to_thread(settings_for, **options)
        context = serve.get_replica_context()
        self._name, rank = context.replica_tag, context.rank.rank
        changes: dict[str, Any] = {"cache_directory": settings.cache_directory / f"replica-{rank}"}
        if engine_command is not None:
            changes["engine_command"] = tuple(engine_command)
        self._app = create_app(msgspec.structs.replace(settings, **changes))
        self._drain_seconds = settings.drain_seconds
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        self._served_at = time.monotonic()  # when an engine was seen last

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The messages of an ASGI answer, as many at a time as there are. Its cancellation aborts the request.

        While the engine restarts, which routers learn a moment late, a call is sent on once.
        """
        if call.attempt == 0 and self._services.engine.ready is None:
            yield [{"type": ELSEWHERE, "replica": self._name}]
            return
        messages: asyncio.Queue[Message | None] = asyncio.Queue(BUFFERED)
        task = asyncio.create_task(self._answer(call, messages))
        try:
            while (message := await messages.get()) is not None:
                found = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    found.append(message)
                yield found
                if message is None:
                    break
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _answer(self, call: Call, messages: "asyncio.Queue[Message | None]") -> None:
        task = asyncio.current_task()
        assert task is not None
        parts = iter([{"type": "http.request", "body": call.body, "more_body": False}])
        more = call.pieces is not None

        async def receive() -> Message:
            nonlocal more
            if call.pieces is None and (message := next(parts, None)) is not None:
                return message
            if more:
                taken: Message = await call.pieces.take.remote(call.id, call.attempt)
                more = taken["type"] == "http.request" and bool(taken.get("more_body"))
                return taken
            await asyncio.Event().wait()  # a client that goes away is a cancellation
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-replica", self._name.encode())]}
            await messages.put(message)

        try:
            await self._app(dict(call.scope), receive, send)
        finally:
            if not task.cancelling():  # else nobody takes the messages any more
                await messages.put(None)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router knows of this replica: as the engine and the service say, nothing remembered beside."""
        routing = await self._routing()
        return {
            "ready": routing.ready,
            "places": routing.places,
            "in_flight": routing.running + routing.waiting,
            "queue_seconds": routing.queue_seconds,
            "adapters": {name: each.tier for name, each in routing.adapters.items() if each.tier is not None},
            "heads": routing.prefixes,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        routing = await self._routing()
        load = (routing.running + routing.waiting) / routing.places
        return {"queue_seconds": routing.queue_seconds, "load": load}

    async def check_health(self) -> None:
        """Raise RuntimeError if no engine has served for long. While the service restarts one, all is well."""
        now = time.monotonic()
        if self._services.engine.ready is not None:
            self._served_at = now
        elif now - self._served_at > ENGINE_SECONDS:
            raise RuntimeError(f"no engine has served for {now - self._served_at:.0f} s")

    async def __del__(self) -> None:
        """End the engine, once the requests that Ray still counts have ended. Ray awaits it."""
        if hasattr(self, "_served_at"):
            await drain(self._app, self._drain_seconds)
            await self._life.aclose()

    @property
    def _services(self) -> Services:
        services: Services = self._app.state.services
        return services

    async def _routing(self) -> Routing:
        return await routing_of(self._services, self._app.state.gate)
