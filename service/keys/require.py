"""The door of the keys: who a request is from, and whether it may begin now."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access import access_record
from service.errors import RequestError, answer_of
from service.http import AnswerStatus, error_response, own_path
from service.keys.caller import CALLER
from service.keys.keys import Keys


class RequireKey:
    """Refuses requests without a valid key, or beyond what the key may use, except for the open paths."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str]) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or own_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
            return
        usage = self._keys.unknown
        try:
            caller = self._keys.caller(Headers(scope=scope).get("authorization", ""))
            access_record(Request(scope)).key = caller.id
            usage = caller.usage
            usage.enter()
        except RequestError as error:
            usage.count(answer_of(error).status)
            await error_response(error)(scope, receive, send)
            return
        scope[CALLER], answer = caller, AnswerStatus(send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            usage.leave(answer.status)
