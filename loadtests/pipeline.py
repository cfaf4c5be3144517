"""A conversation with the base model and three checks after each turn: `python -m loadtests.pipeline`.

Start a server first, with `make serve`. The checks are adapters, and their answers do not become part of the
conversation. An aLoRA adapter finds the conversation's K/V in the prefix cache; a plain LoRA adapter with the same
weights computes it again. The example runs both side by side. The adapters are random, and are deleted at the end.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
from transformers import AutoTokenizer

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.bench.report import table
from loadtests.completion_stream import StreamFailed, prompts
from loadtests.conversation import Call, Conversation, hit_rate, prefilled
from loadtests.random_adapter import adapter_file
from loadtests.server_process import find_model

CHECKS = ("relevance", "safety", "certainty")
QUESTIONS = ("What are these notes about?", "Write a short story with three of the words.", "What should I ask next?")
RANK = 8


class Step(NamedTuple):
    """One call of either pipeline."""

    turn: int
    kind: str  # of the pipeline's adapters: aLoRA or LoRA
    asked: str  # the base or one of the checks
    call: Call


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.pipeline", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model-directory", help="of the served model; default: the embedded one's")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--notes", type=int, default=300, help="words of notes before the first question")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer in the conversation")
    parser.add_argument("--check-tokens", type=int, default=8, help="of a check")
    return parser.parse_args(argv)


def make_adapters(directory: str | None) -> dict[str, dict[str, bytearray]]:
    """Return an adapter file of either kind for each check. Each aLoRA has a different text as its invocation."""
    model = find_model(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(model.directory)
    files: dict[str, dict[str, bytearray]] = {"aLoRA": {}, "LoRA": {}}
    for seed, check in enumerate(CHECKS):
        invocation = tokenizer(f"Check of {check}:\n", add_special_tokens=False).input_ids
        files["aLoRA"][check] = adapter_file(model.config, seed, RANK, invocation)
        files["LoRA"][check] = adapter_file(model.config, seed, RANK)
    return files


def converse(
    chosen: argparse.Namespace, client: httpx.Client, base: str, names: dict[str, dict[str, str]]
) -> Iterator[Step]:
    """Run both pipelines turn by turn and yield their calls. Raises StreamFailed, httpx.HTTPError."""
    conversations = {kind: Conversation(client, base, f"{uuid4()}") for kind in names}  # different salts: no shared K/V
    notes = f"Notes: {prompts(1, chosen.notes, 'notes')[0]}.\n\n" if chosen.notes else ""
    for turn, question in enumerate(itertools.islice(itertools.cycle(QUESTIONS), chosen.turns), start=1):
        for kind, conversation in conversations.items():
            said = conversation.say(notes + question if turn == 1 else question, chosen.max_tokens)
            yield Step(turn, kind, "base", said)
            for check, name in names[kind].items():
                call = conversation.check(name, chosen.check_tokens, activated=kind == "aLoRA")
                yield Step(turn, kind, check, call)


def line(step: Step) -> str:
    call = step.call
    cached = f"cached {call.cached_tokens:5} of {call.prompt_tokens:5}"
    first = f"first token {1000 * call.first_seconds:6.0f} ms"
    return f"turn {step.turn}  {step.kind:5}  {step.asked:9}  {cached}  {first}  {call.text[:60]!r}"


def summary(steps: Sequence[Step]) -> str:
    """Return a Markdown table with a row for each kind of adapter."""
    head = ["checks are", "first token of a check, ms", "tokens prefilled by checks", "and by all calls"]
    rows = []
    for kind in dict.fromkeys(step.kind for step in steps):
        calls = [step.call for step in steps if step.kind == kind]
        checks = [step.call for step in steps if step.kind == kind and step.asked != "base"]
        first = statistics.median(call.first_seconds for call in checks)
        counts = [f"{prefilled(checks)}", f"{prefilled(calls)}"]
        rows.append([kind, f"{1000 * first:.0f}", *counts, f"{hit_rate(checks):.0%}", f"{hit_rate(calls):.0%}"])
    return table([*head, "hit rate of checks", "and of all calls"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    files = make_adapters(chosen.model_directory)
    with ExitStack() as stack:
        adapters = stack.enter_context(AdapterClient(chosen.url))
        client = stack.enter_context(httpx.Client(base_url=chosen.url, timeout=600))
        ours = f"pipeline-{uuid4().hex[:8]}"  # a name that no other adapter has
        names: dict[str, dict[str, str]] = {kind: {} for kind in files}
        for kind, check in itertools.product(files, CHECKS):
            names[kind][check] = f"{ours}-{kind.lower()}-{check}"
            adapters.put(names[kind][check], files[kind][check], ephemeral=True)
            stack.callback(adapters.delete, names[kind][check])
        base, steps = adapters.base(), []
        Conversation(client, base, f"{uuid4()}").say("Hello.", 1)  # a server's first answer is slower than all others
        for step in converse(chosen, client, base, names):
            print(line(step), flush=True)
            steps.append(step)
    print(f"\n{summary(steps)}")


if __name__ == "__main__":
    try:
        main()
    except (CallFailed, StreamFailed, httpx.HTTPError, subprocess.CalledProcessError) as error:
        sys.exit(f"failed: {error}")
