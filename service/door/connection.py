"""One connection of a client: what it may send, and how long it may take, before there is a request."""

import asyncio
import logging
from typing import Any, Literal
from uuid import uuid4

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.errors import RequestError, answer_of, error_body
from service.http import REQUEST_ID, encode_json
from service.logs import Few

HEAD_BYTES = 64 * 1024  # of a request's line and headers; the chunk of the network that exceeds it is parsed as well
HEAD_SECONDS = 15.0  # from the start of a connection, or from a head's first byte, to the head's end
UNREAD_SECONDS = 5.0  # for the client to read an answer that came before the end of its body
MAX_PIPELINED = 16  # requests that wait for the answer to an earlier one of their connection
_log = logging.getLogger(__name__)
_log.addFilter(Few())


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's with limits of size and time, whose refusals are our JSON errors.

    There are at most `config.limit_concurrency` connections. A further one takes the place of that which has waited
    longest for a request, and is refused if every other one has a request.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limit_concurrency = None  # uvicorn's own limit answers in plain text
        self._max_connections = config.limit_concurrency
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        self._outside_bodies = 0  # bytes since the message began, or since the last ones of its body
        self._timer: asyncio.TimerHandle | None = None  # of the head, or of a body whose answer has been sent
        self.waits_since: float | None = None  # on the loop's clock; None while it has a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            waiting = [each for each in self.connections if isinstance(each, Connection) and each._answered]
            longest = min(waiting, key=lambda each: each.waits_since or 0.0)
            if longest is self:
                self._refuse(RequestError("too_many_connections", "the server has as many connections as it may have"))
                return
            longest.transport.abort()
            self.connections.discard(longest)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._outside_bodies += len(data)
        try:
            self.parser.feed_data(data)
            if self._reading != "nothing" and self._outside_bodies > HEAD_BYTES:
                raise _head_too_large()
        except httptools.HttpParserUpgrade:
            pass  # it is answered as if the client had not asked for another protocol
        except (httptools.HttpParserError, RequestError) as error:
            cause = error if isinstance(error, RequestError) else error.__context__
            known = cause if isinstance(cause, RequestError) else RequestError("bad_request", f"no HTTP/1.1: {error}")
            self._refuse(known)
            return
        if self._timer is None and (self._reading == "head" or self._idle):
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._outside_bodies = "head", 0

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            raise _head_too_large()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RequestError("bad_request", f"more than {MAX_PIPELINED} requests wait for answers: await them first")
        self._reading, self.waits_since = "body", None
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._outside_bodies = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading = "nothing"
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        pipelined = bool(self.pipeline)
        super().on_response_complete()
        if not pipelined and not self.transport.is_closing():
            self.waits_since = self.loop.time()
            if self._reading == "body":  # of the request that was answered: the rest is read and dropped for a while
                self._stop_timer()
                self._timer = self.loop.call_later(UNREAD_SECONDS, self.transport.close)

    @property
    def _idle(self) -> bool:
        """Whether it has no request, or a part of one's head only."""
        return self._reading != "body" and self._answered

    @property
    def _answered(self) -> bool:
        return not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    def _head_is_late(self) -> None:
        self._timer = None
        if self._reading == "head":
            message = f"the head of the request did not come within {HEAD_SECONDS:g} seconds"
            self._refuse(RequestError("head_too_slow", message))
        elif self._idle:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: RequestError) -> None:
        """Answer what is no request and close the connection, after the answers that it still waits for."""
        self._stop_timer()
        if not self._answered and (self._reading != "body" or self.cycle.response_started or self.pipeline):
            self.cycle.keep_alive = False  # the last one's
            self.flow.pause_reading()
            return
        _log.info("refused a request of %s: %s", self.client[0] if self.client else "a client", error.code)
        answer, content = answer_of(error), encode_json(error_body(error))
        headers = {"content-type": "application/json", "content-length": str(len(content)), **answer.headers}
        headers |= {REQUEST_ID: uuid4().hex, "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[answer.status], lines.encode(), content))
        self.transport.close()


def _head_too_large() -> RequestError:
    return RequestError("head_too_large", f"the line and the headers of the request exceed {HEAD_BYTES} bytes")
