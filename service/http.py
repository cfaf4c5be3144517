"""Reading requests and writing responses: JSON bodies, queries, errors, a client that goes away."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Message, Scope, Send

from service.door.bodies import Bodies
from service.errors import RequestError, answer_of, error_body, request_error
from storage.store import StoreError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FLOAT_FOR_INTEGER = re.compile(r"Expected `[^`]*\bint\b[^`]*`, got `float`")
REQUEST_ID = "x-request-id"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody reads it
encode_json = msgspec.json.Encoder().encode


class NoQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of a call that takes none."""


def own_path(scope: Scope) -> str:
    """The path of a request, below the place where another application may have mounted this one."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(content), status, headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    answer = answer_of(error)
    return json_response(error_body(error), answer.status, answer.headers)


async def read_json(request: Request, kind: type[T], bodies: Bodies) -> T:
    """The body as a Struct. Raises RequestError as `Bodies.read` and `decode_json` do."""
    return decode_json(await read_body(request, bodies), kind)


async def read_body(request: Request, bodies: Bodies) -> bytes:
    """The body. Raises RequestError as `Bodies.read` does."""
    return await bodies.read(request.stream())


def decode_json(body: bytes, kind: type[T]) -> T:
    """Decode a body; 5.0 stands for 5 where an integer is expected. Raises RequestError with the field as its param."""
    try:
        return _decoded(body, kind)
    except msgspec.ValidationError as error:
        raise _refused(kind, str(error), lambda: _value(body)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse_syntax(body, str(error))
    except RecursionError:
        raise RequestError("invalid_json", "the body is nested too deeply") from None


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        if not _FLOAT_FOR_INTEGER.match(str(error)):
            raise
    msgspec.json.decode(body)  # which says where a number is too large for a float
    return msgspec.convert(_integral.decode(body), kind)


def _number(text: str) -> int | float:
    """A number with a point or an exponent, as an integer if it is one."""
    value = float(text)
    return int(value) if value.is_integer() else value


_integral = msgspec.json.Decoder(float_hook=_number)


def read_query(request: Request, kind: type[T]) -> T:
    """The query as a Struct of booleans and words. Raises RequestError for an unknown name, a repeated or bad one."""
    query = request.query_params
    for name, _ in query.multi_items():
        if len(query.getlist(name)) > 1:
            raise RequestError("invalid_query", f"the query has {name!r} more than once", name)
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        refused = _refused(kind, str(error), lambda: dict(query))
        raise RequestError("invalid_query", f"the query is not accepted: {refused.message}", refused.param) from None


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work of a request whose body has been read; cancel it when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    with suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def on_error(request: Request, error: Exception) -> Response:
    """Answer an exception that `request_error` knows; any other one is a fault of ours.

    What concerns the store is logged: its clients cannot mend it, and are not told what is where.
    """
    known = request_error(error)
    if known is None:
        raise error
    if isinstance(error, StoreError | OSError):
        _log.error("%s %.200r: %s", request.method, request.url.path, error)
    return error_response(known)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer Starlette's own refusals: an unknown path, or a known one with another method.

    OPTIONS is answered for every known path. Starlette's Allow has the methods of one route only.
    """
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    code, said = "bad_request", str(error.detail)
    if error.status_code == 404:
        code, said = "not_found", "there is no such call: GET /openapi.json has them all"
    elif error.status_code == 405:
        methods = sorted(_methods(request) - {"HEAD", "OPTIONS"})
        code, said = "method_not_allowed", f"the method is not allowed here: expected {' or '.join(methods)}"
    body = error_body(RequestError(code, f"{request.method} {request.url.path}: {said}"))
    return json_response(body, error.status_code, headers)


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    """Answer a client that went away in the middle of its body."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_unhandled(request: Request, error: Exception) -> Response:
    """Answer a fault of ours. Starlette raises it again after that, and uvicorn logs it."""
    return error_response(RequestError("internal_error", "an internal error; the server's log has it"))


def _methods(request: Request) -> set[str]:
    """The methods of a path."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {"OPTIONS"}.union(*(route.methods or () for route in matching))


def _refused(kind: Any, reason: str, sent: Callable[[], Any]) -> RequestError:
    """Translate msgspec's "Expected `int`, got `str` - at `$.max_tokens`"; `sent` gives what was sent, if need be."""
    complaint, _, place = reason.partition(" - at `$")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", complaint)
    missing = re.fullmatch(r"Object missing required field `(.*)`", complaint)
    path = place.rstrip("`").lstrip(".")
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError("missing_field", f"{param} is required", param)
    if unknown:
        param = f"{path}.{unknown[1]}" if path else unknown[1]
        fields = ", ".join(getattr(kind, "__struct_encode_fields__", ())) or "none"
        message = f"{param} is not known here" + ("" if path else f": expected {fields}")
        return RequestError("unknown_field", message, param)
    complaint = complaint.replace("`", "")
    if complaint.startswith(("Invalid enum value", "Invalid value")):
        steps = re.findall(r"[^.\[\]]+", path)
        choices = dict.fromkeys(_choices(msgspec.inspect.type_info(kind), steps, sent()))
        complaint += f", expected one of {', '.join(map(str, choices))}"
    return RequestError("invalid_field", f"{path or 'the body'}: {complaint}", path or None)


def _value(body: bytes) -> Any:
    """What a body has; None if what comes after the complaint is broken."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(body)
    return None


def _choices(place: msgspec.inspect.Type, steps: Sequence[str], value: Any) -> Iterator[Any]:
    """The values of the Literal, or the tags of Structs, that `steps` lead to from a type: fields and indices.

    `value` is what the client sent there; its tags say which Structs it is.
    """
    if isinstance(place, msgspec.inspect.Metadata):
        yield from _choices(place.type, steps, value)
    elif isinstance(place, msgspec.inspect.UnionType):
        for each in place.types:
            yield from _choices(each, steps, value)
    elif isinstance(place, msgspec.inspect.LiteralType) and not steps:
        yield from place.values
    elif isinstance(place, msgspec.inspect.ListType) and steps:
        yield from _choices(place.item_type, steps[1:], _inside(value, steps[0]))
    elif isinstance(place, msgspec.inspect.StructType) and steps == [place.tag_field]:
        yield place.tag
    elif isinstance(place, msgspec.inspect.StructType) and steps:
        if isinstance(value, dict) and value.get(place.tag_field, place.tag) != place.tag:
            return
        for field in place.fields:
            if field.encode_name == steps[0]:
                yield from _choices(field.type, steps[1:], _inside(value, steps[0]))


def _inside(value: Any, step: str) -> Any:
    """What is at a field or an index; None where a path does not tell which."""
    if isinstance(value, dict):
        return value.get(step)
    return value[int(step)] if isinstance(value, list) and step.isdigit() else None


def _refuse_syntax(body: bytes, reason: str) -> NoReturn:
    """Say where the JSON is broken, and in which field: clients send NaN and Infinity, which JSON does not have.

    Other things than JSON are named by how they begin: forms, XML, what was compressed.
    """
    if not (begun := body.lstrip(b" \t\r\n")[:12]):
        raise RequestError("invalid_json", "the body is empty: send a JSON object")
    if not begun.startswith(b"{"):
        shown = repr(begun)[1:]
        message = f"the body is not valid JSON: it begins with {shown}, expected a JSON object that is not compressed"
        raise RequestError("invalid_json", message)
    try:
        body.decode()
    except UnicodeDecodeError as error:  # msgspec counts from the beginning of the text that it is in
        reason = f"it is not UTF-8: {error.reason} (byte {error.start})"
    place = re.search(r"\(byte (\d+)\)", reason)
    keys = re.findall(rb'"([A-Za-z_][A-Za-z0-9_]{0,63})"\s*:\s*"?[^",{}]*$', body[: int(place[1])]) if place else []
    param = keys[-1].decode() if keys else None
    where = f" (in the value of {param})" if param else ""
    raise RequestError("invalid_json", f"the body is not valid JSON: {reason}{where}", param)


class AnswerStatus:
    """A request's `send`, which notes the status of the answer; unless one begins, the client went away."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = CLIENT_CLOSED_REQUEST

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
