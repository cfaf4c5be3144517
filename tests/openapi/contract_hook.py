"""An httpx hook that holds every response against the HTTP contract: `httpx.Client(event_hooks=HOOKS)`.

A response must be described for its method, path and status, have a content type of that description, and its JSON must
fit the schema; an error's code must be one that the operation can give. Each server-sent event must fit a schema that
the operation streams, or be an error.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import httpx
import jsonschema

from openapi.build import CONTRACT
from openapi.errors import NO_OPERATION, errors_of, shown_code
from openapi.operations import JSON, OPERATIONS
from service.app import routes

EVENTS, DONE = "text/event-stream", "[DONE]"
CONTRACT_DOCUMENT: dict[str, Any] = json.loads(CONTRACT.read_text())
ERROR = {"$ref": "#/components/schemas/Error"}
PATHS = [(route.path_regex, re.sub(r":\w+}", "}", route.path)) for route in routes]  # as the contract writes them


def hold_to_contract(response: httpx.Response) -> None:
    """Raise AssertionError for a response that the contract does not describe; events are judged as they are read."""
    content = described_content(response)
    if EVENTS in content:
        response.stream = JudgedEvents(response.stream, events_validator(response))
    else:
        judge_body(response.read(), response, content)


async def hold_to_contract_async(response: httpx.Response) -> None:
    """As `hold_to_contract`, for an `httpx.AsyncClient`."""
    content = described_content(response)
    if EVENTS in content:
        response.stream = JudgedAsyncEvents(response.stream, events_validator(response))
    else:
        judge_body(await response.aread(), response, content)


HOOKS = {"response": [hold_to_contract]}
ASYNC_HOOKS = {"response": [hold_to_contract_async]}


def named(response: httpx.Response) -> str:
    return f"{response.request.method} {response.request.url.path}: {response.status_code}"


def operation(response: httpx.Response) -> tuple[str, str] | None:
    """The method and the path, as the contract writes it, of a response; None where there is no such operation."""
    method = response.request.method
    matching = [path for pattern, path in PATHS if pattern.match(response.request.url.path)]
    described = (path for path in matching if method.lower() in CONTRACT_DOCUMENT["paths"].get(path, {}))
    return next(((method, path) for path in described), None)


def described_content(response: httpx.Response) -> dict[str, Any]:
    """The one described content type of a response with its schema; empty if the response is to have no body."""
    called = operation(response)
    if called is None:  # an unknown path, or another method
        assert response.status_code in (404, 405, 401), f"{named(response)}: the contract has no such call"
        described: dict[str, Any] = {JSON: {"schema": ERROR}}
    else:
        answers = CONTRACT_DOCUMENT["paths"][called[1]][called[0].lower()]["responses"]
        assert str(response.status_code) in answers, f"{named(response)}: the contract does not have this status"
        described = answers[str(response.status_code)].get("content", {})
    if not described:
        return {}
    kind = response.headers.get("content-type", "").partition(";")[0]
    assert kind in described, f"{named(response)}: content type {kind!r} is not one of {list(described)}"
    return {kind: described[kind]}


def judge_body(body: bytes, response: httpx.Response, content: dict[str, Any]) -> None:
    if JSON in content:
        judge(validator(json.dumps(content[JSON]["schema"])), value := json.loads(body), named(response))
        if response.status_code >= 400:
            judge_code(value, response)
    elif not content:
        assert body == b"", f"{named(response)}: the contract describes no body"


def judge_code(value: Any, response: httpx.Response) -> None:
    called, code = operation(response), value["error"]["code"]
    codes = NO_OPERATION | {"invalid_api_key"} if called is None else errors_of(called)
    known = {shown_code(each) for each in codes}
    assert code in known, f"{named(response)}: the contract does not have the code {code}"


MIXED = {"SglangAnswer", "Error"}  # an error of SGLang's calls has the fields of both


def closed(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A Struct's schema that refuses fields which the Struct does not have."""
    return {**schema, "additionalProperties": False} if "properties" in schema and name not in MIXED else schema


COMPONENTS = {
    "schemas": {name: closed(name, schema) for name, schema in CONTRACT_DOCUMENT["components"]["schemas"].items()}
}


@cache
def validator(schema: str) -> jsonschema.Draft202012Validator:
    """A validator of a JSON schema that may refer to the contract's components."""
    return jsonschema.Draft202012Validator({**json.loads(schema), "components": COMPONENTS})


def judge(judged_by: jsonschema.Draft202012Validator, value: Any, where: str) -> None:
    wrong = next(judged_by.iter_errors(value), None)
    assert wrong is None, f"{where}: {wrong.json_path if wrong else ''}: {wrong.message if wrong else ''}"


def events_validator(response: httpx.Response) -> "EventsJudge":
    called = operation(response)
    assert called is not None
    kinds = OPERATIONS[called].streams
    assert kinds, f"{named(response)}: the contract describes no events"
    schemas = [*({"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds), ERROR]
    return EventsJudge(schemas, named(response), named=OPERATIONS[called].named_events)


class EventsJudge:
    """Judges server-sent events from pieces of a stream, cut anywhere."""

    def __init__(self, schemas: list[dict[str, str]], where: str, *, named: bool = False):
        self._validator, self._where = validator(json.dumps({"anyOf": schemas})), where
        self._named, self._name = named, ""  # whether events have names, and the last one's
        self._rest = b""

    def push(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in filter(None, lines):
            if self._named and line.startswith(b"event: "):
                self._name = line.removeprefix(b"event: ").decode()
                continue
            assert line.startswith(b"data: "), f"{self._where}: {line!r} is no event"
            if (data := line.removeprefix(b"data: ").decode()) == DONE and not self._named:
                continue
            judge(self._validator, event := json.loads(data), self._where)
            assert not self._named or event["type"] == self._name, f"{self._where}: {self._name} is another event"


class JudgedEvents(httpx.SyncByteStream):
    """A stream whose events are judged as they pass."""

    def __init__(self, stream: Any, judge: EventsJudge):
        self._stream, self._judge = stream, judge

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._judge.push(piece)
            yield piece

    def close(self) -> None:
        self._stream.close()


class JudgedAsyncEvents(httpx.AsyncByteStream):
    """As `JudgedEvents`, for an `httpx.AsyncClient`."""

    def __init__(self, stream: Any, judge: EventsJudge):
        self._stream, self._judge = stream, judge

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._judge.push(piece)
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()
