"""The requests in flight: counted, ended when their bodies come too slowly, and let out before the service ends."""

import asyncio
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.door.memory import LARGE_BODY, MemoryReturn
from service.errors import RequestError
from service.http import error_response, own_path

# A body may be late by so much; so a client that stops to send is given up after this time, however fast it was.
PATIENCE_SECONDS, LEAST_BYTES_PER_SECOND = 10.0, 64 * 1024


class Gate:
    """Knows the requests in flight, and whether new ones are let in. All calls belong to one event loop."""

    def __init__(self) -> None:
        self.closed = False  # the service is about to end
        self.cut_off = False  # requests in flight are ended
        self._in_flight: set[asyncio.Task[None]] = set()
        self.memory = MemoryReturn()

    def close(self) -> None:
        """Let no further requests in; those in flight go on."""
        self.closed = True

    async def emptied(self) -> None:
        """Wait for the requests in flight to end."""
        while self._in_flight:
            await asyncio.wait(self._in_flight)

    def cut(self) -> None:
        """End the requests in flight; those that have no answer yet are answered with `shutting_down`."""
        self.cut_off = True
        for task in self._in_flight:
            task.cancel()

    def enter(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.add(task)

    def leave(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.discard(task)


class AtGate:
    """Passes requests through the gate, except those to the open paths, which are let in always and not waited for."""

    def __init__(self, app: ASGIApp, gate: Gate, open_paths: Collection[str]) -> None:
        self._app, self._gate, self._open_paths = app, gate, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or own_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
        elif self._gate.closed:
            await error_response(_shutting_down())(scope, receive, send)
        else:
            await self._pass(scope, PatientBody(receive), send)

    async def _pass(self, scope: Scope, body: "PatientBody", send: Send) -> None:
        task, begun = asyncio.current_task(), False
        assert task is not None

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        self._gate.enter(task)
        try:
            await self._app(scope, body.receive, send_and_note)
        except asyncio.CancelledError:
            if not self._gate.cut_off:
                raise
            task.uncancel()
            if not begun:
                await error_response(_shutting_down())(scope, body.receive, send)
        finally:
            self._gate.leave(task)
            if body.received > LARGE_BODY:
                self._gate.memory.soon()


class PatientBody:
    """Receives a request's body, and counts how late it is: only the time counts that the service waits for it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = False
        self._patience = PATIENCE_SECONDS
        self.received = 0  # bytes

    async def receive(self) -> Message:
        """The next message. Raises RequestError `body_too_slow`."""
        if self._complete:
            return await self._receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._patience):
                message = await self._receive()
        except TimeoutError:
            text = f"the body came too slowly: expected {LEAST_BYTES_PER_SECOND} bytes a second"
            raise RequestError("body_too_slow", text) from None
        size = len(message.get("body", b""))
        self.received += size
        late = self._patience - (time.monotonic() - began)
        self._patience = min(PATIENCE_SECONDS, late + size / LEAST_BYTES_PER_SECOND)
        self._complete = not message.get("more_body", False)
        return message


def _shutting_down() -> RequestError:
    return RequestError("shutting_down", "the service is shutting down: send the request to another server, or later")
