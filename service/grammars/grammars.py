"""The grammars of requests, translated for the engine and checked."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from service.errors import RequestError
from service.grammars.process import Answer, Job
from service.grammars.source import Source
from service.grammars.structural_tags import NO_MARKERS, Markers
from service.sandbox.sandbox import JobFailed, Sandbox

MAX_GRAMMAR_BYTES = 256 << 10
CHECK_SECONDS = 5.0  # of processor time for one grammar; the largest schemas take one second
PLACES = 4  # grammars that are checked at one time; others wait
KEPT = 256  # grammars that were found good


class Grammars:
    """Has the grammars of requests translated and checked, in a sandbox, and remembers those that it found good."""

    def __init__(
        self,
        markers: Markers = NO_MARKERS,
        seconds: float = CHECK_SECONDS,
        environment: Mapping[str, str] | None = None,  # of the processes; None: that of this one
    ) -> None:
        self._markers, self._seconds = markers, seconds
        self._sandbox = Sandbox("service.grammars.process", PLACES, seconds, environment)
        self._good: OrderedDict[bytes, str] = OrderedDict()  # the least recently used first

    async def close(self) -> None:
        await self._sandbox.close()

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
        markers = self._markers if source.kind == "structural_tag" else NO_MARKERS
        try:
            told = await self._sandbox.run(Job(source=source, markers=markers))
        except JobFailed as failed:
            too_long = f"takes longer than {self._seconds:g} s to check"
            fault = too_long if failed.too_long else "needs more stack or memory than its compiler has"
            raise RequestError("invalid_grammar", f"{source.field} {fault}: make it simpler", source.field) from None
        answer = msgspec.json.decode(told, type=Answer)
        if answer.grammar is None:
            assert answer.refusal is not None
            raise RequestError("invalid_grammar", answer.refusal, answer.place)
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
