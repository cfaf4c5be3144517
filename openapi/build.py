"""Builds the HTTP contract (OpenAPI 3.1) from the service's routes and Structs: `python -m openapi.build`.

The result is openapi/openapi.json. A test fails if the file differs from the result of this program.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.routing import Route

from openapi.checks import ADAPTER_NAME, HEADERS, NO_SLASH, checked, without_model
from openapi.errors import Key, by_status, description, errors_of
from openapi.examples import media_examples
from openapi.operations import JSON, NEEDED, OPERATIONS, REFERENCE, Operation
from service import errors, health
from service.adapters import dialects
from service.adapters import routes as adapters
from service.adapters import schemas as adapter_schemas
from service.app import routes
from service.catalog.seen import GENERATION_HEADER
from service.dialects import lmi, tokens
from service.grammars import tags
from service.keys.caller import Scope
from service.kv import control
from service.kv import schemas as kv_schemas
from service.openai import models, schemas, tokenize
from service.options import in_force
from service.page import routes as page
from service.responses import schemas as responses
from service.routing import routes as routing

CONTRACT = Path(__file__).with_name("openapi.json")
# Whose Structs are bodies
MODULES = (
    schemas,
    tags,
    models,
    tokenize,
    responses,
    adapters,
    adapter_schemas,
    dialects,
    control,
    kv_schemas,
    lmi,
    tokens,
    errors,
    health,
    in_force,
    page,
    routing,
)


def structs() -> list[type]:
    """Return every Struct of HTTP bodies. The Structs of query strings become parameters instead."""
    found = [
        member
        for module in MODULES
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, msgspec.Struct) and member.__module__ == module.__name__
    ]
    return sorted((s for s in found if not s.__name__.endswith("Query")), key=lambda struct: struct.__name__)


def served() -> set[tuple[str, str]]:
    """Return the method and the path of every route, as OpenAPI writes paths."""
    return {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def contract() -> dict[str, Any]:
    """Return the whole document. Raises KeyError for a route that is not in `OPERATIONS`."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in sorted(served()):
        described = describe((method, path), OPERATIONS[method, path])
        paths.setdefault(path, {})[method.lower()] = described | security(NEEDED[method, path])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rootstock",
            "version": "0.1.0",
            "description": "Every answer has the header x-request-id: the id that the request came with, or a new one.",
            "summary": "One base model, every LoRA adapter grafted on at request time.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key with one of the scopes listed."}
            },
        },
    }


def components() -> dict[str, Any]:
    _, found = msgspec.json.schema_components(structs(), ref_template=REFERENCE)
    return {name: checked(name, schema) for name, schema in found.items()}


def describe(key: Key, operation: Operation) -> dict[str, Any]:
    path = key[1]
    described: dict[str, Any] = {"summary": operation.summary}
    errors = errors_of(key)
    headers = (*operation.headers, GENERATION_HEADER) if "generation_not_reached" in errors else operation.headers
    if parameters := [*in_path(path), *in_query(operation.query), *in_header(path, headers)]:
        described["parameters"] = parameters
    if operation.body is not None or operation.forms:
        described["requestBody"] = {"required": operation.body_required, "content": body_content(key, operation)}
    described["responses"] = {
        **{str(status): refusal(status, codes) for status, codes in by_status(errors).items()},
        **{str(status): answer(operation, schema) for status, schema in operation.answers.items()},
    }
    return described


def security(needed: frozenset[Scope]) -> dict[str, Any]:
    """The scopes of a key, of which an operation needs one; a server without keys needs none."""
    if not needed:
        return {"security": []}
    return {"security": [*({"key": [scope]} for scope in sorted(needed)), {}]}


def answer(operation: Operation, schema: Any) -> dict[str, Any]:
    if schema is None:
        return {"description": "Done; no body."}
    content: dict[str, Any] = {operation.media: {"schema": as_schema(schema)}}
    content |= {media: {"schema": {"type": "string"}} for media in operation.texts}
    if operation.streams:
        kinds = " or a ".join(kind.__name__ for kind in operation.streams)
        text = f"Server-sent events, each the JSON of a {kinds}; the last is [DONE]."
        if operation.named_events:
            text = f"Server-sent events, each named by its type, with the JSON of a {kinds}; no [DONE] ends them."
        # Without a type: readers of the contract take it for the stream as a whole, or for one event
        content["text/event-stream"] = {"schema": {"description": text}}
    answered: dict[str, Any] = {"description": "The answer.", "content": content}
    if operation.answer_headers:
        shown = operation.answer_headers.items()
        answered["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in shown}
    return answered


def refusal(status: int, codes: Sequence[str]) -> dict[str, Any]:
    """An error's answer."""
    described = {"description": description(status, codes), "content": {JSON: {"schema": reference("Error")}}}
    if status in (429, 503):
        seconds = {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 1}}
        described["headers"] = {"retry-after": seconds}
    return described


def body_content(key: Key, operation: Operation) -> dict[str, Any]:
    """Return the content of a JSON body, for a Struct, or of other content types, for a dict."""
    found: dict[str, Any] = {JSON: as_schema(operation.body)}
    if operation.forms:
        found = {JSON: {"anyOf": [form(field, operation.forms) for field in operation.forms]}}
    elif isinstance(operation.body, dict):
        found = operation.body
    return {media: {"schema": schema, **media_examples(key, media)} for media, schema in found.items()}


def form(field: str, forms: Mapping[str, type]) -> dict[str, Any]:
    """The body that a field makes."""
    name = forms[field].__name__
    return without_model(name, components()[name], sorted(forms.keys() - {field}))


def as_schema(schema: Any) -> dict[str, Any]:
    return reference(schema.__name__) if isinstance(schema, type) else schema


def reference(name: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=name)}


def in_path(path: str) -> list[dict[str, Any]]:
    """Return what a path holds; only names, models and namespaces may have slashes."""
    kinds = {"name": ADAPTER_NAME, "id": NO_SLASH, "version": NO_SLASH, "file": NO_SLASH}
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", **kinds.get(name, {"minLength": 1})},
        }
        for name in re.findall(r"{(\w+)}", path)
    ]


def in_query(query: type | None) -> list[dict[str, Any]]:
    """Return the fields of a query Struct as parameters."""
    if query is None:
        return []
    schema = msgspec.json.schema_components([query], ref_template=REFERENCE)[1][query.__name__]
    fields = checked(query.__name__, schema)["properties"]
    return [{"name": name, "in": "query", "schema": field} for name, field in fields.items()]


def in_header(path: str, names: Sequence[str]) -> list[dict[str, Any]]:
    checks = HEADERS if path.startswith("/adapters") else {GENERATION_HEADER: HEADERS[GENERATION_HEADER]}
    return [{"name": name, "in": "header", "schema": {"type": "string", **checks.get(name, {})}} for name in names]


def render() -> str:
    return json.dumps(contract(), indent=2) + "\n"


if __name__ == "__main__":
    CONTRACT.write_text(render())
    print(f"wrote {CONTRACT}")
