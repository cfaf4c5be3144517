"""What every request passes: the API key, and the id that its answer carries."""

import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.responses import ApiError, error_body, json_response

REQUEST_ID = "x-request-id"
PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")


class RequireKey:
    """Refuses requests without the API key, whatever they are for, except for the open paths."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]):
        self._app, self._key, self._open_paths = app, key.encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs an API key: send it as `Authorization: Bearer KEY`"
        error = ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        await json_response(error_body(error), error.status, error.headers)(scope, receive, send)

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
