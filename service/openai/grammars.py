"""What an answer must look like, in the dialects of OpenAI, vLLM and SGLang, as a grammar for the engine."""

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache
from typing import Any, NamedTuple

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from

from service.errors import RequestError
from service.openai.schemas import GenerationRequest, JsonObject, JsonSchema, StructuredOutputs

MAX_GRAMMAR_BYTES = 256 << 10
CHECK_SECONDS = 10.0
PLACE_SECONDS = 0.5  # for finding where in a schema a fault is
KEPT = 256  # grammars that were found good
# Between the parts of a JSON text; without a bound a model may write spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}
MAX_NUMBER = 2**53  # the compiler computes with floats, and ends the process at an integer of -2**63 and below
MAX_DIGITS = 15
MAX_LEVELS = 2500  # that references may lead down; the compiler's stack has room for about thrice as many
MAX_RULES = 500  # lines of a grammar, for the same reason
MAX_STEPS = 20_000  # states of the automaton that counts multiples; a hundred times as many take minutes
ANNOTATIONS = ("default", "examples", "example")
# The keywords of a JSON schema that hold several schemas
HOLDERS = ("$defs", "definitions", "properties", "patternProperties", "anyOf", "oneOf", "allOf", "prefixItems")


class Source(NamedTuple):
    """Where a grammar comes from."""

    field: str
    kind: str  # as llguidance names it
    content: Any  # a JSON schema, a list of choices, or text


class Grammars:
    """Translates and checks the grammars of requests, on threads, and remembers those that it found good."""

    def __init__(self) -> None:
        self._good: OrderedDict[bytes, str] = OrderedDict()  # the least recently used first

    async def of(self, body: GenerationRequest) -> str | None:
        """The grammar that a request asks for, if any. Raises RequestError naming the field."""
        source = source_of(body)
        return None if source is None else await self.translate(source)

    async def translate(self, source: Source) -> str:
        """A grammar that the engine can compile. Raises RequestError naming the field and what is wrong with it."""
        key = msgspec.json.encode((source.kind, source.content))
        if len(key) > MAX_GRAMMAR_BYTES:
            message = f"{source.field} has {len(key)} bytes; at most {MAX_GRAMMAR_BYTES} are taken"
            raise RequestError("invalid_grammar", message, source.field)
        grammar = self._good.get(key)
        if grammar is None:
            try:
                grammar = await asyncio.wait_for(asyncio.to_thread(_translate, source), CHECK_SECONDS)
            except TimeoutError:
                message = f"{source.field} takes longer than {CHECK_SECONDS:.0f} s to check: make it simpler"
                raise RequestError("invalid_grammar", message, source.field) from None
            self._good[key] = grammar
            if len(self._good) > KEPT:
                self._good.popitem(last=False)
        self._good.move_to_end(key)
        return grammar


class ThoughtTokens(NamedTuple):
    """The tokens around a model's thoughts, by id."""

    begin: int
    end: int
    eos: int | None  # which no thought contains


def after_thoughts(grammar: str, tokens: ThoughtTokens, *, inside: bool) -> str:
    """A grammar for an answer whose form begins after the thoughts; `inside` if the prompt has begun them."""
    others = f"<[^{tokens.end}{'' if tokens.eos is None else f',{tokens.eos}'}]>"
    thoughts = f"{others}* <[{tokens.end}]> /[ \\t\\r\\n]{{0,8}}/"
    start = thoughts if inside else f"(<[{tokens.begin}]> {thoughts})?"
    is_json = grammar.lstrip().startswith("{")
    form = msgspec.json.decode(grammar) if is_json else {"grammars": [{"lark_grammar": grammar}]}
    body, *rest = form["grammars"]
    grammars = [{"lark_grammar": f"start: {start} @answer"}, {**body, "name": "answer"}, *rest]
    return json.dumps({**form, "grammars": grammars})


def source_of(body: GenerationRequest) -> Source | None:
    """The one field of a request that says what the answer must look like. Raises RequestError if there are several."""
    asked = [*_response_format(body), *_structured_outputs(body.structured_outputs), *_named(body)]
    if len(asked) > 1:
        names = " and ".join(source.field for source in asked)
        message = f"{names} each say what the answer must look like: send one of them"
        raise RequestError("invalid_field", message, asked[1].field)
    return asked[0] if asked else None


def _named(body: GenerationRequest) -> list[Source]:
    """The fields of older vLLM and of SGLang."""
    fields = {
        "guided_json": ("json_schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choice", body.guided_choice),
        "guided_grammar": ("grammar", body.guided_grammar),
        "json_schema": ("json_schema", body.json_schema),
        "regex": ("regex", body.regex),
        "ebnf": ("grammar", body.ebnf),
    }
    return [Source(field, kind, content) for field, (kind, content) in fields.items() if content is not None]


def _structured_outputs(asked: StructuredOutputs | None) -> list[Source]:
    if asked is None:
        return []
    fields = {
        "json": ("json_schema", asked.json),
        "json_object": ("json_schema", {"type": "object"} if asked.json_object else None),
        "regex": ("regex", asked.regex),
        "choice": ("choice", asked.choice),
        "grammar": ("grammar", asked.grammar),
    }
    found = [Source(f"structured_outputs.{field}", *each) for field, each in fields.items() if each[1] is not None]
    if not found:
        message = f"structured_outputs needs one of {', '.join(fields)}"
        raise RequestError("invalid_field", message, "structured_outputs")
    return found


def _response_format(body: GenerationRequest) -> list[Source]:
    match body.response_format:
        case JsonSchema(json_schema=described):
            field = "response_format.json_schema.schema"
            return [Source(field, "json_schema", {} if described.schema is None else described.schema)]
        case JsonObject():
            return [Source("response_format", "json_schema", {"type": "object"})]
    return []


def _translate(source: Source) -> str:
    field, kind, content = source
    try:
        if kind == "json_schema":
            grammar = _of_schema(field, content)
        elif kind == "choice":
            grammar = LLMatcher.grammar_from_lark(f"start: {_alternatives(content)}")
        elif kind == "grammar" and ("%json" in content or content.lstrip().startswith("{")):
            raise ValueError("a grammar is GBNF or Lark without %json: send a JSON schema in a field for schemas")
        elif kind == "grammar" and content.count("\n") > MAX_RULES:
            raise ValueError(f"a grammar has at most {MAX_RULES} lines")
        else:
            grammar = grammar_from("grammar" if kind == "grammar" else "regex", content)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid_grammar", f"{field}: {error}", field) from None
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise RequestError("invalid_grammar", f"{field}: {messages[0].strip()}", field)
    if _is_empty(grammar):
        message = f"{field}: no text fits it: a $ref or a rule leads to itself alone"
        raise RequestError("invalid_grammar", message, field)
    return grammar


def _of_schema(field: str, content: Any) -> str:
    """The grammar of a JSON schema. Raises RequestError naming the keyword, ValueError, RecursionError."""
    schema = _read(content) if isinstance(content, str) else content
    if schema is False:
        raise ValueError("the schema false allows no value")
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object, true or false")
    _check_numbers(field, schema)
    _check_references(schema)
    if (fault := _fault(schema)) is not None:
        place = "".join(f"/{part}" for part in _place(schema, fault, time.monotonic() + PLACE_SECONDS))
        raise RequestError("invalid_grammar", f"{field}{place and ' at '}{place}: {fault}", field)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_OPTIONS)


def _read(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"a string must hold a JSON schema as JSON: {error}") from None


def _check_references(schema: dict[str, Any]) -> None:
    """Raise ValueError for references that may lead deeper than the compiler's stack, which ends its process."""
    deepest: dict[str, int] = {}  # by what is referred to: the deepest place of a reference
    rest: list[tuple[Any, int]] = [(schema, 1)]
    while rest:
        value, depth = rest.pop()
        if isinstance(value, dict) and isinstance(target := value.get("$ref"), str):
            deepest[target] = max(depth, deepest.get(target, 0))
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += ((entry, depth + 1) for entry in entries)
    if sum(deepest.values()) > MAX_LEVELS:
        raise ValueError(f"$ref: {len(deepest)} places are referred to, from {MAX_LEVELS} levels or more together")


def _check_numbers(field: str, schema: dict[str, Any]) -> None:
    """Raise RequestError for a number that the compiler would round, follow for minutes, or fall over."""
    steps = 1
    for place, number in _numbers(schema):
        fault = None
        digits = Decimal(repr(number)).normalize().as_tuple().digits
        if abs(number) > MAX_NUMBER:
            fault = f"{number} is not exact: numbers of a schema go to {MAX_NUMBER} and down to its negative"
        elif isinstance(number, float) and len(digits) > MAX_DIGITS:
            fault = f"{number} is not exact: numbers with a point have at most {MAX_DIGITS} digits"
        elif place[-1] == "multipleOf":
            steps = math.lcm(steps, int("".join(map(str, digits))) or 1)
            if steps > MAX_STEPS:
                fault = (
                    f"the numbers of multipleOf have more than {MAX_STEPS} as their common multiple, points left out"
                )
        if fault is not None:
            raise RequestError("invalid_grammar", f"{field} at /{'/'.join(place)}: {fault}", field)


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
    except ValueError as error:
        return str(error).partition(". Enable 'coerce_one_of'")[0]  # an option that requests do not have
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0].strip() if failed else None


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


@cache
def _bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def _is_empty(grammar: str) -> bool:
    """Whether nothing can be generated; the compiler lets such grammars pass."""
    matcher = LLMatcher(_bytes_tokenizer(), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.is_error()


def _alternatives(texts: Sequence[str]) -> str:
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
