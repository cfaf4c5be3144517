"""Errors as clients see them, and JSON responses."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

KINDS = {401: "authentication_error", 429: "rate_limit_error"}

encode_json = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error: `code` is a stable snake_case word, `param` the field it is about."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(content), status, headers, media_type="application/json")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error_body(error), error.status, error.headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return json_response(error_body(ApiError(error.status_code, code, message)), error.status_code, error.headers)


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client went away in the middle of its body: nobody will read this


async def on_unhandled(request: Request, error: Exception) -> Response:
    """A fault of ours; Starlette raises it again after this answer, and uvicorn logs it and closes the connection."""
    error = ApiError(500, "internal_error", "an internal error; the server's log has it")
    return json_response(error_body(error), error.status, {"connection": "close"})
