"""The ingress: reads what a request asks for, has Ray choose a replica, and passes the answer on."""

import asyncio
from contextlib import suppress
from typing import Any
from uuid import uuid4

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.door.bodies import Bodies
from service.errors import EngineError, RequestError, error_body
from service.http import encode_json, error_response, own_path
from service.ray.call import ELSEWHERE, Call, Pieces, carried
from service.routing.wanted import wanted_of

# Calls on what one replica has in its memory: another one answers the next call, and knows nothing of it
OF_ONE_REPLICA = ("/kv/prefixes", "/kv/namespaces", "/pause", "/resume", "/reset_prefix_cache", "/v1/responses/")
EVENTS = b"text/event-stream"
ATTEMPTS = 3  # at a request of which no answer has begun when its replica dies
PAUSE_SECONDS = 0.1  # before another attempt: by then the router knows of the death


class Ingress:
    """Forwards each request to a replica. It holds no state but the bodies that it forwards."""

    def __init__(self, replicas: DeploymentHandle, base: str, max_body_bytes: int) -> None:
        self._replicas, self._base = replicas.options(stream=True), base
        self._bodies = Bodies(max_body_bytes)
        self._pieces = Pieces.remote()  # type: ignore[attr-defined]

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray has answer HTTP."""
        return Starlette(routes=[Mount("/", app=self._forward)])

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._relay(Request(scope, receive), send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)

    async def _relay(self, request: Request, send: Send) -> None:
        path = own_path(request.scope)
        if path.startswith(OF_ONE_REPLICA):
            message = f"{path}: what this call is about is in one replica's memory, and calls go to several: not built"
            raise RequestError("not_implemented", message)
        if request.method != "PUT":  # that of an adapter is the only body that is no JSON
            body = await self._bodies.read(request.stream())
            await self._ask(
                Call(carried(request.scope), wanted_of(path, request.headers, body, self._base), body), send
            )
            return
        wanted, id = wanted_of(path, request.headers, b"", self._base), uuid4().hex
        feeding = asyncio.create_task(self._feed(id, request.receive))
        try:
            await self._ask(Call(carried(request.scope), wanted, pieces=self._pieces, id=id), send)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            self._pieces.drop.remote(id)

    async def _feed(self, id: str, receive: Receive) -> None:
        """Hand the pieces of a body over as they come, not faster than the replica takes them."""
        more = True
        while more:
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            await self._pieces.put.remote(id, message)

    async def _ask(self, call: Call, send: Send) -> None:
        """Have a replica answer; one that dies before its answer begins is followed by another, if the call may be."""
        again: Call | None = call
        while again is not None:
            call, again = again, None
            start, last, ended = None, False, False
            answer = self._replicas.answer.remote(call)
            try:
                async for messages in answer:
                    for message in messages:
                        if message["type"] == ELSEWHERE:
                            again = await self._again(call._replace(avoid=message["replica"]))
                            continue
                        start = message if message["type"] == "http.response.start" else start
                        last = message["type"] == "http.response.body" and not message.get("more_body", False)
                        await send(message)
                ended = True
            except BackPressureError as error:
                raise RequestError("queue_full", "all replicas have as many requests as they take") from error
            except DeploymentUnavailableError as error:
                raise EngineError("engine_unavailable", "no replica can be started: Ray's log says why") from error
            except (ActorDiedError, ActorUnavailableError) as error:
                if start is None and again is None:
                    again = await self._again(call)
                if again is None and not last:
                    await self._lost(start, send, error)
            finally:
                if not ended:
                    with suppress(asyncio.CancelledError):
                        answer.cancel()

    async def _again(self, call: Call) -> Call | None:
        """The call for another replica; None if it was tried often enough, or if a part of its body is gone.

        What changes an adapter is repeated too: done twice it is the same as done once.
        """
        again = call._replace(attempt=call.attempt + 1)
        if again.attempt == ATTEMPTS or (call.pieces and not await call.pieces.repeat.remote(call.id, again.attempt)):
            return None
        await asyncio.sleep(PAUSE_SECONDS)
        return again

    async def _lost(self, start: Message | None, send: Send, error: Exception) -> None:
        """End an answer whose replica has died: an error if it had not begun, an error event in a stream.

        Raises ConnectionError in the middle of any other body, which cuts the client's connection.
        """
        failure = EngineError(
            "engine_died", "the replica that answered has died, and is replaced: send the request again"
        )
        if start is None:
            raise failure from error
        headers: dict[bytes, Any] = {name.lower(): value for name, value in start["headers"]}
        if not headers.get(b"content-type", b"").startswith(EVENTS):
            raise ConnectionError(failure.message) from error
        event = b"data: %b\n\n" % encode_json(error_body(failure))
        await send({"type": "http.response.body", "body": event, "more_body": False})
