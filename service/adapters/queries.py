"""What calls on adapters carry besides a body: the query, the conditions in the headers, the name."""

import re
from typing import TypeVar

import msgspec
from starlette.requests import Request

from service.catalog.record import NAME_PATTERN, Condition
from service.responses import ApiError

_T = TypeVar("_T")
_NAME = re.compile(NAME_PATTERN)
_ETAGS = re.compile(r'\s*("[^"]*"|\*)\s*(?:,|$)')


class PutQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pin` left out keeps what the name has."""

    pin: bool | None = None
    preload: bool = True
    ephemeral: bool = False


class DeleteQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: bool = False


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`wait` false answers at once, with 202; the resource tells the rest."""

    wait: bool = True


class NoQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def read_query(request: Request, kind: type[_T]) -> _T:
    """The query as a Struct of booleans; ApiError 400 for an unknown name, a repeated one or another value."""
    query = request.query_params
    for name, _ in query.multi_items():
        if len(query.getlist(name)) > 1:
            raise ApiError(400, "invalid_query", f"the query has {name!r} more than once", name)
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        place = re.search(r"unknown field `(.*)`|at `\$\.(.*)`", str(error))
        param = (place[1] or place[2]) if place else None
        raise ApiError(400, "invalid_query", f"the query is not accepted: {error}", param) from None


def read_condition(request: Request) -> Condition:
    """What If-Match and If-None-Match demand of the name. Raises ApiError 400."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match not in (None, "*"):
        raise ApiError(400, "invalid_header", "If-None-Match must be *", "If-None-Match")
    if match is None:
        return Condition(None, none_match is not None)
    if not re.fullmatch(f"(?:{_ETAGS.pattern})+", match):
        raise ApiError(400, "invalid_header", "If-Match must be * or digests in double quotes", "If-Match")
    digests = frozenset(tag.strip('"') for tag in _ETAGS.findall(match))
    return Condition(digests, none_match is not None)


def new_name(request: Request, name: str) -> str:
    """A name that an adapter may have. Raises ApiError 400, or 409 for the base's."""
    if not _NAME.match(name):
        message = "name must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or a digit"
        raise ApiError(400, "invalid_name", message, "name")
    if name == request.app.state.settings.served_name:
        raise ApiError(409, "name_is_base_model", f"{name!r} is the base model's name", "name")
    return name
