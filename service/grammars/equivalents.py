"""A JSON schema in words that the compiler follows, which allow the same values.

`oneOf` becomes `anyOf` where no value can fit two of its branches, as far as that is shown by types, by constants,
and by properties that objects must have. A `format` that no draft of JSON Schema defines says nothing about a value.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

FORMATS = {
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
    *("uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
    *("relative-json-pointer", "regex", "color"),
}
# The keywords whose value is a schema, a list of schemas, and schemas by name
ONE = {
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties"),
}
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
MAX_LOOKS = 10_000  # pairs of schemas that are compared
MAX_DEPTH = 8  # of references and properties that are followed

KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})


def equivalent(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or what allows the same values."""
    whole = _Document(schema)
    rewritten = whole.rewritten(schema)
    assert isinstance(rewritten, dict)
    return rewritten


def original_place(schema: Any, place: Sequence[str]) -> list[str]:
    """Where a place of the rewritten schema is in the given one."""
    found = []
    for part in place:
        name = "oneOf" if part == "anyOf" and isinstance(schema, dict) and "anyOf" not in schema else part
        found.append(name)
        if isinstance(schema, list):
            schema = schema[int(name)]
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return found


class _Document:
    """A schema to whose parts references lead."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._looks = MAX_LOOKS
        self._names_branches = any("/oneOf/" in target for target in _references(schema))  # which must stay

    def rewritten(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        found = dict(schema)
        for key, value in schema.items():
            if key in LISTS and isinstance(value, list):
                found[key] = [self.rewritten(each) for each in value]
            elif key in ONE:
                found[key] = self.rewritten(value)
            elif key in MAPS and isinstance(value, dict):
                found[key] = {name: self.rewritten(each) for name, each in value.items()}
        if isinstance(found.get("format"), str) and found["format"] not in FORMATS:
            del found["format"]
        if self._is_any_of(schema):
            found = {"anyOf" if key == "oneOf" else key: value for key, value in found.items()}
            found.pop("discriminator", None)  # OpenAPI's, about the branches
        return found

    def _is_any_of(self, schema: dict[str, Any]) -> bool:
        """Whether its `oneOf` allows what `anyOf` would."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list) or "anyOf" in schema or self._names_branches:
            return False
        around = {key: value for key, value in schema.items() if key != "oneOf"}
        return all(self._apart([around, one], [around, other], MAX_DEPTH) for one, other in combinations(branches, 2))

    def _apart(self, one: Sequence[Any], other: Sequence[Any], depth: int) -> bool:
        """Whether no value fits all schemas of the one list and all of the other; False if that is not shown."""
        self._looks -= 1
        if depth == 0 or self._looks < 0:
            return False
        first, second = self._views(one, depth), self._views(other, depth)
        if False in first or False in second:
            return True
        some, others = _kinds(first), _kinds(second)
        if not some & others:
            return True
        values, other_values = _values(first), _values(second)
        if values is not None and other_values is not None and not values & other_values:
            return True
        for views, against in ((first, other), (second, one)):
            for view in views:
                ways = view.get("anyOf", view.get("oneOf"))
                if isinstance(ways, list) and all(self._apart([way], against, depth - 1) for way in ways):
                    return True
        return some == others == {"object"} and self._differ_in_a_property(first, second, depth)

    def _differ_in_a_property(self, first: Sequence[Any], second: Sequence[Any], depth: int) -> bool:
        shared = _required(first) & _required(second)
        return any(
            self._apart(_of_property(first, name), _of_property(second, name), depth - 1) for name in sorted(shared)
        )

    def _views(self, schemas: Sequence[Any], depth: int) -> list[Any]:
        """The schemas, and all others that a value of all of them fits as well; {} for true."""
        found: list[Any] = []
        rest = [(schema, depth) for schema in schemas]
        while rest:
            schema, left = rest.pop()
            if schema is False:
                return [False]
            if not isinstance(schema, dict) or left == 0:
                continue
            found.append(schema)
            if isinstance(schema.get("allOf"), list):
                rest += ((each, left - 1) for each in schema["allOf"])
            if isinstance(target := schema.get("$ref"), str):
                rest.append((self._referred(target), left - 1))
        return found

    def _referred(self, target: str) -> Any:
        """What a reference within the document leads to; {} for others."""
        found: Any = self._schema
        if not target.startswith("#"):
            return {}
        for part in target[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return {} if found is None else found


def _references(value: Any) -> Iterator[str]:
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if isinstance(target := value.get("$ref"), str):
                yield target
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def _kinds(views: Sequence[Any]) -> frozenset[str]:
    """The kinds of value that may fit all."""
    found = KINDS
    for view in views:
        asked = view.get("type")
        names = [asked] if isinstance(asked, str) else asked
        if isinstance(names, list):
            found &= {"number" if name == "integer" else name for name in names if isinstance(name, str)}
        if (values := _constants(view)) is not None:
            found &= {_kind(value) for value in values}
    return found


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "number", float: "number", list: "array"}
    return kinds.get(type(value), "object")


def _constants(view: dict[str, Any]) -> list[Any] | None:
    if "const" in view:
        return [view["const"]]
    return view["enum"] if isinstance(view.get("enum"), list) else None


def _values(views: Sequence[Any]) -> frozenset[str] | None:
    """The only values that may fit all, as texts; None if any may."""
    found: frozenset[str] | None = None
    for view in views:
        if (values := _constants(view)) is not None:
            texts = frozenset(json.dumps(_plain(value), sort_keys=True) for value in values)
            found = texts if found is None else found & texts
    return found


def _plain(value: Any) -> Any:
    """A value in which 1.0 is 1, as JSON Schema has it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _required(views: Sequence[Any]) -> set[str]:
    asked = [view["required"] for view in views if isinstance(view.get("required"), list)]
    return {name for names in asked for name in names if isinstance(name, str)}


def _of_property(views: Sequence[Any], name: str) -> list[Any]:
    held = [view["properties"] for view in views if isinstance(view.get("properties"), dict)]
    return [properties[name] for properties in held if name in properties]
