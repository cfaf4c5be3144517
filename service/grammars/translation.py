"""Grammars for the engine, from what an answer must look like: a JSON schema, a regular expression, choices, a grammar.

All of this runs in a sandbox (`process.py`): a grammar can keep the compiler busy for minutes, and one that leads too
deep ends its process.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from

from service.grammars.json_schema import of_schema
from service.grammars.source import InvalidGrammar, Source
from service.grammars.structural_tags import NO_MARKERS, Markers, Parts, grammar_of


def translated(source: Source, markers: Markers = NO_MARKERS) -> str:
    """A grammar that the engine can compile. Raises InvalidGrammar."""
    field, kind, content = source.field, source.kind, source.content
    if kind == "structural_tag":
        _check(field, grammar_of(field, content, PARTS, NO_MARKERS))  # the check knows no tokens
        return grammar_of(field, content, PARTS, markers)
    if kind == "json_schema":
        grammar = of_schema(field, content)
    elif kind == "choice":
        grammar = LLMatcher.grammar_from_lark(f"start: {_alternatives(content)}")
    else:
        grammar = (_grammar if kind == "grammar" else _regex)(field, content)
    _check(field, grammar)
    return grammar


def _grammar(field: str, content: str) -> str:
    if "%json" in content or content.lstrip().startswith("{"):
        raise InvalidGrammar(
            field, "a grammar is GBNF or Lark without %json: send a JSON schema in a field for schemas"
        )
    try:
        return grammar_from("grammar", content)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(field, str(error)) from None


def _regex(field: str, content: str) -> str:
    try:
        return grammar_from("regex", content)
    except ValueError as error:
        raise InvalidGrammar(field, str(error)) from None


def _part(translate: Callable[[str, str], str], field: str, content: str) -> str:
    """A grammar or a regex, checked alone, in Lark."""
    grammar = translate(field, content)
    _check(field, grammar)
    if grammar.lstrip().startswith("{"):
        grammar = msgspec.json.decode(grammar)["grammars"][0]["lark_grammar"]
    return grammar.removeprefix("start: ") if translate is _regex else grammar


PARTS = Parts(of_schema, partial(_part, _regex), partial(_part, _grammar))


def _check(field: str, grammar: str) -> None:
    """Raise InvalidGrammar for a grammar that cannot be compiled, or that no text fits."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise InvalidGrammar(field, messages[0].strip())
    if _is_empty(grammar):
        raise InvalidGrammar(field, "no text fits it: a $ref or a rule leads to itself alone")


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
