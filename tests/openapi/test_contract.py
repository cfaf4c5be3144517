"""The committed contract is what the routes and the Structs say, and a valid OpenAPI 3.1 document."""

import json
import re

import jsonschema
import msgspec
import openapi_spec_validator
import pytest

from openapi.build import CONTRACT, contract, render, served, structs
from openapi.operations import OPERATIONS
from service import app
from service.keys.scopes import OPEN_ROUTES


@pytest.fixture(scope="module")
def document() -> dict:
    return json.loads(CONTRACT.read_text())


def test_the_committed_contract_is_the_one_the_code_makes(document: dict) -> None:
    assert document == contract(), "run `make openapi`"
    assert CONTRACT.read_text() == render(), "run `make openapi`"


def test_the_contract_is_valid_openapi(document: dict) -> None:
    openapi_spec_validator.validate(document, cls=openapi_spec_validator.OpenAPIV31SpecValidator)


def test_every_route_is_described_and_nothing_else_is(document: dict) -> None:
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == served() == set(OPERATIONS)
    assert {re.sub(r":\w+}", "}", route.path) for route in app.routes} == {path for _, path in described}


def test_every_struct_is_a_schema_and_every_schema_a_struct(document: dict) -> None:
    schemas = document["components"]["schemas"]
    assert set(schemas) == {struct.__name__ for struct in structs()}


def test_the_schemas_accept_what_the_structs_accept(document: dict) -> None:
    """The constraints reach the contract: a value that a Struct refuses is refused by its schema too."""
    schema = {"$ref": "#/components/schemas/CompletionRequest", "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    requests = [
        {"model": "base", "prompt": "Hi", "max_tokens": 1, "unknown": True},
        {"model": "base", "prompt": [1, 2], "temperature": 0.5},
        {"model": "base", "prompt": "Hi", "max_tokens": -1},
        {"model": "base", "prompt": "Hi", "temperature": -1},
        {"model": "", "prompt": "Hi"},
        {"prompt": "Hi"},
    ]
    kind = next(struct for struct in structs() if struct.__name__ == "CompletionRequest")

    def accepted(request: dict) -> bool:
        try:
            msgspec.convert(request, kind)
        except msgspec.ValidationError:
            return False
        return True

    assert [validator.is_valid(request) for request in requests] == [accepted(request) for request in requests]
    assert [accepted(request) for request in requests] == [True, True, False, False, False, False]


def test_the_same_paths_need_no_key_in_the_contract_and_in_the_service(document: dict) -> None:
    open_paths = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert open_paths == OPEN_ROUTES
    served_open = {route.path for route in app.routes for path in app.OPEN_PATHS if route.path_regex.match(path)}
    assert served_open == OPEN_ROUTES
