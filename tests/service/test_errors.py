"""The table of errors is complete: it has every code that is raised, and no other."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from runtime.messages import EngineCode
from service import errors
from service.errors import ANSWERS, Error, ErrorType, RequestError, answer_of, error_body

SERVICE = Path(errors.__file__).parent
RAISING = {"RequestError": 0, "EngineError": 0, "end_requests": 0, "_failed": 0}  # calls, and where they have a code


def nodes() -> Iterator[ast.AST]:
    """The syntax of service/, without the table itself."""
    for path in SERVICE.rglob("*.py"):
        for statement in ast.parse(path.read_text(), str(path)).body:
            if not (isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "ANSWERS"):
                yield from ast.walk(statement)


def raised() -> set[str]:
    """The codes that service/ writes out where it makes an error."""
    found = set()
    for node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in RAISING and node.args:
            code = node.args[0]
            if isinstance(code, ast.Constant):
                found.add(code.value)
    return found


def test_every_code_that_is_raised_has_an_answer() -> None:
    assert len(raised()) > 40, "the calls that make errors have other names now"
    assert raised() | set(get_args(EngineCode)) <= set(ANSWERS)


def test_every_answer_is_that_of_a_code_in_use() -> None:
    words = {node.value for node in nodes() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(ANSWERS) <= words | set(get_args(EngineCode))


def test_every_type_of_error_is_that_of_some_code() -> None:
    bodies = [error_body(RequestError(code, "why")) for code in ANSWERS]
    assert {body.error.type for body in bodies} == set(get_args(ErrorType))


def test_what_may_be_tried_again_says_when() -> None:
    for code, answer in ANSWERS.items():
        told = answer_of(RequestError(code, "why")).headers.get("retry-after", "0")
        assert (int(told) > 0) == (answer.status in (429, 503)), code


def test_the_code_on_the_wire_can_differ_from_the_one_that_is_raised() -> None:
    body = error_body(RequestError("source_broken", "why", "src"))
    assert isinstance(body, Error)
    assert (body.error.code, body.error.param) == ("source_unavailable", "src")
