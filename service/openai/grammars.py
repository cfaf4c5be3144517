"""What an answer must look like, in the dialects of OpenAI, vLLM and SGLang, as a grammar for the engine."""

import json
from collections import OrderedDict
from typing import NamedTuple

import msgspec

from service.errors import RequestError
from service.grammar.process import Answer
from service.grammar.translation import Source
from service.openai.schemas import GenerationRequest, JsonObject, JsonSchema, StructuredOutputs
from service.sandbox.sandbox import JobFailed, Sandbox

MAX_GRAMMAR_BYTES = 256 << 10
CHECK_SECONDS = 5.0  # of processor time for one grammar; the largest schemas take one second
PLACES = 4  # grammars that are checked at one time; others wait
KEPT = 256  # grammars that were found good


class Grammars:
    """Translates and checks the grammars of requests, in a sandbox, and remembers those that it found good."""

    def __init__(self, seconds: float = CHECK_SECONDS) -> None:
        self._seconds = seconds
        self._sandbox = Sandbox("service.grammar.process", PLACES, seconds)
        self._good: OrderedDict[bytes, str] = OrderedDict()  # the least recently used first

    async def close(self) -> None:
        await self._sandbox.close()

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
            grammar = self._good[key] = await self._checked(source)
            if len(self._good) > KEPT:
                self._good.popitem(last=False)
        self._good.move_to_end(key)
        return grammar

    async def _checked(self, source: Source) -> str:
        try:
            answer = msgspec.json.decode(await self._sandbox.run(source), type=Answer)
        except JobFailed as failed:
            too_long = f"takes longer than {self._seconds:g} s to check"
            fault = too_long if failed.too_long else "needs more stack or memory than its compiler has"
            raise RequestError("invalid_grammar", f"{source.field} {fault}: make it simpler", source.field) from None
        if answer.grammar is None:
            assert answer.refusal is not None
            raise RequestError("invalid_grammar", answer.refusal, source.field)
        return answer.grammar


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
