"""What every request passes: the API key, the id that its answer carries, and the access log."""

import hmac
import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import RequestError
from service.http import error_response

REQUEST_ID = "x-request-id"
PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")
_RECORD = "rootstock.access_record"  # in a request's scope
_log = logging.getLogger(__name__)


class RequireKey:
    """Refuses requests without the API key, except for the open paths."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]):
        self._app, self._key, self._open_paths = app, key.encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs an API key: send it as `Authorization: Bearer KEY`"
        await error_response(RequestError("invalid_api_key", message))(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)


class RequestId:
    """Gives an answer the request id that its request came with."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(REQUEST_ID) if scope["type"] == "http" else None
        if given is None or not PRINTABLE.fullmatch(given):
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = given
            await send(message)

        await self._app(scope, receive, send_with_id)


@dataclass(slots=True)
class AccessRecord:
    """What the access log says of a request besides its HTTP line; the handler of a generation fills it in."""

    id: str | None = None
    model: str | None = None  # as the client named it
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None

    def __str__(self) -> str:
        said = [] if self.id is None else [f"id={self.id}"]
        if self.model is not None:
            said.append(f"model={self.model!r}")
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
    """Writes one line for each request when its answer has ended: status, time, and what generated it."""

    def __init__(self, app: ASGIApp):
        self._app = app

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
            given = Headers(scope=scope).get(REQUEST_ID, "")
            sent = f" request_id={given}" if PRINTABLE.fullmatch(given) else ""
            # repr of the path: a client must not be able to write lines of its own
            _log.info("%s %r %d %.0fms%s%s", scope["method"], scope["path"], status, milliseconds, record, sent)
