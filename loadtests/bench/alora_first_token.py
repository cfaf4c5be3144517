"""alora: time to first token of an aLoRA adapter after a conversation with the base, compared with a plain LoRA.

The base has computed the conversation. The aLoRA adapter reuses its K/V and computes only the suffix, which begins with
the invocation; a plain LoRA adapter of the same weights computes the whole prompt. The ratio of multiplications is the
gain of an ideal server with a constant rate of them: a token late in a conversation takes more than an early one.
"""

import argparse
import asyncio
import random
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient
from loadtests.bench.report import conditions, medians, say, table, verdict
from loadtests.completion_stream import Timing, complete
from loadtests.random_adapter import RANK, adapter_file, tensor_shapes
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 7}
GOAL = 0.70  # of the ratio of tokens to prefill
INVOCATION_TOKENS = 4
LORA, ALORA = "bench-plain", "bench-activated"


class Tokens(NamedTuple):
    """Token ids for random prompts, special ones in no usual tokenizer, and different ids for the invocation."""

    ordinary: range
    invocation: list[int]

    def some(self, count: int, seed: str) -> list[int]:
        """Return random ordinary tokens, different for each seed, so that no prefix cache has them."""
        return random.Random(seed).choices(self.ordinary, k=count)


def add_options(add: Any) -> None:
    add("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096], help="tokens of the conversation")
    add("--suffix", type=int, default=50, help="tokens after it, including the invocation")


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    del scratch
    tokens = vocabulary(model.config["vocab_size"])
    with ExitStack() as stack:
        if not (url := chosen.url):
            say("starting a server")
            arguments = ["--model", str(model.directory), *shlex.split(chosen.server_args)]
            url = stack.enter_context(running_server(arguments))
        client = stack.enter_context(AdapterClient(url))
        for name, invocation in ((LORA, None), (ALORA, tokens.invocation)):
            client.put(name, adapter_file(model.config, 0, invocation=invocation))
            stack.callback(client.delete, name)
        rows = asyncio.run(measure(chosen, url, client.base(), tokens))
        stated = conditions(
            model,
            url,
            f"Adapters: one random one of rank {RANK}, all seven projections, uploaded with and without "
            f"alora_invocation_tokens; an invocation of {INVOCATION_TOKENS} tokens; both on the device.",
            "Load: the base completes a conversation of random tokens, then each adapter completes it with "
            f"{chosen.suffix} tokens more; one request at a time, up to the first token at the client.",
            f"Rounds: {chosen.rounds} of each length, with new tokens; the adapters take turns to be first; medians.",
        )
    return f"{rows_table(chosen, model.config, rows)}\n\n{stated}"


def vocabulary(size: int) -> Tokens:
    half = size // 2
    return Tokens(range(size // 4, half), list(range(half, half + INVOCATION_TOKENS)))


async def measure(
    chosen: argparse.Namespace, url: str, base: str, tokens: Tokens
) -> dict[int, list[tuple[Timing, Timing]]]:
    """Return each length's rounds of plain LoRA and aLoRA. Raises StreamFailed."""
    results: dict[int, list[tuple[Timing, Timing]]] = {}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await one_round(client, base, tokens, min(chosen.lengths), chosen.suffix, -1)
        for length in chosen.lengths:
            say(f"after {length} tokens: {chosen.rounds} rounds")
            rounds = [
                await one_round(client, base, tokens, length, chosen.suffix, number) for number in range(chosen.rounds)
            ]
            results[length] = rounds
    return results


async def one_round(
    client: httpx.AsyncClient, base: str, tokens: Tokens, length: int, suffix: int, number: int
) -> tuple[Timing, Timing]:
    conversation = tokens.some(length, f"{length}/{number}")
    rest = tokens.some(suffix - INVOCATION_TOKENS, f"{length}/{number}/suffix")
    await complete(client, base, conversation, 1)
    timings = {}
    for name in (LORA, ALORA)[:: 1 if number % 2 == 0 else -1]:
        timings[name] = await complete(client, name, [*conversation, *tokens.invocation, *rest], 1)
    return timings[LORA], timings[ALORA]


def rows_table(
    chosen: argparse.Namespace, config: dict[str, Any], results: dict[int, list[tuple[Timing, Timing]]]
) -> str:
    head = [
        "tokens before",
        "LoRA first token, ms",
        "aLoRA first token, ms",
        "ratio",
        "LoRA prefills",
        "aLoRA prefills",
    ]
    head += ["ratio of multiplications", "ratio of tokens to prefill", f"share reached of that (goal ≥ {GOAL:.0%})"]
    return table(head, [row(config, length, chosen.suffix, rounds) for length, rounds in results.items()])


def multiplications(config: dict[str, Any], start: int, end: int) -> int:
    """Return the base's multiplications for a prompt's tokens from `start` to `end` and the first generated token."""
    shapes = tensor_shapes(config, 1)
    weights = sum(
        rows * shapes[name.replace("lora_B", "lora_A")][1] for name, (rows, _) in shapes.items() if "lora_B" in name
    )
    width = sum(rows for name, (rows, _) in shapes.items() if name.endswith("q_proj.lora_B.weight"))  # of all layers
    attended = (end * (end + 1) - start * (start + 1)) // 2
    logits: int = config["vocab_size"] * config["hidden_size"]
    return (end - start) * weights + 2 * width * attended + logits


def row(config: dict[str, Any], length: int, suffix: int, rounds: Sequence[tuple[Timing, Timing]]) -> list[str]:
    """Return one row. The goal refers to the tokens that an ideal cache leaves to prefill, not to the measured ones."""
    figures = [[lora.first_seconds, alora.first_seconds, lora.prefilled, alora.prefilled] for lora, alora in rounds]
    lora, alora, lora_tokens, alora_tokens = medians(figures)
    ratio, ideal = lora / alora, (length + suffix) / suffix
    share = verdict(f"{ratio / ideal:.0%}", met=ratio / ideal >= GOAL)
    cells = [f"{1000 * lora:.1f}", f"{1000 * alora:.1f}", f"{ratio:.1f}×", f"{lora_tokens:.0f}", f"{alora_tokens:.0f}"]
    total = length + suffix
    arithmetic = multiplications(config, 0, total) / multiplications(config, length, total)
    return [str(length), *cells, f"{arithmetic:.1f}×", f"{ideal:.1f}×", share]
