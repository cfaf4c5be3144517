"""The pipeline example against a real server, on a tiny random model."""

from pathlib import Path

import httpx
import pytest

from loadtests import pipeline
from loadtests.completion_stream import StreamFailed
from loadtests.conversation import Conversation
from tests.loadtests.commands import cells

SMALL = ["--turns", "2", "--notes", "40", "--max-tokens", "6", "--check-tokens", "2"]


def test_it_prints_every_call_of_both_pipelines_and_leaves_no_adapter_behind(
    server: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = httpx.get(f"{server}/adapters").json()
    pipeline.main(["--url", server, "--model-directory", str(tiny_model), *SMALL])
    listed, summary = capsys.readouterr().out.strip().split("\n\n")
    lines = [line.split() for line in listed.splitlines()]
    asked = ["base", *pipeline.CHECKS]
    assert [line[1:4] for line in lines] == [
        [turn, kind, name] for turn in "12" for kind in ("aLoRA", "LoRA") for name in asked
    ]
    assert all("first token" in line and "cached" in line for line in listed.splitlines())
    _, activated, plain = cells(summary)
    assert [activated[0], plain[0]] == ["aLoRA", "LoRA"]
    assert int(activated[2]) < int(plain[2]) / 2
    assert int(activated[3]) < int(plain[3])
    assert httpx.get(f"{server}/adapters").json() == before


def test_checks_find_the_conversation_in_the_cache_and_do_not_become_part_of_it(server: str, tiny_model: Path) -> None:
    files = pipeline.make_adapters(str(tiny_model))["aLoRA"]
    names = {check: f"mine-{check}" for check in files}
    chosen = pipeline.options(SMALL)
    with httpx.Client(base_url=server, timeout=60) as client:
        for check, name in names.items():
            headers = {"Content-Type": "application/vnd.safetensors"}
            client.put(f"/adapters/{name}", content=bytes(files[check]), headers=headers).raise_for_status()
        steps = list(pipeline.converse(chosen, client, "tiny", {"aLoRA": names}))
        for name in names.values():
            client.delete(f"/adapters/{name}").raise_for_status()
    first, *checks = [step.call for step in steps if step.turn == 1]
    assert first.cached_tokens == 0
    assert all(call.cached_tokens >= first.prompt_tokens - 16 for call in checks)
    later = steps[len(names) + 1].call
    assert later.cached_tokens >= first.prompt_tokens - 16


def test_a_call_that_is_refused_says_why(server: str) -> None:
    with httpx.Client(base_url=server, timeout=60) as client, pytest.raises(StreamFailed, match="model_not_found"):
        Conversation(client, "nobody", "salt").say("Hello.", 1)
