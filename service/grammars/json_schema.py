"""The grammar of a JSON schema, or the place of the keyword that cannot be followed."""

import json
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import msgspec
from llguidance import LLMatcher

from service.grammars.equivalents import equivalent, original_place
from service.grammars.source import InvalidGrammar

PLACE_SECONDS = 0.5  # for finding where in a schema a fault is
# Between the parts of a JSON text; without a bound a model may write spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}
OPTIONS = "x-guidance"  # a keyword by which a schema sets the compiler's options, of which some are not exact
MAX_NUMBER = 2**53  # the compiler computes with floats
MAX_DIGITS = 15
ANNOTATIONS = ("default", "examples", "example")
NOT_APART = (
    "a value might fit two of these schemas: give each a type of its own, constants of its own, or objects with a "
    "required property whose constant tells them apart; or send anyOf"
)
# The keywords of a JSON schema that hold several schemas
HOLDERS = ("$defs", "definitions", "properties", "patternProperties", "anyOf", "oneOf", "allOf", "prefixItems")


def of_schema(field: str, content: Any) -> str:
    """The grammar of a JSON schema. Raises InvalidGrammar naming the keyword."""
    try:
        return _of_schema(field, content)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(field, str(error)) from None


def _of_schema(field: str, content: Any) -> str:
    schema = _read(content) if isinstance(content, str) else content
    if schema is False:
        raise ValueError("the schema false allows no value")
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object, true or false")
    _check_numbers(field, schema)
    without_options = {key: value for key, value in schema.items() if key != OPTIONS}
    given, schema = schema, equivalent(without_options)
    if (fault := _fault(schema)) is not None:
        found = original_place(given, _place(schema, fault, time.monotonic() + PLACE_SECONDS))
        place = "".join(f"/{part}" for part in found)
        raise InvalidGrammar(f"{field}{place and ' at '}{place}", fault)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)


def _read(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"a string must hold a JSON schema as JSON: {error}") from None


def _check_numbers(field: str, schema: dict[str, Any]) -> None:
    """Raise InvalidGrammar for a number that the compiler would round."""
    for place, number in _numbers(schema):
        fault = None
        digits = Decimal(repr(number)).normalize().as_tuple().digits
        if abs(number) > MAX_NUMBER:
            fault = f"{number} is not exact: numbers of a schema go to {MAX_NUMBER} and down to its negative"
        elif isinstance(number, float) and len(digits) > MAX_DIGITS:
            fault = f"{number} is not exact: numbers with a point have at most {MAX_DIGITS} digits"
        if fault is not None:
            raise InvalidGrammar(f"{field} at /{'/'.join(place)}", fault)


def _numbers(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int | float]]:
    """Each number of a JSON value and its place, but those of annotations."""
    if isinstance(value, int | float) and not isinstance(value, bool) and place:
        yield place, value
    elif isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            if key not in ANNOTATIONS or isinstance(entry, dict):  # a dict may be the schema of a property so named
                yield from _numbers(entry, (*place, str(key)))


def _fault(schema: Any) -> str | None:
    """Why a JSON schema cannot be followed."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        fault = messages[0].strip() if failed else None
    except ValueError as error:
        fault = str(error)
    return NOT_APART if fault is not None and "coerce_one_of" in fault else fault


def _place(schema: Any, fault: str, deadline: float) -> list[str]:
    """Where a fault of a schema is: the keyword without which there is none, or another one; empty if not found.

    The compiler tells its reason, and seldom the place.
    """
    place: list[str] = []
    inner = schema
    while isinstance(inner, dict):
        for path in _parts(inner):
            if time.monotonic() > deadline:
                return place
            if _fault(_without(schema, [*place, *path])) != fault:
                place += path
                break
        else:
            return place
        inner = inner[path[0]] if len(path) == 1 else _entry(inner[path[0]], path[1])
    return place


def _parts(schema: dict[str, Any]) -> Iterator[list[str]]:
    """The places of the schemas inside one, then of its other keywords, then of those that hold schemas."""
    holders = [key for key in HOLDERS if isinstance(schema.get(key), dict | list)]
    for key in holders:
        held = schema[key]
        for entry in held if isinstance(held, dict) else range(len(held)):
            yield [key, str(entry)]
    others = [key for key in schema if key not in holders]
    yield from ([key] for key in sorted(others, key="type".__eq__))  # last: without it other types hide the fault
    yield from ([key] for key in holders)


def _entry(holder: Any, key: str) -> Any:
    return holder[key] if isinstance(holder, dict) else holder[int(key)]


def _without(schema: Any, path: Sequence[str]) -> Any:
    """A copy without one keyword, or with one of the schemas inside it replaced, so that all others keep their places.

    An alternative allows nothing then, and any other schema everything: neither makes the others unimportant.
    """
    key, *rest = path
    if not rest:
        return {name: value for name, value in schema.items() if name != key}
    if key not in HOLDERS:
        return {**schema, key: _without(schema[key], rest)}
    entry, *deeper = rest
    nothing: Any = False if key in ("anyOf", "oneOf") else {}
    changed = _without(_entry(schema[key], entry), deeper) if deeper else nothing
    if isinstance(schema[key], dict):
        return {**schema, key: {**schema[key], entry: changed}}
    return {**schema, key: [changed if str(at) == entry else each for at, each in enumerate(schema[key])]}
