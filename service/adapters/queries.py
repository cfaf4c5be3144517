"""Queries, conditional headers and names of the adapter routes, whose paths write a name as `{name:adapter}`."""

import re
import string
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request

from service.catalog.record import NAME_PATTERN, Condition, OnMissing
from service.errors import RequestError
from service.keys.caller import Caller

ON_MISSING = (
    "of an aLoRA: what to do for a prompt without its invocation if the request does not say; left out: keep the "
    "default of the name, else of the server"
)
_NAME = re.compile(NAME_PATTERN)
_CHARACTERS = frozenset(f"{string.ascii_letters}{string.digits}._-/@:")
_ETAG = re.compile(r'"[^"]*"|\*')
IF_MATCH = rf"\s*({_ETAG.pattern})\s*(,\s*({_ETAG.pattern})\s*)*,?"


class AdapterName(Convertor[str]):
    """A name in a path, slashes included. Starlette's own `path` would let it end in a line feed and cut that off."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("adapter", AdapterName())


class PutQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pin: Annotated[
        bool | None, Meta(description="pin it to the device, or unpin it; left out: keep the pin of the name")
    ] = None
    preload: Annotated[bool, Meta(description="load it to the device at once")] = True
    ephemeral: Annotated[bool, Meta(description="keep it in memory only")] = False
    alora_on_missing: Annotated[OnMissing | None, Meta(description=ON_MISSING)] = None


class DeleteQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: Annotated[bool, Meta(description="end the requests that run on it")] = False


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    wait: Annotated[bool, Meta(description="false: answer 202 at once; the resource shows the progress")] = True


class ImportQuery(WaitQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `POST /adapters`: with a name and a source it needs no body, as in SageMaker's containers."""

    name: Annotated[str | None, Meta(description="instead of a body: the adapter's name")] = None
    src: Annotated[str | None, Meta(description="instead of a body: its source")] = None
    preload: Annotated[bool | None, Meta(description="without a body: load it to the device at once")] = None
    pin: Annotated[bool | None, Meta(description="without a body: pin it to the device, or unpin it")] = None


def read_condition(request: Request) -> Condition:
    """The condition in If-Match and If-None-Match. Raises RequestError `invalid_header`."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match not in (None, "*"):
        raise RequestError("invalid_header", "If-None-Match must be *", "If-None-Match")
    if match is None:
        return Condition(None, none_match is not None)
    if not re.fullmatch(IF_MATCH, match):
        raise RequestError("invalid_header", "If-Match must be * or digests in double quotes", "If-Match")
    digests = frozenset(tag.strip('"') for tag in _ETAG.findall(match))
    return Condition(digests, none_match is not None)


def new_name(name: str, base: str, caller: Caller) -> str:
    """Check the name of a new adapter of a caller; `base` is the name of the base model. Raises RequestError."""
    if not _NAME.match(name):
        strange = next((character for character in name if character not in _CHARACTERS), None)
        message = (
            "name must be 1 to 128 letters, digits, '.', '_' or '-', or several such words joined by '/', '@' or ':', "
            "each of which begins with a letter or a digit"
        )
        if strange is not None:
            message += f"; it has {'a space' if strange == ' ' else repr(strange)}"
        raise RequestError("invalid_name", message, "name")
    if name == base:
        raise RequestError("name_is_base_model", f"{name!r} is the base model's name", "name")
    if not caller.sees(name):
        message = f"the name {name!r} does not begin with {caller.adapter_prefix!r}, as those of this key do"
        raise RequestError("name_outside_prefix", message, "name")
    return name
