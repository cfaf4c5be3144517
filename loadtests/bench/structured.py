"""structured: what it costs a request's tokens that a grammar constrains them, one request at a time and eight.

Each form is written on and on, so that all answers have the same number of tokens. Beside it runs the same request
without the constraint. The two take turns, and the prompts' K/V are cached: what remains is decoding.
"""

import argparse
import asyncio
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient
from loadtests.bench.report import conditions, say, table, verdict
from loadtests.completion_stream import StreamFailed, prompts
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 7, "max_tokens": 96}
AIM = 5.0  # percent of a token's time
ROW = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["plant", "animal", "stone"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
ROWS = {"type": "array", "items": ROW, "minItems": 2000}  # more than any answer has room for
TOOL = {
    "type": "function",
    "function": {
        "name": "record",
        "description": "Record rows.",
        "parameters": {"type": "object", "properties": {"rows": ROWS}, "required": ["rows"]},
    },
}


class Form(NamedTuple):
    """A constraint: the fields of a request with it, and those of the same request without it."""

    path: str
    constrained: Mapping[str, Any]
    free: Mapping[str, Any]


FORMS = {
    "regex": Form("/v1/completions", {"structured_outputs": {"regex": "([a-z]{1,9}[ ,.])+"}}, {}),
    "JSON schema": Form("/v1/completions", {"structured_outputs": {"json": ROWS}}, {}),
    "forced tool call": Form(
        "/v1/chat/completions",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "record"}}},
        {"tools": [TOOL], "tool_choice": "auto"},
    ),
}


class Pair(NamedTuple):
    """Seconds for each token of an answer."""

    free: float
    constrained: float

    @property
    def cost(self) -> float:
        """How much longer the constrained one takes, in percent."""
        return 100 * (self.constrained / self.free - 1)


def add_options(add: Any) -> None:
    add("--at-once", type=int, nargs="+", default=[1, 8], help="requests at a time")


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    del scratch
    with ExitStack() as stack:
        if not (url := chosen.url):
            say("starting a server")
            arguments = ["--model", str(model.directory), *shlex.split(chosen.server_args)]
            url = stack.enter_context(running_server(arguments))
        with AdapterClient(url) as client:
            base = client.base()
        measured = asyncio.run(measure_all(chosen, url, base))
        stated = conditions(
            model,
            url,
            f"Load: greedy requests of {chosen.prompt_words} random prompt words, not streamed, {chosen.max_tokens} "
            "tokens each; their prompts are in the prefix cache and their grammars compiled.",
            f"Rounds: {chosen.rounds}, the constrained requests first in every other one; medians of the rounds, and "
            "of their costs.",
        )
    return f"{rows_table(measured)}\n\n{stated}"


async def measure_all(chosen: argparse.Namespace, url: str, base: str) -> dict[tuple[str, int], list[Pair]]:
    """Measure each form at each number of requests, in every round. Raises StreamFailed."""
    measured: dict[tuple[str, int], list[Pair]] = {(name, count): [] for name in FORMS for count in chosen.at_once}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for number in range(-1, chosen.rounds):  # the first one warms up
            say("warming up" if number < 0 else f"round {number + 1} of {chosen.rounds}")
            for (name, count), pairs in measured.items():
                form = FORMS[name]
                order = (form.constrained, form.free) if number % 2 else (form.free, form.constrained)
                spent = [await one_batch(chosen, client, base, form.path, fields, count) for fields in order]
                free, constrained = spent[::-1] if number % 2 else spent
                if number >= 0:
                    pairs.append(Pair(free, constrained))
    return measured


async def one_batch(
    chosen: argparse.Namespace, client: httpx.AsyncClient, base: str, path: str, fields: Mapping[str, Any], count: int
) -> float:
    """Run `count` requests at a time; return the seconds for each token of one of them. Raises StreamFailed."""
    texts = prompts(count, chosen.prompt_words, "structured")
    start = time.perf_counter()
    await asyncio.gather(*(answer(chosen, client, base, path, fields, text) for text in texts))
    tokens: int = chosen.max_tokens
    return (time.perf_counter() - start) / tokens


async def answer(
    chosen: argparse.Namespace, client: httpx.AsyncClient, base: str, path: str, fields: Mapping[str, Any], text: str
) -> None:
    prompt = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    body = {"model": base, **prompt, **fields, "max_tokens": chosen.max_tokens, "min_tokens": chosen.max_tokens}
    response = await client.post(path, json={**body, "temperature": 0})
    if response.status_code != 200:
        raise StreamFailed(f"{response.status_code} {response.text[:300]}")
    if (tokens := response.json()["usage"]["completion_tokens"]) != chosen.max_tokens:
        raise StreamFailed(f"an answer has {tokens} tokens of {chosen.max_tokens}: {response.text[:300]}")


def rows_table(measured: Mapping[tuple[str, int], Sequence[Pair]]) -> str:
    head = ["form", "at a time", "free, ms a token", "constrained, ms a token", f"cost (aim ≤ {AIM:g} %)"]
    rows = []
    for (name, count), pairs in measured.items():
        cost = statistics.median(pair.cost for pair in pairs)
        spent = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
        shown = verdict(f"{cost:+.1f} %", met=cost <= AIM)
        rows.append([name, str(count), *(f"{milliseconds:.2f}" for milliseconds in spent), shown])
    return table(head, rows)
