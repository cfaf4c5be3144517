"""Errors as clients see them, and JSON responses."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

encode_json = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer that is an error: `code` is a stable snake_case word, `param` the field it is about."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(content), status, headers, media_type="application/json")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error_body(error), error.status, error.headers)
