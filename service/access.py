"""What every request passes: the id that its answer carries, and the access log."""

import logging
import re
import time
from dataclasses import dataclass
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.output.logs import Field
from service.http import REQUEST_ID, AnswerStatus
from service.logs import Few, log_event
from service.traces.stages import Stage

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
    """What the access log says of a request besides its HTTP line; whoever handles the request fills it in."""

    key: str | None = None  # the id of its key
    id: str | None = None
    model: str | None = None  # as the client named it
    adapter: str | None = None  # digest, or digests
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float | None = None
    queue_seconds: float | None = None
    finish: str | None = None  # why its sequences ended
    trace: str | None = None  # the id of its trace
    stages: list[Stage] | None = None  # None: nobody asks for them

    def fields(self) -> dict[str, Field]:
        """What is known of the generation, by its names in the log."""
        tokens = {"cached_tokens": self.cached_tokens, "generated_tokens": self.generated_tokens}
        return {
            "key": self.key,
            "id": self.id,
            "model": self.model,
            "adapter": self.adapter,
            "prompt_tokens": self.prompt_tokens,
            **(tokens if self.prompt_tokens is not None else {}),
            "first_token_ms": milliseconds(self.first_token_seconds),
            "queue_ms": milliseconds(self.queue_seconds),
            "finish": self.finish,
            "trace": self.trace,
        }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def access_record(request: Request) -> AccessRecord:
    """The record that the access log writes when the request has been answered."""
    return record_of(request.scope)


def record_of(scope: Scope) -> AccessRecord:
    record: AccessRecord = scope.setdefault(_RECORD, AccessRecord())
    return record


def client_of(scope: Scope) -> str | None:
    """The address that a request came from."""
    return scope["client"][0] if scope.get("client") else None


def who(request: Request) -> str | None:
    """Who sends a request, for the log: its address, after the id of its key if it has one."""
    said = filter(None, (access_record(request).key, client_of(request.scope)))
    return "@".join(said) or None


def template_of(scope: Scope) -> str | None:
    """The path of the route that a request was given to, such as /adapters/{name}; None if there was none."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return None if path is None else re.sub(r":\w+}", "}", path)


class AccessLog:
    """Writes one line for each request when its answer has ended: status, time, and what generated it.

    Where requests need a key, those without one have few lines.
    """

    def __init__(self, app: ASGIApp, *, needs_key: bool = False):
        self._app, self._needs_key = app, needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started, record, answer = time.perf_counter(), record_of(scope), AnswerStatus(send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            line: dict[str, Field] = {
                "method": scope["method"],
                "path": template_of(scope) or scope["path"],
                "status": answer.status,
                "ms": milliseconds(time.perf_counter() - started),
                **record.fields(),
                "request_id": scope["state"]["request_id"],
                "client": client_of(scope),
            }
            log_event(_strangers if self._needs_key and record.key is None else _log, "request", line)
