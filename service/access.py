"""What every request passes: the id that its answer carries, and the access log."""

import logging
import re
import time
from dataclasses import dataclass
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http import REQUEST_ID
from service.logs import Few

SHOWN = 200  # characters of a path or a model in a line
PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")
_RECORD = "rootstock.access_record"  # in a request's scope
_log = logging.getLogger(__name__)
_strangers = logging.getLogger(f"{__name__}.strangers")
_strangers.addFilter(Few())


class RequestId:
    """Gives every answer a request id: the one that its request came with, if it can be a header, else a new one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if PRINTABLE.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


@dataclass(slots=True)
class AccessRecord:
    """What the access log says of a request besides its HTTP line; the handler of a generation fills it in."""

    key: str | None = None  # the id of its key
    id: str | None = None
    model: str | None = None  # as the client named it
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None

    def __str__(self) -> str:
        said = [] if self.key is None else [f"key={self.key}"]
        if self.id is not None:
            said.append(f"id={self.id}")
        if self.model is not None:
            said.append(f"model={self.model[:SHOWN]!r}")
        if self.prompt_tokens is not None:
            said.append(f"tokens={self.prompt_tokens}+{self.completion_tokens} cached={self.cached_tokens}")
        if self.first_token_seconds is not None:
            said.append(f"first_token={self.first_token_seconds * 1000:.0f}ms")
        return "".join(f" {each}" for each in said)


def access_record(request: Request) -> AccessRecord:
    """The record that the access log writes when the request has been answered."""
    record: AccessRecord = request.scope.setdefault(_RECORD, AccessRecord())
    return record


class AccessLog:
    """Writes one line for each request when its answer has ended: status, time, and what generated it.

    Where requests need a key, those without one write few lines.
    """

    def __init__(self, app: ASGIApp, *, needs_key: bool = False):
        self._app, self._needs_key = app, needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # unless an answer begins, the client went away
        scope[_RECORD] = record = AccessRecord()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            milliseconds = (time.perf_counter() - started) * 1000
            request_id = scope["state"]["request_id"]
            line = "%s %r %d %.0fms%s request_id=%s"
            # repr of the path: a client must not be able to write lines of its own
            log = _strangers if self._needs_key and record.key is None else _log
            log.info(line, scope["method"], scope["path"][:SHOWN], status, milliseconds, record, request_id)
