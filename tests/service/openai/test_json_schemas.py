"""JSON schemas of every kind: what is generated for one validates, or the schema is refused and its keyword named.

`json_schemas.jsonl` has a schema in each line, and the keyword that is refused in it, if any.
"""

import asyncio
import itertools
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from runtime.grammar.grammars import Grammars as CompiledGrammars
from service.errors import RequestError
from service.grammars import translation
from service.grammars.grammars import CHECK_SECONDS, Grammars
from service.grammars.source import InvalidGrammar, Source
from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.openai.test_fuzz import Fuzz
from tests.service.tiny_model import make_tokenizer

WALKS = 12  # through the grammar of each schema
RANDOM = 150  # random schemas in a group
PATTERNS = ("^[a-z]{2,4}$", "^(a|b)*$", "^a{3}$", r"^\d+$", "^.{0,3}$")
MAX_TOKENS = 5000
END = 2
CLOSING = '"}]ab'  # what brings a text nearer to its end
LINES = Path(__file__).with_name("json_schemas.jsonl").read_text().splitlines()


class Case(NamedTuple):
    kind: str
    schema: Any
    refused: str | None


CASES = [Case(line["kind"], line["schema"], line.get("refused")) for line in map(json.loads, LINES)]
ANSWERED = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompiledGrammars]:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    grammars = CompiledGrammars(directory, tokenizer.get_vocab_size(), [END])
    yield grammars
    grammars.close()


def translated(schema: Any) -> str:
    """The grammar, checked in this process: a sandbox for each would take most of the time."""
    return translation.translated(Source("guided_json", "json_schema", schema))


def checked(schemas: list[Any]) -> list[str | None]:
    """The grammars, None for a schema that is refused. They are checked in a sandbox: some would take minutes."""

    async def run() -> list[str | None]:
        grammars = Grammars(seconds=1.0)
        try:
            return [await grammar(grammars, schema) for schema in schemas]
        finally:
            await grammars.close()

    async def grammar(grammars: Grammars, schema: Any) -> str | None:
        try:
            return await grammars.translate(Source("guided_json", "json_schema", schema))
        except RequestError:
            return None

    return asyncio.run(run())


def walk(compiled: CompiledGrammars, grammar: str, seed: int) -> str | None:
    """A text of tokens drawn from the allowed ones, those that close something the more often; None without an end."""
    rng, tokenizer, token_ids = random.Random(seed), make_tokenizer(), list[int]()
    closing = {tokenizer.token_to_id(character) for character in CLOSING}
    constraint = compiled.constrain(grammar)
    while not constraint.ready:
        compiled.wait(10)
    while len(token_ids) < MAX_TOKENS:
        allowed = [int(index) for index in constraint.allowed(token_ids).nonzero()[0]]
        assert constraint.failure is None
        if END in allowed and (rng.random() < 0.4 or len(allowed) == 1):
            text: str = tokenizer.decode(token_ids, skip_special_tokens=False)
            return text
        near = [each for each in allowed if each in closing]
        token_ids.append(rng.choice(near if near and rng.random() < 0.3 else [i for i in allowed if i != END]))
    return None


def matches(validator: Any, pattern: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """`pattern` by ECMA 262, where a class of words or digits holds ASCII alone, and one of spaces does not."""
    del validator, schema
    if isinstance(value, str) and not re.search(pattern.replace(r"\p{L}", r"[^\W\d_]"), value, flags_of(pattern)):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def flags_of(pattern: str) -> re.RegexFlag:
    return re.RegexFlag(0) if r"\p" in pattern or r"\s" in pattern else re.ASCII


@cache
def validator_class(dialect: type) -> Any:
    return jsonschema.validators.extend(dialect, {"pattern": matches})


def validate(text: str, schema: Any) -> None:
    """Numbers are decimals: 4.43 is a multiple of 0.01, and not of its float."""
    dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    value = json.loads(text, parse_float=Decimal)
    if exact is not True and exact.get("format") in ("time", "date-time"):
        value = value.replace(":60", ":59")  # a leap second, which the library knows at midnight alone
    validator_class(dialect)(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(value)


def check(text: str, schema: Any) -> None:
    try:
        validate(text, schema)
    except (ValueError, jsonschema.ValidationError) as error:
        pytest.fail(f"{json.dumps(schema)} gave {text[:300]!r}: {error}")


def test_there_are_schemas_of_every_kind() -> None:
    assert len(ANSWERED) >= 200
    assert len(REFUSED) >= 60
    assert min(Counter(case.kind for case in CASES).values()) >= 1
    assert len({json.dumps(case.schema) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("kind", sorted({case.kind for case in ANSWERED}))
def test_whatever_is_generated_for_a_schema_validates(compiled: CompiledGrammars, kind: str) -> None:
    for case in ANSWERED:
        if case.kind == kind:
            grammar = translated(case.schema)
            for seed in range(WALKS):
                text = walk(compiled, grammar, seed)
                assert text is not None, f"no end: {case.schema}"
                check(text, case.schema)


@pytest.mark.parametrize("group", range(4))
def test_whatever_is_generated_for_a_random_schema_validates(compiled: CompiledGrammars, group: int) -> None:
    """Random combinations of the keywords; some of them are refused, and few texts are too long to be ended."""
    seeds = range(RANDOM * group, RANDOM * (group + 1))
    random_schemas = [Fuzz(seed, strange=0, regexes=PATTERNS).schema() for seed in seeds]
    # No text of UTF-8 has half a character, and no body
    schemas = [schema for schema in random_schemas if r"\ud83d" not in json.dumps(schema)]
    judged = 0
    for schema, grammar in zip(schemas, checked(schemas), strict=True):
        for walked in range(0 if grammar is None else 2):
            assert grammar is not None
            if (text := walk(compiled, grammar, walked)) is not None:
                judged += 1
                check(text, schema)
    assert judged > RANDOM


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: json.dumps(case.schema)[:60])
def test_a_schema_that_cannot_be_followed_is_refused_and_its_keyword_named(case: Case) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        translated(case.schema)
    message = str(refused.value)
    assert message.startswith(f"guided_json at /{case.refused}") or case.schema is False or "to itself" in message


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"items": {"pattern": "("}}}}, "properties/a/items/pattern"),
        ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "("}]}, "anyOf/1/pattern"),
        (
            {"$ref": "#/$defs/a", "$defs": {"b": {}, "a": {"properties": {"c": {"not": {}}}}}},
            "$defs/a/properties/c/not",
        ),
        ({"prefixItems": [{}, {"allOf": [{"minLength": -1}]}]}, "prefixItems/1/allOf/0/minLength"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}, "properties/a/enum"),
    ],
)
def test_the_place_of_the_keyword_is_told(schema: Any, place: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        translated(schema)
    assert str(refused.value).startswith(f"guided_json at /{place}: ")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"const": -(2**63)}, "const"),  # the compiler's process would end
        ({"type": "integer", "allOf": [{}], "const": -1e22}, "const"),  # the same
        ({"type": "number", "maximum": float("inf")}, "maximum"),  # JSON's 1e999
        ({"const": 123456789.123456789}, "const"),  # 123456789.1234568 would be written
        ({"enum": [1, 2**53 + 1]}, "enum/1"),
        ({"properties": {"a": {"const": {"b": [2**70]}}}}, "properties/a/const/b/0"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum"),
    ],
)
def test_a_number_that_cannot_be_followed_is_refused(schema: Any, place: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        translated(schema)
    assert str(refused.value).startswith(f"guided_json at /{place}: ")


def test_numbers_that_can_be_followed_and_those_of_annotations_are_taken() -> None:
    for schema in (
        {"const": 2**53},
        {"enum": [-(2**53), 0.1, 1e-7, -12345678.1234567]},
        {"type": "integer", "default": 2**70, "examples": [2**70], "multipleOf": 1000},
        {"type": "number", "multipleOf": 0.01},
    ):
        assert translated(schema)


def deep(levels: int) -> str:
    return '{"items": ' * levels + "{}" + "}" * levels


def chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "null"}}}


def rules(length: int) -> str:
    return "\n".join(("start: a0", *(f'a{i}: "x" a{i + 1}' for i in range(length)), f'a{length}: "y"'))


# What would end the process that compiles it, or keep it busy for minutes
KILLERS = [
    (Source("guided_json", "json_schema", chain(3000)), "more stack or memory"),
    (Source("ebnf", "grammar", rules(5000)), "more stack or memory"),
    (Source("ebnf", "grammar", rules(5000).replace("a", "A").replace("stArt", "start")), "more stack or memory"),
    (Source("guided_json", "json_schema", {"type": "integer", "multipleOf": 2**31}), "takes longer"),
    (
        Source("guided_json", "json_schema", {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
        "takes longer",
    ),
    (Source("guided_json", "json_schema", deep(5000)), "recursion|deep"),
    (Source("regex", "regex", "(" * 50_000 + "a" + ")" * 50_000), ""),
    (Source("ebnf", "grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000), "too deeply nested"),
]


def test_what_would_end_the_compilers_process_is_refused_and_others_are_not_disturbed() -> None:
    async def run() -> None:
        grammars, schema = Grammars(seconds=0.5), itertools.count()
        try:
            killers = [asyncio.ensure_future(grammars.translate(source)) for source, _ in KILLERS]
            while not all(killer.done() for killer in killers):
                await grammars.translate(Source("guided_json", "json_schema", {"const": next(schema)}))
            for killer, (source, reason) in zip(killers, KILLERS, strict=True):
                error = killer.exception()
                assert isinstance(error, RequestError)
                assert (error.code, error.param) == ("invalid_grammar", source.field)
                assert error.message.startswith(source.field)
                assert re.search(reason, error.message), error.message
                assert len(error.message) < 2000
            for source in (
                Source("guided_json", "json_schema", chain(300)),
                Source("ebnf", "grammar", rules(900)),
                Source("regex", "regex", "a{100000}"),
                Source("guided_json", "json_schema", {"type": "string", "minLength": 10**9}),
            ):
                assert await grammars.translate(source)
        finally:
            await grammars.close()

    asyncio.run(run())


def test_a_grammar_that_was_found_good_is_not_checked_again() -> None:
    async def run() -> None:
        grammars, before = Grammars(), children()
        first = await grammars.translate(Source("guided_json", "json_schema", {"const": 1}))
        await grammars.close()  # so that another check would have to start a process
        begun = time.perf_counter()
        for _ in range(100):
            assert await grammars.translate(Source("json_schema", "json_schema", {"const": 1})) == first
        assert time.perf_counter() - begun < CHECK_SECONDS
        assert children() <= before

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    asyncio.run(run())


@pytest.mark.parametrize("grammar", ['start: %json {"const": -9223372036854775808}', '{"grammars": []}'])
def test_a_grammar_holds_no_schema(grammar: str) -> None:
    with pytest.raises(InvalidGrammar, match=r"^ebnf: .*without %json"):
        translation.translated(Source("ebnf", "grammar", grammar))


@pytest.mark.parametrize("text", ["1", "null", "[1]", '"a"', "nope", "", '{"enum": [NaN]}', "{"])
def test_a_text_that_holds_no_schema_is_told_so(text: str) -> None:
    with pytest.raises(InvalidGrammar, match=r"^guided_json: .*a JSON schema"):
        translated(text)


def test_a_large_schema_with_a_fault_is_refused_in_time() -> None:
    properties = {f"p{number}": {"type": "string", "maxLength": number} for number in range(2000)}
    fault = {"type": "object", "properties": {**properties, "bad": {"uniqueItems": True}}}
    with pytest.raises(InvalidGrammar, match="uniqueItems"):
        translated(fault)


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    engine = {"engine_command": (sys.executable, "-m", "runtime.process"), "load_format": "dummy"}
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"), **engine)) as live:
        yield live


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "integer", "minimum": 5, "maximum": 7},
        {"enum": ["a", {"b": [None]}]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False},
    ],
    ids=json.dumps,
)
def test_a_schema_holds_over_http_as_well(live: LiveServer, schema: Any) -> None:
    ends = {str(make_tokenizer().token_to_id(character)): 20.0 for character in '"}],1'} | {"2": 20.0}
    for seed in range(3):
        asked = {"structured_outputs": {"json": schema}, "max_tokens": 200, "seed": seed, "logit_bias": ends}
        choice = live.complete("hello", **asked).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        validate(choice["text"], schema)


def test_a_refusal_is_a_400_over_http_that_names_field_and_keyword(live: LiveServer) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    for field, asked in (
        ("guided_json", {"guided_json": schema}),
        ("structured_outputs.json", {"structured_outputs": {"json": json.dumps(schema)}}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        ),
    ):
        response = live.complete("hello", **asked)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_grammar", field)
        assert error["message"].startswith(f"{field} at /properties/tags/uniqueItems: ")


def test_a_form_that_explodes_is_refused_without_the_matchers_own_state(live: LiveServer) -> None:
    error = live.complete("hello", regex="a{1000000}", max_tokens=4).json()["error"]
    assert error["code"] == "grammar_failed"
    assert error["message"].endswith("too many expressions constructed")


def test_the_server_lives_on_when_a_grammar_ends_its_process(live: LiveServer) -> None:
    """What passes the check is compiled by the engine, whose stack is the larger one."""
    for asked in ({"guided_json": chain(3000)}, {"ebnf": rules(5000)}):
        error = live.complete("hello", **asked).json()["error"]
        assert error["code"] == "invalid_grammar"
        assert error["message"].endswith("needs more stack or memory than its compiler has: make it simpler")
    for length in (500, 1000, 1500, 2000):
        answer = live.complete("hello", ebnf=rules(length), max_tokens=1)
        assert answer.status_code == 200 if length <= 500 else answer.status_code in (200, 400), answer.text
    assert live.complete("hello", regex="[ab]{3}", max_tokens=9).status_code == 200


def test_a_schema_does_not_set_the_compilers_options() -> None:
    fits_both = {"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}
    with pytest.raises(InvalidGrammar, match="oneOf"):
        translated(fits_both)
    plain = {"type": "integer"}
    assert translated({**plain, "x-guidance": {"whitespace_pattern": "x*"}}) == translated(plain)
