"""Beginnings of prompts: what has which in common, and which of them the prefix cache holds."""

import sys
from pathlib import Path

import msgspec

from runtime.kv.block_keys import BlockChain
from runtime.kv.log import block_name
from runtime.messages import Generate, KvChanges, KvRemoved, KvStored, SamplingParams
from service.openai.schemas import Message
from service.routing.heads import MAX_HEADS, MAX_NOTED, PIECE, PrefixHeads, heads_of
from tests.service.live_server import NAME, fake_settings, live_server, wait_until

BLOCK = 4


def test_heads_have_in_common_what_prompts_have_in_common() -> None:
    text = "x" * (PIECE * 3)
    one, other = heads_of(None, text + "a"), heads_of(None, text + "b")
    assert one[:3] == other[:3]
    assert one[3] != other[3]
    messages = [{"role": "user", "content": str(number)} for number in range(40)]
    assert len(heads_of(messages, None)) == MAX_HEADS
    assert heads_of(messages[:2], None) == heads_of(messages, None)[:2]
    assert heads_of(None, None) == heads_of(None, ["a", "b"]) == heads_of(None, [1, 2]) == ()


def test_a_request_and_what_is_decoded_of_it_have_the_same_heads() -> None:
    sent = [
        {"role": "system", "content": "be brief"},
        {"content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}], "role": "user", "extra": 1},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
    ]
    decoded = msgspec.convert(sent, list[Message])
    assert heads_of(decoded, None) == heads_of(sent, None)


def stored(names: list[int], host: bool = False) -> KvChanges:
    return KvChanges(changes=[KvStored(blocks=names, parent=None, token_ids=[], namespace=None, host=host)])


def test_a_head_is_told_while_the_engine_has_the_blocks_of_its_prompt() -> None:
    heads, tokens = PrefixHeads(BLOCK), list(range(10))
    command = Generate(request_id="", token_ids=tokens, params=SamplingParams(), cache_salt="team")
    names = [block_name(key) for key in BlockChain(command).keys_up_to(tokens, 10, BLOCK)]
    assert len(names) == 2, "of ten tokens eight are in full blocks"
    heads.note(["short", "whole"], tokens, "team")
    heads.on_changes(stored(names[:1]))
    assert heads.held() == [], "a part of it is computed"
    heads.on_changes(stored(names[1:]))
    assert heads.held() == ["whole"]
    heads.on_changes(stored(names, host=True))
    heads.on_changes(KvChanges(changes=[KvRemoved(blocks=names)]))
    assert heads.held() == ["whole"], "it is in host memory now"
    heads.on_changes(KvChanges(changes=[KvRemoved(blocks=names, host=True)]))
    assert heads.held() == []
    heads.on_changes(stored(names))
    heads.on_changes(None)
    assert heads.held() == [], "another engine knows no block"
    heads.on_changes(stored(names))
    heads.note(["other"], tokens, "another team")
    assert heads.held() == ["whole"], "the salt is part of a block's name"
    heads.note(["tiny"], [1, 2], "team")
    for number in range(MAX_NOTED):
        heads.note([str(number)], tokens, "team")
    assert len(heads.held()) == MAX_NOTED
    assert "whole" not in heads.held()


def test_routing_tells_the_heads_of_base_prompts_while_the_engine_has_them(tiny_model: Path, tmp_path: Path) -> None:
    options = {"load_format": "dummy", "kv_cache_bytes": 4 << 20, "adapter_bytes": 1 << 20, "threads": 1}
    options |= {"routing_prefixes": True, "kv_events": f"ipc://{tmp_path}/events"}  # both follow the engine
    command = (sys.executable, "-m", "runtime.process")
    with live_server(fake_settings(tiny_model, tmp_path, engine_command=command, **options)) as server:
        messages = [{"role": "user", "content": "hello " * 30}]

        def told() -> list[str]:
            heads: list[str] = server.client.get("/routing").json()["prefixes"]
            return heads

        assert told() == []
        assert server.post("/v1/chat/completions", model=NAME, messages=messages, max_tokens=1).status_code == 200
        wait_until(lambda: told() == list(heads_of(messages, None)))
        assert server.complete("hello " * 40, max_tokens=1).status_code == 200
        wait_until(lambda: len(told()) == 2)
        assert server.post("/reset_prefix_cache").status_code == 200
        wait_until(lambda: told() == [])
