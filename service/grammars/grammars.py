"""The grammars of requests, translated for the engine and checked."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from

from service.errors import RequestError
from service.grammars.json_schema import of_schema
from service.grammars.structural_tags import NO_MARKERS, Markers, Parts, grammar_of

MAX_GRAMMAR_BYTES = 256 << 10
CHECK_SECONDS = 10.0
KEPT = 256  # grammars that were found good
MAX_RULES = 500  # lines of a grammar: the compiler's stack has no room for many more in one another


class Source(NamedTuple):
    """Where a grammar comes from."""

    field: str
    kind: Literal["json_schema", "regex", "choice", "grammar", "structural_tag"]
    content: Any  # a JSON schema, a list of choices, a structural tag, or text


class Grammars:
    """Translates and checks the grammars of requests, on threads, and remembers those that it found good."""

    def __init__(self, markers: Markers = NO_MARKERS) -> None:
        self._markers = markers
        self._good: OrderedDict[bytes, str] = OrderedDict()  # the least recently used first

    async def translate(self, source: Source) -> str:
        """A grammar that the engine can compile. Raises RequestError naming the field and what is wrong with it."""
        key = msgspec.json.encode((source.kind, source.content))
        if len(key) > MAX_GRAMMAR_BYTES:
            message = f"{source.field} has {len(key)} bytes; at most {MAX_GRAMMAR_BYTES} are taken"
            raise RequestError("invalid_grammar", message, source.field)
        grammar = self._good.get(key)
        if grammar is None:
            try:
                grammar = await asyncio.wait_for(asyncio.to_thread(_translate, source, self._markers), CHECK_SECONDS)
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


def _translate(source: Source, markers: Markers = NO_MARKERS) -> str:
    field, kind, content = source
    if kind == "structural_tag":
        _check(field, grammar_of(field, content, PARTS, NO_MARKERS))  # the check knows no tokens
        return grammar_of(field, content, PARTS, markers)
    if kind == "json_schema":
        grammar = _schema(field, content)
    elif kind == "choice":
        grammar = LLMatcher.grammar_from_lark(f"start: {_alternatives(content)}")
    else:
        grammar = (_grammar if kind == "grammar" else _regex)(field, content)
    _check(field, grammar)
    return grammar


def _schema(field: str, content: Any) -> str:
    try:
        return of_schema(field, content)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid_grammar", f"{field}: {error}", field) from None


def _grammar(field: str, content: str) -> str:
    try:
        if "%json" in content or content.lstrip().startswith("{"):
            raise ValueError("a grammar is GBNF or Lark without %json: send a JSON schema in a field for schemas")
        if content.count("\n") > MAX_RULES:
            raise ValueError(f"a grammar has at most {MAX_RULES} lines")
        return grammar_from("grammar", content)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid_grammar", f"{field}: {error}", field) from None


def _regex(field: str, content: str) -> str:
    try:
        return grammar_from("regex", content)
    except ValueError as error:
        raise RequestError("invalid_grammar", f"{field}: {error}", field) from None


def _part(translate: Callable[[str, str], str], field: str, content: str) -> str:
    """A grammar or a regex, checked alone, in Lark."""
    grammar = translate(field, content)
    _check(field, grammar)
    if grammar.lstrip().startswith("{"):
        grammar = msgspec.json.decode(grammar)["grammars"][0]["lark_grammar"]
    return grammar.removeprefix("start: ") if translate is _regex else grammar


PARTS = Parts(_schema, partial(_part, _regex), partial(_part, _grammar))


def _check(field: str, grammar: str) -> None:
    """Raise RequestError for a grammar that cannot be compiled, or that no text fits."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise RequestError("invalid_grammar", f"{field}: {messages[0].strip()}", field)
    if _is_empty(grammar):
        message = f"{field}: no text fits it: a $ref or a rule leads to itself alone"
        raise RequestError("invalid_grammar", message, field)


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
