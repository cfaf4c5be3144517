"""A conversation on the base model with three checks after each turn: `python -m loadtests.pipeline`.

Beside `make serve`. The checks are adapters, and what they say does not become part of the conversation. As aLoRA
adapters they find its K/V in the cache, as plain LoRA adapters with the same weights they compute it again each; both
are run, side by side. The adapters are random ones, made for this and deleted at the end.
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
from loadtests.completion_stream import StreamFailed, prompts
from loadtests.conversation import Call, Conversation, hit_rate, prefilled
from loadtests.random_adapter import adapter_file
from loadtests.report import table
from loadtests.server_process import find_model

CHECKS = ("relevance", "safety", "certainty")
QUESTIONS = ("What are these notes about?", "Write a short story with three of the words.", "What should I ask next?")
RANK = 8


class Step(NamedTuple):
    """A call of either pipeline; `asked` is the base or one of the checks."""

    turn: int
    kind: str
    asked: str
    call: Call


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.pipeline", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model-directory", help="of the model that is served; default: the embedded one's")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--notes", type=int, default=300, help="words of notes that the first question brings along")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer in the conversation")
    parser.add_argument("--check-tokens", type=int, default=8, help="of a check")
    return parser.parse_args(argv)


def make_adapters(directory: str | None) -> dict[str, dict[str, bytearray]]:
    """Each check as an adapter file of either kind. An aLoRA's invocation is any text of its own, as token ids."""
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
    """Both pipelines, turn by turn. Raises StreamFailed, httpx.HTTPError."""
    conversations = {kind: Conversation(client, base, f"{uuid4()}") for kind in names}  # a salt each: nothing shared
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
    """A Markdown table with a row for each kind of adapter."""
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
        ours = f"pipeline-{uuid4().hex[:8]}"  # no name that another one could have
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
