"""Random schemas, tools, choices among them, histories and forms against the real engine: refused by name or answered.

The bodies follow from a seed. A request that fails is shown whole, so that it can become a test of its own.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.service.live_server import NAME, LiveServer, fake_settings, live_server

SEEDS = range(8)
REQUESTS = 150  # of each seed
SECONDS = 15.0  # for one request; the check of a grammar may take 10, on a busy machine most of it
ROOM = 4.0  # seconds for one seed's requests; those that do not fit are left out

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e300,
    -1e22,
    2**70,
    "",
    "a",
    "\u0000",
    "😀",
    "\ud83d",
]  # half a character
ODD += [[], {}, [None], {"": None}, [[[]]], "{", "$ref", "null", "x" * 3000]
WORDS = """type enum const properties required items prefixItems minItems maxItems pattern format minLength maxLength
minimum maximum exclusiveMinimum exclusiveMaximum multipleOf anyOf oneOf allOf not if then $ref $defs
additionalProperties patternProperties uniqueItems title"""
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]
REGEXES = [
    "[a-z]{2,4}",
    "(a|b)*",
    "a{3}",
    "(",
    "[",
    "\\d+",
    "(?=a)",
    "\\p{L}",
    "",
    "((a*)*)*",
    ".{0,400}",
    "^a$",
    "a{1000000}",
]
GRAMMARS = [
    'start: "a" | "b"',
    'root ::= "a" root | "b"',
    "start: start",
    "start:",
    "start: %json{}",
    "start: /[/",
    "x" * 50,
]
GRAMMARS += ["root ::= root", 'start: "a"{3}', "%llguidance {}", 'start: "\\']


class Fuzz:
    """Draws requests; half of what it draws is as it should be.

    `strange` is the chance that something odd stands in the place of what belongs there.
    """

    def __init__(self, seed: int, strange: float = 0.02, regexes: Sequence[str] = REGEXES) -> None:
        self.rng, self.strange, self.regexes = random.Random(seed), strange, regexes

    def odd(self) -> Any:
        return self.rng.choice(ODD)

    def perhaps(self, value: Any, share: float = 1.0) -> Any:
        """The value, or something else in its place."""
        return self.odd() if self.rng.random() < share * self.strange else value

    def schema(self, depth: int = 0) -> Any:
        rng = self.rng
        if depth > 3 or rng.random() < 0.1:
            return self.perhaps(
                rng.choice([{}, True, {"type": rng.choice(TYPES)}, {"$ref": "#"}, {"$ref": "#/$defs/a"}])
            )
        schema: dict[str, Any] = {}
        if rng.random() < 0.7:
            schema["type"] = self.perhaps(rng.choice([*TYPES, rng.sample(TYPES, 2)]))
        for word in rng.sample(WORDS.split(), rng.choice([0, 1, 1, 2, 3])):
            schema[word] = self.perhaps(self.keyword(word, depth))
        if rng.random() < 0.2:
            schema.setdefault("$defs", {"a": self.schema(depth + 1)})
        return schema

    def keyword(self, word: str, depth: int) -> Any:
        rng = self.rng
        match word:
            case "type":
                return rng.choice(TYPES)
            case "enum" | "const":
                values = [self.odd() for _ in range(rng.choice([1, 2, 4]))]
                return values if word == "enum" else values[0]
            case "properties" | "patternProperties" | "$defs":
                return {
                    rng.choice(["a", "b", "", "é", "^x", "[", "$ref"]): self.schema(depth + 1)
                    for _ in range(rng.choice([0, 1, 3]))
                }
            case "required":
                return rng.sample(["a", "b", "c", ""], rng.choice([0, 1, 2]))
            case "prefixItems" | "anyOf" | "oneOf" | "allOf":
                return [self.schema(depth + 1) for _ in range(rng.choice([0, 1, 2]))]
            case "items" | "not" | "if" | "then" | "additionalProperties":
                return self.schema(depth + 1)
            case "pattern":
                return rng.choice(self.regexes)
            case "format":
                return rng.choice(["date", "email", "uuid", "nonsense"])
            case "$ref":
                return rng.choice(["#", "#/$defs/a", "#/$defs/none", "http://localhost/x", "", "#/properties/a"])
            case "uniqueItems":
                return rng.choice([True, False])
            case "title":
                return "t"
        return rng.choice([0, 1, 2, 5, -3, 0.5, 100000, -(2**63), 2**53, -(2**53), 1234.567, 2**31, 1e-7])

    def tool(self) -> Any:
        rng = self.rng
        function = {
            "name": self.perhaps(rng.choice([*"fghfghfghfghfgh", "weather", "a b", "x" * 80])),
            "parameters": self.perhaps(self.schema()),
        }
        for field, value in (("description", "what it does"), ("strict", True)):
            if rng.random() < 0.3:
                function[field] = self.perhaps(value)
        return self.perhaps({"type": self.perhaps("function"), "function": self.perhaps(function)})

    def tool_choice(self) -> Any:
        named = {"type": "function", "function": {"name": self.rng.choice([*"ffffgh", "nobody"])}}
        return self.perhaps(self.rng.choice(["auto", "none", "required", "required", "required", named, named, "f"]))

    def message(self) -> Any:
        rng = self.rng
        content = rng.choice(
            [
                *["hello"] * 9,
                "",
                None,
                [{"type": "text", "text": "hello"}],
                [],
                [{"type": "image_url", "image_url": {}}],
            ]
        )
        message: dict[str, Any] = {
            "role": self.perhaps(rng.choice(["user", "assistant", "tool", "system", "developer", "critic"]))
        }
        message["content"] = self.perhaps(content)
        if rng.random() < 0.4:
            call = {
                "id": self.perhaps("c1"),
                "type": "function",
                "function": {
                    "name": self.perhaps("f"),
                    "arguments": self.perhaps(
                        rng.choice(
                            [
                                "{}",
                                '{"a": 1}',
                                "[1]",
                                "{",
                                "",
                                '{"a": NaN}',
                                '{"a": "\\ud83d"}',
                                '{"a": 1e999}',
                                '{"\\u0000": {}}',
                                "{" * 2000,
                            ]
                        )
                    ),
                },
            }
            message["tool_calls"] = self.perhaps([self.perhaps(call) for _ in range(rng.choice([0, 1, 2]))])
        if rng.random() < 0.3:
            message["tool_call_id"] = self.perhaps("c1")
        return self.perhaps(message)

    def form(self) -> dict[str, Any]:
        """What the answer must look like, in one dialect or in several."""
        rng = self.rng
        schema, regex, grammar, choice = (
            self.schema(),
            rng.choice(REGEXES),
            rng.choice(GRAMMARS),
            rng.choice([["a", "b"], [], ["é😀"], [""], ["a"] * 300]),
        )
        fields: list[tuple[str, Any]] = [
            (
                "response_format",
                {"type": "json_schema", "json_schema": self.perhaps({"name": "n", "schema": schema, "strict": True})},
            ),
            ("response_format", self.perhaps({"type": rng.choice(["json_object", "text", "yaml"])})),
            ("guided_json", rng.choice([schema, json.dumps(schema)])),
            ("json_schema", json.dumps(schema)),
            ("guided_regex", regex),
            ("regex", regex),
            ("guided_grammar", grammar),
            ("ebnf", grammar),
            ("guided_choice", choice),
            (
                "structured_outputs",
                self.perhaps(
                    {
                        rng.choice(["json", "regex", "choice", "grammar", "json_object", "nothing"]): rng.choice(
                            [schema, regex, choice, grammar, True]
                        )
                    }
                ),
            ),
        ]
        return {name: self.perhaps(value) for name, value in rng.sample(fields, rng.choice([1, 1, 1, 1, 2]))}

    def body(self) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {
            "model": NAME,
            "max_tokens": self.perhaps(rng.choice([1, 4, 12]), 0.1),
            "seed": rng.randrange(1000),
        }
        body["messages"] = self.perhaps([self.message() for _ in range(rng.choice([1, 1, 2, 4]))])
        if rng.random() < 0.5:
            body["messages"] = [{"role": "user", "content": "hello"}]
        if rng.random() < 0.5:
            body["tools"] = self.perhaps([self.tool() for _ in range(rng.choice([0, 1, 1, 2]))])
            body["tool_choice"] = self.tool_choice()
        if rng.random() < 0.6:
            body |= self.form()
        for field, value in (
            ("stream", True),
            ("n", 2),
            ("parallel_tool_calls", False),
            ("stop", "a"),
            ("min_tokens", 3),
            ("logprobs", True),
            ("ignore_eos", True),
            ("frequency_penalty", 1.0),
        ):
            if rng.random() < 0.1:
                body[field] = self.perhaps(value)
        if rng.random() < 0.2:  # a completion, which ignores the fields of a chat
            del body["messages"]
            body["prompt"] = self.perhaps(rng.choice(["hello", "", ["hello", "world"], [5, 6], [[5], [6, 7]]]))
            body.pop("logprobs", None)
        return body


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    engine = {"engine_command": (sys.executable, "-m", "runtime.process"), "load_format": "dummy"}
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"), **engine)) as live:
        yield live


def arguments(call: dict[str, Any]) -> dict[str, Any] | None:
    """What a whole call passes to its function, which is an object."""
    passed = json.loads(call["function"]["arguments"])
    return passed if isinstance(passed, dict) else None


def judge(server: LiveServer, body: dict[str, Any]) -> int:
    """Send a request; its status. Fails for an answer that a client cannot understand, and for a late one."""
    shown = json.dumps(body)[:3000]
    start = time.perf_counter()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = server.client.post(path, content=json.dumps(body))
    spent = time.perf_counter() - start
    assert spent < SECONDS, f"{spent:.1f} s for {shown}"
    if response.status_code == 200:
        if body.get("stream") is True:
            events = [line for line in response.text.splitlines() if line.startswith("data: ")]
            assert events[-1] == "data: [DONE]" or "grammar_failed" in events[-1], f"{response.text[-300:]} for {shown}"
        else:
            for choice in response.json()["choices"]:
                whole = choice["finish_reason"] == "tool_calls"  # never of a completion
                assert not whole or all(arguments(call) is not None for call in choice["message"]["tool_calls"]), shown
        return 200
    error = response.json()["error"]
    assert 400 <= response.status_code < 500, f"{response.status_code} {error} for {shown}"
    assert error["param"] is not None or error["code"] in ("invalid_json", "grammar_failed"), f"{error} for {shown}"
    assert 10 < len(error["message"]) < 5000
    return response.status_code


@pytest.mark.parametrize("seed", SEEDS)
def test_random_requests_are_answered_or_refused_by_name(server: LiveServer, seed: int) -> None:
    fuzz, deadline = Fuzz(seed), time.monotonic() + ROOM
    statuses = []
    for _ in range(REQUESTS):
        statuses.append(judge(server, fuzz.body()))
        if time.monotonic() > deadline:
            break
    assert 200 in statuses
    assert 400 in statuses
    assert server.chat("hello", max_tokens=1).status_code == 200
