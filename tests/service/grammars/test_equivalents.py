"""Rewritten schemas allow the same values: jsonschema judges both, on values near the constants of a schema."""

import json
import random
from typing import Any

import jsonschema
import pytest

from service.grammars.equivalents import equivalent, original_place

VALUES: list[Any] = [None, True, False, 0, 1, 1.0, 2, 2.5, "a", "b", "", [], [1], {}, {"k": "a"}, {"k": "b"}, {"k": 1}]
VALUES += [
    {"k": "a", "m": 1},
    {"m": 1},
    {"k": {"k": "a"}},
    {"k": {"k": "b"}},
    {"k": "a", "m": "b"},
    [True],
    {"k": None},
]
REFERRED = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}


def branch(rng: random.Random, depth: int = 0) -> Any:
    kinds = ("null", "boolean", "integer", "number", "string", "array", "object")
    made: dict[str, Any] = {}
    for keyword in rng.sample(("type", "const", "enum", "properties", "required", "allOf", "$ref", "anyOf"), 3):
        match keyword:
            case "type":
                made["type"] = rng.choice([rng.choice(kinds), rng.sample(kinds, 2)])
            case "const":
                if rng.random() < 0.5:
                    made["const"] = rng.choice(VALUES)
            case "enum":
                if rng.random() < 0.5:
                    made["enum"] = rng.sample(VALUES, 2)
            case "properties" if depth < 2:
                made |= {"properties": {name: branch(rng, depth + 1) for name in rng.sample("km", 1)}}
                made |= {"type": "object"} if rng.random() < 0.7 else {}
            case "required":
                made["required"] = rng.sample("km", rng.randint(1, 2))
            case "allOf" | "anyOf" if depth < 2 and rng.random() < 0.3:
                made[keyword] = [branch(rng, depth + 1) for _ in range(2)]
            case "$ref" if rng.random() < 0.3:
                made["$ref"] = "#/$defs/a~0b"
    return made if rng.random() < 0.95 else rng.choice([True, False])


def allows(schema: Any, value: Any) -> bool:
    valid: bool = jsonschema.Draft202012Validator(schema).is_valid(value)
    return valid


@pytest.mark.parametrize("group", range(3))
def test_a_rewritten_schema_allows_the_same_values(group: int) -> None:
    rewritten = 0
    for seed in range(group * 200, group * 200 + 200):
        rng = random.Random(seed)
        around = branch(rng)  # holds for the branches too
        schema = {
            **(around if isinstance(around, dict) and rng.random() < 0.3 else {}),
            "oneOf": [branch(rng) for _ in range(rng.choice((2, 2, 3)))],
            "$defs": {"a~b": REFERRED},
        }
        changed = equivalent(schema)
        rewritten += "oneOf" not in changed
        for value in VALUES:
            assert allows(schema, value) == allows(changed, value), (schema, value)
    assert rewritten > 20


def objects(*constants: str, required: bool = True) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"type": "object", "properties": {"k": {"const": each}}} for each in constants]
    return [{**each, "required": ["k"]} if required else each for each in made]


@pytest.mark.parametrize(
    ("branches", "apart"),
    [
        ([{"const": 1}, {"const": 2}, {"enum": [3, "a"]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"enum": [1, 2]}, {"enum": [2, 3]}], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": ["null", "string"]}, {"type": "integer"}], True),
        ([{"type": "string"}, {"enum": [1, None]}], True),
        (objects("a", "b", "c"), True),
        (objects("a", "b", required=False), False),
        ([{**each, "type": ["object", "null"]} for each in objects("a", "b")], False),
        ([{"allOf": [each, {"maxProperties": 3}]} for each in objects("a", "b")], True),
        ([{"anyOf": objects("a", "b")}, *objects("c")], True),
        ([{"anyOf": objects("a", "b")}, *objects("b")], False),
        ([{"minimum": 0}, {"maximum": 5}], False),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], False),
        ([{"$ref": "#/$defs/endless"}, {"$ref": "#/$defs/a"}], False),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_branches_are_told_apart_by_types_constants_and_required_properties(branches: list[Any], apart: bool) -> None:
    definitions = dict(zip(("a", "b"), objects("a", "b"), strict=True)) | {"endless": {"$ref": "#/$defs/endless"}}
    schema = {"$defs": definitions, "properties": {"p": {"items": {"oneOf": branches}}}, "const": {"oneOf": [1]}}
    changed = equivalent(schema)
    held = changed["properties"]["p"]["items"]
    assert held == {"anyOf" if apart else "oneOf": branches}
    assert changed["const"] == schema["const"]


def test_a_place_of_the_rewritten_schema_is_found_in_the_given_one() -> None:
    schema = {"properties": {"a": {"oneOf": [{"const": 1}, {"anyOf": [{"type": "string"}]}]}}}
    place = ["properties", "a", "anyOf", "1", "anyOf", "0", "type"]
    assert "anyOf" in equivalent(schema)["properties"]["a"]
    assert original_place(schema, place) == ["properties", "a", "oneOf", "1", "anyOf", "0", "type"]


def test_what_refers_to_a_branch_keeps_it() -> None:
    schema = {"oneOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/oneOf/0"}}]}
    assert equivalent(schema) == schema


def test_many_branches_are_compared_in_bounded_time() -> None:
    branches = [{"type": "object", "allOf": [{"anyOf": objects(*"abcdefgh")}] * 4}] * 60
    schema = {"oneOf": branches}
    assert equivalent(schema) == schema


def test_a_format_that_nobody_defines_is_left_out() -> None:
    schema = {"properties": {"format": {"type": "string", "format": "password"}, "b": {"format": "iri"}}}
    changed = equivalent(schema)
    assert changed == {"properties": {"format": {"type": "string"}, "b": {"format": "iri"}}}
