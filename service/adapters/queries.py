"""What calls on adapters carry besides a body: the query, the conditions in the headers, the name."""

import re

import msgspec
from starlette.requests import Request

from service.catalog.record import NAME_PATTERN, Condition
from service.errors import RequestError

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


def read_condition(request: Request) -> Condition:
    """What If-Match and If-None-Match demand of the name. Raises RequestError 400."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match not in (None, "*"):
        raise RequestError("invalid_header", "If-None-Match must be *", "If-None-Match")
    if match is None:
        return Condition(None, none_match is not None)
    if not re.fullmatch(f"(?:{_ETAGS.pattern})+", match):
        raise RequestError("invalid_header", "If-Match must be * or digests in double quotes", "If-Match")
    digests = frozenset(tag.strip('"') for tag in _ETAGS.findall(match))
    return Condition(digests, none_match is not None)


def new_name(name: str, base: str) -> str:
    """A name that an adapter may have; `base` is the base model's. Raises RequestError."""
    if not _NAME.match(name):
        message = "name must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or a digit"
        raise RequestError("invalid_name", message, "name")
    if name == base:
        raise RequestError("name_is_base_model", f"{name!r} is the base model's name", "name")
    return name
