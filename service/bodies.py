"""JSON bodies of requests, read within a limit and decoded into Structs."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import Request

from service.responses import ApiError

T = TypeVar("T")


async def read_json(request: Request, kind: type[T], max_bytes: int) -> T:
    """The body as a Struct. Raises ApiError: 413 for one over the limit, 400 naming the field for a wrong one."""
    return decode_json(await read_body(request, max_bytes), kind)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, counted while it comes in: a client may announce any length, or none."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise ApiError(413, "body_too_large", f"the body is larger than the limit of {max_bytes} bytes")
    return bytes(body)


def decode_json(body: bytes, kind: type[T]) -> T:
    """Decode a body. Raises ApiError 400, whose param is the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _refuse_type(kind, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse_syntax(body, str(error))
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None


def _refuse_type(kind: Any, reason: str) -> NoReturn:
    """Translate msgspec's "Expected `int`, got `str` - at `$.max_tokens`"."""
    complaint, _, place = reason.partition(" - at `$")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", complaint)
    missing = re.fullmatch(r"Object missing required field `(.*)`", complaint)
    path = place.rstrip("`").lstrip(".")
    if missing:
        param = f"{path}.{missing[1]}" if path else missing[1]
        raise ApiError(400, "missing_field", f"{param} is required", param)
    if unknown:
        param = f"{path}.{unknown[1]}" if path else unknown[1]
        raise ApiError(400, "unknown_field", f"{param} is not a field of this request", param)
    complaint = complaint.replace("`", "")
    if complaint.startswith("Invalid enum value"):
        choices = _choices(msgspec.inspect.type_info(kind), re.findall(r"[^.\[\]]+", path))
        complaint += f", expected one of {', '.join(map(str, choices))}"
    raise ApiError(400, "invalid_field", f"{path or 'the body'}: {complaint}", path or None)


def _choices(place: msgspec.inspect.Type, steps: Sequence[str]) -> Iterator[Any]:
    """The values of the Literal that `steps`, names of fields and indices, lead to from a type."""
    if isinstance(place, msgspec.inspect.UnionType):
        for each in place.types:
            yield from _choices(each, steps)
    elif isinstance(place, msgspec.inspect.LiteralType) and not steps:
        yield from place.values
    elif isinstance(place, msgspec.inspect.ListType) and steps:
        yield from _choices(place.item_type, steps[1:])
    elif isinstance(place, msgspec.inspect.StructType) and steps:
        for field in place.fields:
            if field.encode_name == steps[0]:
                yield from _choices(field.type, steps[1:])


def _refuse_syntax(body: bytes, reason: str) -> NoReturn:
    """Say where the JSON is broken, and in which field: NaN and Infinity are no JSON, but clients send them."""
    place = re.search(r"\(byte (\d+)\)", reason)
    keys = re.findall(rb'"([A-Za-z_][A-Za-z0-9_]{0,63})"\s*:\s*[^",{}]*$', body[: int(place[1])]) if place else []
    param = keys[-1].decode() if keys else None
    where = f" (in the value of {param})" if param else ""
    raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}{where}", param)
